"""What a user writes: one recipe, frozen. Imports no torch.

Unknown keys are refused by `moetrain.config.load`, which names the nearest right one.
"""

import os
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


def _as_method(value: object) -> object:
    return {"name": value} if isinstance(value, str) else value


def _expand_home(value: str) -> str:
    return os.path.expanduser(value)  # in YAML and after `key=` no shell does it


Location = Annotated[str, AfterValidator(_expand_home)]
Folder = Annotated[Path, AfterValidator(lambda path: Path(_expand_home(str(path))))]
Paths = Annotated[list[Location], BeforeValidator(_as_list)]
Count = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


class Section(BaseModel):
    """A part of a recipe."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False
    )


class ModelConfig(Section):
    """Which model, and in what precision."""

    path: Location | None = Field(
        default=None, description="Hugging Face folder, Megatron checkpoint folder, or builtin:NAME"
    )
    hf: dict[str, Any] | None = Field(
        default=None, description="a config.json's content, for training from scratch"
    )
    tokenizer: Location | None = Field(
        default=None, description="tokenizer folder or builtin:NAME; the model's own by default"
    )
    dtype: Literal["fp32", "bf16"] = "bf16"
    backend: Literal["auto", "torch", "te"] = "auto"
    init: Literal["load", "random"] | None = Field(
        default=None,
        description="load for a path, random for hf; random with a path takes its config only",
    )
    init_std: float = Field(default=0.02, gt=0)

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
    first_stage_layers: Count | None = None
    last_stage_layers: Count | None = None

    @field_validator("sp")
    @classmethod
    def _follows_tp(cls, value: bool | None, info: ValidationInfo) -> bool:
        return info.data.get("tp", 1) > 1 if value is None else value

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.vpp or 1) > 1 and self.pp == 1:
            raise ValueError(
                f"parallel.vpp={self.vpp} needs parallel.pp > 1; set pp or leave vpp out"
            )
        if self.sp and self.tp == 1:
            raise ValueError("parallel.sp=true needs parallel.tp > 1; leave sp out")
        return self


class PretrainMethod(Section):
    """Next-token prediction on an indexed corpus."""

    name: Literal["pretrain"] = "pretrain"


class CptMethod(Section):
    """Continued pretraining: `pretrain` from given weights."""

    name: Literal["cpt"] = "cpt"


class SftMethod(Section):
    """Supervised fine-tuning on the assistant's turns."""

    name: Literal["sft"] = "sft"


MethodConfig = Annotated[PretrainMethod | CptMethod | SftMethod, Field(discriminator="name")]


class DataConfig(Section):
    """What to train and evaluate on."""

    train: Paths = Field(
        min_length=1,
        description="path or list; index prefixes for pretrain and cpt; builtin:NAME too",
    )
    weights: list[float] | None = Field(
        default=None, description="blend weights of data.train, for pretrain and cpt"
    )
    eval: Paths = Field(default_factory=list)
    seq_len: Count = 4096
    too_long: Literal["truncate", "reject"] = "truncate"
    max_rejected: Fraction = Field(
        default=0.05, description="stop when a larger share of records is unusable"
    )
    pack: bool = True
    cache: Folder | None = Field(
        default=None, description="default: MOETRAIN_CACHE, else ~/.cache/moetrain"
    )
    shuffle: bool = True
    chat_template: str | None = Field(
        default=None, description="a template file to use in place of the tokenizer's"
    )
    num_workers: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _weight_each(self) -> Self:
        if self.weights is not None and len(self.weights) != len(self.train):
            raise ValueError(
                f"data.weights has {len(self.weights)} numbers for {len(self.train)} data.train "
                f"paths"
            )
        return self


class OptimConfig(Section):
    """AdamW and its schedule."""

    name: Literal["adamw"] = "adamw"
    lr: float = Field(default=1e-4, ge=0)
    min_lr: float = Field(default=0.0, ge=0)
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    warmup: int = Field(default=0, ge=0, description="steps")
    decay_steps: Count | None = None
    wsd_decay: Literal["linear", "cosine", "exponential"] = "linear"
    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.95, ge=0, lt=1)
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.1, ge=0)
    clip_grad: float = Field(
        default=1.0, ge=0, description="largest gradient norm; 0 turns clipping off"
    )
    offload: Fraction = Field(
        default=0.0, description="share of the optimizer's state kept on the host (GPU)"
    )
    state_dtype: Literal["fp32", "bf16", "fp8"] = "fp32"
    grad_dtype: Literal["fp32", "bf16"] = "fp32"


class TrainConfig(Section):
    """How long and in what pieces."""

    steps: Count | None = None
    epochs: float | None = Field(default=None, gt=0)
    global_batch: Count = Field(
        default=8, description="packs of data.seq_len tokens per optimizer step, over all ranks"
    )
    micro_batch: Count = Field(default=1, description="packs put together in one forward pass")
    eval_every: Count | None = None
    eval_packs: Count | None = None
    deterministic: bool = False
    recompute: Literal["none", "selective", "full"] = "none"
    overlap: bool = Field(
        default=True, description="overlap gradient and parameter traffic with computation (GPU)"
    )

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give exactly one of train.steps and train.epochs")
        if self.global_batch % self.micro_batch:
            raise ValueError(
                f"train.global_batch={self.global_batch} is not a multiple of "
                f"train.micro_batch={self.micro_batch}"
            )
        return self


class RouterConfig(Section):
    """Losses that keep a mixture of experts in balance, taken over sequences."""

    aux_loss: float = Field(default=0.0, ge=0)
    z_loss: float = Field(default=0.0, ge=0)
    freeze: bool = False


class CheckpointConfig(Section):
    """What is kept."""

    every: Count | None = Field(default=None, description="steps; the last step is always saved")
    keep: Count = 2
    best: str | None = Field(
        default=None, description="held-out metric whose lowest checkpoint is kept, e.g. eval_loss"
    )
    export_hf: bool = Field(default=False, description="write <run_dir>/hf at the end")
    save_optimizer: bool = True


class ObserveConfig(Section):
    """Where the run can be watched."""

    tensorboard: bool = True
    wandb: dict[str, Any] | None = Field(default=None, description="arguments of wandb.init")
    progress: bool = True


class ClusterConfig(Section):
    """The machines the run is meant for; the dry run counts with them."""

    gpu: str = "H100-80GB"
    gpus_per_node: Count = 8
    nodes: Count | None = None
    world_size: Count | None = None


class Recipe(Section):
    """One run."""

    run_dir: Folder
    seed: int = 1234
    model: ModelConfig
    parallel: ParallelConfig = ParallelConfig()
    method: Annotated[MethodConfig, BeforeValidator(_as_method)]
    data: DataConfig
    optim: OptimConfig = OptimConfig()
    train: TrainConfig
    router: RouterConfig = RouterConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    observe: ObserveConfig = ObserveConfig()
    cluster: ClusterConfig = ClusterConfig()
    megatron: dict[str, Any] = Field(
        default_factory=dict, description="TransformerConfig fields moetrain does not own"
    )
