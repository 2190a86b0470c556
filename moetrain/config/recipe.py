"""What a user writes: one recipe, frozen. Imports no torch.

Unknown keys are refused by `moetrain.config.load`, which names the nearest right one.
"""

from typing import Annotated, Any, Literal, Self, cast

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

from moetrain.config.best import check_best, figures
from moetrain.config.cluster import ClusterConfig
from moetrain.config.data import DataConfig
from moetrain.config.distill import TeacherConfig, check_teacher
from moetrain.config.megatron import passed_through
from moetrain.config.method import MethodConfig
from moetrain.config.online_base import OnlineMethod
from moetrain.config.optim import OptimConfig
from moetrain.config.reads import leave_out, unread
from moetrain.config.rewards import Reward, Rewards
from moetrain.config.rollout import RolloutConfig
from moetrain.config.sampling import check_sampling
from moetrain.config.section import Count, Folder, Location, Paths, Section


def _as_method(value: object) -> object:
    return {"name": value} if isinstance(value, str) else value


class ModelConfig(Section):
    """Which model, and in what precision."""

    path: Location | None = Field(
        default=None, description="Hugging Face folder, Megatron checkpoint folder, or builtin:NAME"
    )
    hf: dict[str, Any] | None = Field(
        default=None, description="a config.json's content, for training from scratch"
    )
    tokenizer: Location | None = Field(
        default=None, description="folder, builtin:NAME or Hub name; the model's own by default"
    )
    dtype: Literal["fp32", "bf16"] = Field(
        default="bf16", description="of weights and activations; bf16 keeps fp32 main weights"
    )
    backend: Literal["auto", "torch", "te"] = Field(
        default="auto", description="auto takes Transformer Engine on a GPU that has it, else torch"
    )
    init: Literal["load", "random"] | None = Field(
        default=None,
        description="load for a path, random for hf; random with a path takes its config only",
    )
    init_std: float = Field(default=0.02, gt=0, description="standard deviation of random weights")

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.path is None) == (self.hf is None):
            raise ValueError("give exactly one of model.path and model.hf")
        if self.hf is not None and self.init == "load":
            raise ValueError(
                "model.init=load needs model.path; with model.hf the weights are random"
            )
        return self


class ParallelConfig(Section):
    """The layout. Data parallelism is what is left of the world."""

    tp: Count = Field(default=1, description="tensor parallel")
    sp: bool | None = Field(
        default=None, validate_default=True, description="sequence parallel; on when tp > 1"
    )
    pp: Count = Field(default=1, description="pipeline parallel")
    vpp: Count | None = Field(
        default=None, description="virtual pipeline stages per rank (interleaving); needs pp > 1"
    )
    ep: Count = Field(default=1, description="expert parallel")
    etp: Count = Field(default=1, description="expert tensor parallel")
    cp: Count = Field(default=1, description="context parallel")
    first_stage_layers: Count | None = Field(
        default=None,
        description="layers of the first pipeline stage; default: even, earlier stages first",
    )
    last_stage_layers: Count | None = Field(
        default=None, description="layers of the last pipeline stage"
    )

    @field_validator("sp")
    @classmethod
    def _follows_tp(cls, value: bool | None, info: ValidationInfo) -> bool:
        return info.data.get("tp", 1) > 1 if value is None else value

    @field_validator("vpp")
    @classmethod
    def _none_for_one(cls, value: int | None) -> int | None:
        return None if value == 1 else value  # Megatron would take 1 for interleaving

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.vpp and self.pp == 1:
            raise ValueError(
                f"parallel.vpp={self.vpp} needs parallel.pp > 1; set pp or leave vpp out"
            )
        if self.sp and self.tp == 1:
            raise ValueError("parallel.sp=true needs parallel.tp > 1; leave sp out")
        return self


class TrainConfig(Section):
    """How long and in what pieces."""

    steps: Count | None = Field(default=None, description="optimizer steps; this or train.epochs")
    epochs: float | None = Field(
        default=None,
        gt=0,
        description="passes over data.train, with a smaller last step where they end; this or"
        " train.steps",
    )
    global_batch: Count = Field(
        default=8,
        description="packs of data.seq_len tokens per optimizer step, over all ranks; methods"
        " that sample count rollout.prompts_per_step in its place",
    )
    micro_batch: Count = Field(default=1, description="packs put together in one forward pass")
    eval_every: Count | None = Field(
        default=None,
        description="steps from one look at data.eval to the next; the start and the end have one",
    )
    eval_packs: Count | None = Field(
        default=None,
        description="packs of data.eval that are used (prompts, where answers are sampled);"
        " default: all",
    )
    sample_prompts: Location | None = Field(
        default=None,
        description="file of prompts, as for `moetrain sample`; the first 32 are answered at each"
        " evaluation, into <run_dir>/answers",
    )
    sample_tokens: Count = Field(
        default=128, description="of an answer to train.sample_prompts, at most"
    )
    deterministic: bool = Field(
        default=False,
        description="only kernels that give the same bits every time; slower on a GPU",
    )
    recompute: Literal["none", "selective", "full"] = Field(
        default="none",
        description="computed again to save memory: selective is attention, full every layer",
    )
    overlap: bool = Field(
        default=True, description="overlap gradient and parameter traffic with computation"
    )

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if self.steps is None and self.epochs is None:
            raise ValueError("give train.steps or train.epochs")
        if self.steps is not None and self.epochs is not None:
            raise ValueError(
                f"train.steps={self.steps} and train.epochs={self.epochs:g} both say how long: give"
                " one of them, and set the other to null (train.steps=null train.epochs="
                f"{self.epochs:g})"
            )
        return self


class RouterConfig(Section):
    """Losses that keep a mixture of experts in balance."""

    aux_loss: float = Field(default=0.0, ge=0, description="weight of the load-balancing loss")
    balance: Literal["sequence", "global"] = Field(
        default="sequence",
        description="over what aux_loss balances: each sequence, or all tokens of a step (arXiv"
        " 2501.11873, Megatron's global_aux_loss), which costs a forward pass more",
    )
    z_loss: float = Field(
        default=0.0, ge=0, description="weight of the loss that keeps router logits small"
    )
    freeze: bool = Field(default=False, description="leave the router's weights as they are")


class AdapterConfig(Section):
    """Train low-rank adapters beside frozen weights."""

    type: Literal["lora", "rslora", "olora", "dora", "pissa"] = Field(
        default="lora",
        description="rslora scales by alpha / sqrt(rank); olora and pissa start from factors "
        "of the weights; dora trains their norms too",
    )
    rank: Count = Field(default=16, description="r of B [out, r] and A [r, in]")
    alpha: float = Field(default=32.0, gt=0, description="B A is scaled by alpha / rank")
    target: Paths = Field(
        default=["all-linear"],
        min_length=1,
        description="all-linear (attention, dense MLP, every expert), all-router (the router too), "
        "or patterns: q_proj, experts, mlp.gate, layers.3, model.layers.3.*",
    )
    path: Folder | None = Field(
        default=None, description="PEFT folder to go on from; it says rank, alpha, type and target"
    )
    dropout: float | None = Field(
        default=None,
        ge=0,
        lt=1,
        validate_default=True,
        description="share of the numbers that A sees which are 0 in a training step (PEFT's"
        " lora_dropout); its masks are the same at every layout; not set: 0, or path's",
    )
    loraplus_lr_ratio: float = Field(
        default=1.0,
        gt=0,
        description="LoRA+ (arXiv 2402.12354): B, and DoRA's norms, learn at this times A's rate;"
        " 16 there",
    )

    @field_validator("dropout")
    @classmethod
    def _of_a_new_one(cls, value: float | None, info: ValidationInfo) -> float | None:
        return value if info.data.get("path") is not None else value or 0.0

    @model_validator(mode="after")
    def _folder_says(self) -> Self:
        fields = type(self).model_fields
        given = [name for name in ("type", "rank", "alpha", "target")
                 if getattr(self, name) != fields[name].default]  # fmt: skip
        if self.path is not None and given:
            raise ValueError(
                f"adapter.path says what adapter.{given[0]} is; leave adapter.{given[0]} out"
            )
        return self


class CheckpointConfig(Section):
    """What is kept."""

    every: Count | None = Field(default=None, description="steps; the last step is always saved")
    keep: Count = Field(default=2, description="how many of the latest stay, besides the best")
    best: str | None = Field(
        default=None,
        description="held-out figure whose best checkpoint is kept: eval_loss,"
        " eval_rewards/accuracies (pairs), eval_reward/mean (reinforcement learning), ...",
    )
    export_hf: bool = Field(default=False, description="write <run_dir>/hf at the end")
    background: bool = Field(
        default=True,
        description="write while training goes on, from a copy in host memory; false: wait for it",
    )
    save_optimizer: bool = Field(
        default=True, description="false: small checkpoints, from which a run cannot resume"
    )


class ObserveConfig(Section):
    """Where the run can be watched."""

    tensorboard: bool = Field(default=True, description="write <run_dir>/tensorboard")
    wandb: dict[str, Any] | None = Field(default=None, description="arguments of wandb.init")
    progress: bool = Field(default=True, description="a progress bar on the first rank")


class Recipe(Section):
    """One run."""

    run_dir: Folder = Field(description="everything the run writes; one that exists is resumed")
    seed: int = Field(
        default=1234, ge=0, lt=2**32, description="of random weights and of the data's order"
    )
    model: ModelConfig
    parallel: ParallelConfig = ParallelConfig()
    method: Annotated[MethodConfig, BeforeValidator(_as_method)]
    data: DataConfig
    optim: OptimConfig = OptimConfig()
    train: TrainConfig
    router: RouterConfig = RouterConfig()
    adapter: AdapterConfig | None = Field(
        default=None, description="low-rank adapters, which alone are trained then"
    )
    trainable: list[str] | None = Field(
        default=None,
        min_length=1,
        description="patterns of the weights to train, e.g. [self_attn, layers.3]; default: all",
    )
    rollout: RolloutConfig | None = Field(
        default=None, description="who samples, for methods that learn from rollouts"
    )
    rewards: Rewards = Field(
        default_factory=list[Reward],
        description="what grades: names, FILE.py:FUNCTION, or {name, weight, options}",
    )
    teacher: TeacherConfig | None = Field(
        default=None, description="whom methods that distil learn from"
    )
    checkpoint: CheckpointConfig = CheckpointConfig()
    observe: ObserveConfig = ObserveConfig()
    cluster: ClusterConfig = ClusterConfig()
    megatron: Annotated[dict[str, Any], AfterValidator(passed_through)] = Field(
        default_factory=dict,
        description="TransformerConfig fields that say how a model is computed; those that would do"
        " nothing here are refused",
    )

    @property
    def sampling(self) -> tuple[OnlineMethod, RolloutConfig]:
        """The method and its rollouts, for a loop that samples."""
        assert isinstance(self.method, OnlineMethod) and self.rollout is not None
        return self.method, self.rollout

    @property
    def best_is_more(self) -> bool:
        """Whether checkpoint.best, where there is one, is better when it is more."""
        return figures(self.method, self.rewards).get(self.checkpoint.best or "", False)

    @model_validator(mode="after")
    def _best_is_measured(self) -> Self:
        if self.checkpoint.best is not None:
            replays = self.rollout is not None and self.rollout.replay is not None
            has_eval = bool(self.data.eval or self.data.eval_share) and not replays
            known = figures(self.method, self.rewards)
            check_best(self.checkpoint.best, self.method.name, known, has_eval=has_eval)
        return self

    @model_validator(mode="after")
    def _whole_passes(self) -> Self:
        train = self.train
        if not self.method.samples and train.global_batch % train.micro_batch:
            raise ValueError(
                f"train.global_batch={train.global_batch} is not a multiple of "
                f"train.micro_batch={train.micro_batch}"
            )
        return self

    @model_validator(mode="after")
    def _neighbours_apart(self) -> Self:
        # megatron-core 0.19.2 takes one neighbour's tensor for the other's, without a word.
        if self.parallel.pp == 2 and self.parallel.vpp and self.megatron.get("batch_p2p_comm"):
            raise ValueError(
                "megatron.batch_p2p_comm=true gives wrong gradients with parallel.vpp at"
                " parallel.pp=2, where both neighbours are one rank. Leave it out"
            )
        return self

    @model_validator(mode="after")
    def _demonstrated_or_not(self) -> Self:
        if self.method.demonstrated and not self.data.demonstrations:
            raise ValueError(f"method {self.method.name} needs data.demonstrations")
        if self.data.demonstrations and not self.method.demonstrated:
            raise ValueError(
                f"method {self.method.name} takes no data.demonstrations: chord does. Leave them"
                " out"
            )
        return self

    @model_validator(mode="after")
    def _taught_or_not(self) -> Self:
        environment = "single" if self.rollout is None else self.rollout.environment
        check_teacher(self.method, self.teacher, environment)
        return self

    @model_validator(mode="after")
    def _samples_or_not(self) -> Self:
        if not self.method.samples:
            return self
        if self.rollout is None:
            raise ValueError(f"method {self.method.name} learns from rollouts: give rollout")
        if self.method.needs_rewards and not self.rewards and self.rollout.replay is None:
            raise ValueError(f"method {self.method.name} needs rewards: [accuracy], for example")
        return self

    @model_validator(mode="after")
    def _learns_from_groups(self) -> Self:
        method, rollout = self.method, self.rollout
        if not isinstance(method, OnlineMethod) or rollout is None:
            return self
        weights = [reward.weight for reward in self.rewards]
        check_sampling(method.name, method, rollout, weights, self.train.epochs)
        # Frozen for users; what follows from another section is part of the recipe as it is read.
        object.__setattr__(
            self,
            "method",
            method.within(rollout.max_tokens, rollout.longest_answer(self.data.seq_len)),
        )
        return self

    @model_validator(mode="after")
    def _all_is_read(self, info: ValidationInfo) -> Self:
        unused = dict(unread(self))
        if info.context is not None:
            cast(dict[str, str], info.context).update(unused)
        elif unused:
            raise ValueError(leave_out(unused))
        return self
