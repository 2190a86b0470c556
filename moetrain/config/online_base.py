"""What methods that learn from rollouts share in a recipe. The methods are in
moetrain.config.online, what they compute in moetrain.methods.
"""

from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from moetrain.config.section import MethodSection

Count = Annotated[int, Field(ge=1)]
Mismatch = Literal["none", "tis", "mask", "sequence", "sequence_mask"]


def in_the_loss(value: object) -> object:
    """Refuse the estimator that does nothing there."""
    if value == "k1":
        raise ValueError(
            "k1 in the loss does nothing: its expected gradient is 0. Take k3 (the default) or k2"
        )
    return value


SOFT_LENGTH = (
    "tokens before max_length over which an answer's overlong penalty grows (DAPO, arXiv"
    " 2503.14476, eq. 13; ms-swift's soft_overlong); "
)


class OnlineMethod(MethodSection):
    """What all of them share."""

    learns_from = "prompts"
    samples: ClassVar[bool] = True
    about: ClassVar[tuple[str, ...]] = ("reward/mean", "length/mean", "kl", "groups/no_signal")
    beta: float = Field(
        default=0.0, ge=0, description="weight of the KL to the reference; 0: no reference is kept"
    )
    kl_budget: float | None = Field(
        default=None, gt=0, description="warn when `kl`, in nats an answer, passes it"
    )
    ref_model_sync_steps: Count | None = Field(
        default=None,
        description="steps after which the reference moves to the policy (TR-DPO, arXiv 2404.09656;"
        " TRL's sync_ref_model); default: it stays what the run starts from",
    )
    ref_model_mixup_alpha: float = Field(
        default=0.6, gt=0, le=1, description="how far it moves then; 1: it becomes the policy"
    )
    mismatch: Mismatch = Field(
        default="tis",
        description="weights for what sampler and trainer disagree on: tis truncates a token's"
        " ratio, mask leaves out tokens whose ratio is outside; sequence and sequence_mask do so"
        " with the product of an answer's ratios (TRL's token_truncate, token_mask,"
        " sequence_truncate, sequence_mask)",
    )
    mismatch_cap: float = Field(default=2.0, gt=1, description="where these ratios are cut")
    mismatch_floor: float | None = Field(
        default=None,
        ge=0,
        lt=1,
        description="and below; 0: nowhere; default: 1 / mismatch_cap for the masks, else 0 (TRL's"
        " clip_min)",
    )
    max_length: Count | None = Field(
        default=None,
        description="tokens at which an answer has the whole overlong penalty of 1; default:"
        " rollout.max_tokens, of all turns together where an environment replies",
    )
    soft_length: int | None = Field(default=0, ge=0, description=SOFT_LENGTH + "0: no penalty")
    inner_steps: Count = Field(
        default=1, description="optimizer steps that share out a batch of rollouts"
    )
    num_iterations: Count = Field(
        default=1,
        description="passes over a batch of rollouts, of inner_steps each; ratios stay those to the"
        " policy before the first (GRPO's mu; verl's ppo_epochs)",
    )
    entropy_coef: float = Field(
        default=0.0,
        ge=0,
        description="weight of the mean entropy of answers' tokens, which is taken off the loss"
        " (TRL's name; verl's entropy_coeff)",
    )
    top_entropy_quantile: float = Field(
        default=1.0,
        ge=0,
        le=1,
        description="share of a batch's tokens, those of most entropy before its first step, that"
        " the policy learns from (arXiv 2506.01939 advises 0.2)",
    )

    @property
    def compares(self) -> bool:
        """An answer with the others to the same prompt."""
        return True

    @property
    def corrects(self) -> bool:
        """Whether what older weights drew counts as the weights that learn would draw it."""
        return self.mismatch != "none"

    @property
    def bounds(self) -> tuple[float, float] | None:
        """Where ratios are cut, if they are; answers' tokens beyond are counted in the ledger."""
        return None

    @property
    def steps_of_batch(self) -> int:
        """Optimizer steps that a batch of rollouts is learned from in."""
        return self.inner_steps * self.num_iterations

    @property
    def floor(self) -> float:
        """Below which the ratios of `mismatch` are cut."""
        if self.mismatch_floor is not None:
            return self.mismatch_floor
        return 1 / self.mismatch_cap if self.mismatch.endswith("mask") else 0.0

    @property
    def kl_limit(self) -> float | None:
        """Nats an answer past which `kl` is warned of."""
        return self.kl_budget

    @property
    def rounds(self) -> int:
        """Of sampling for one step, at most."""
        return 1

    def soft_tokens(self, longest: int) -> int:
        """Over which the overlong penalty grows where the whole of it is at `longest`."""
        return self.soft_length or 0

    def within(self, max_tokens: int, most: int | None = None) -> Self:
        """The same with what follows from the longest answer that is sampled: of turns of
        `max_tokens`, `most` in all (None: one turn).
        """
        most = most or max_tokens
        turns = "" if most == max_tokens else f" and the turns of an answer, {most} tokens in all,"
        longest = self.max_length or most
        soft = self.soft_tokens(longest)
        if soft > longest:
            raise ValueError(
                f"method.soft_length={soft} is more than method.max_length={longest}: give less"
            )
        if soft and longest - soft >= most:
            raise ValueError(
                f"method.max_length={longest} with soft_length={soft} penalises answers of more"
                f" than {longest - soft} tokens, and rollout.max_tokens={max_tokens}{turns} lets"
                " none be so long: leave max_length out"
            )
        settings = {"max_length": longest if soft else self.max_length, "soft_length": soft}
        return self.model_copy(update=settings)

    def _idle(self) -> Iterator[tuple[str, bool, tuple[str, ...]]]:
        """(what is needed, whether it is missing, keys that do nothing then)."""
        yield "method.mismatch", self.mismatch == "none", ("mismatch_cap", "mismatch_floor")
        yield "method.soft_length", self.soft_length == 0, ("max_length",)
        reference = ("kl_budget", "kl_estimator", "use_bias_correction_kl", "kl_in_reward")
        syncs = ("ref_model_sync_steps", "ref_model_mixup_alpha")
        yield "method.beta", not self.beta, (*reference, *syncs)
        yield "method.ref_model_sync_steps", self.ref_model_sync_steps is None, syncs[1:]

    @model_validator(mode="after")
    def _does_something(self) -> Self:
        fields = type(self).model_fields
        for needed, missing, names in self._idle():
            given = [n for n in names if n in fields and getattr(self, n) != fields[n].default]
            if missing and given:
                raise ValueError(
                    f"method.{given[0]} does nothing without {needed}: give it, or leave"
                    f" {given[0]} out"
                )
        return self


class ClippedMethod(OnlineMethod):
    """Methods whose ratios are clipped as PPO's are."""

    clip_low: float = Field(
        default=0.2, gt=0, lt=1, description="ratios are clipped below 1 - this"
    )
    clip_high: float = Field(default=0.2, gt=0, description="ratios are clipped above 1 + this")
    delta: float | None = Field(
        default=None,
        gt=1,
        description="ratios of what is discouraged are cut here, where PPO's clip lets them be"
        " (dual clip, arXiv 1912.09729; TRL's name, verl's clip_ratio_c); at least 1 + clip_high;"
        " default: nowhere",
    )

    @property
    def bounds(self) -> tuple[float, float]:
        return 1 - self.clip_low, 1 + self.clip_high

    @model_validator(mode="after")
    def _cuts_above_the_clip(self) -> Self:
        if self.delta is not None and self.delta < 1 + self.clip_high:
            raise ValueError(
                f"method.delta={self.delta:g} is below 1 + method.clip_high={1 + self.clip_high:g},"
                " where ratios of what is encouraged are clipped: give more, or lower clip_high"
            )
        return self


Estimator = Literal["grpo", "rloo", "reinforce_plus_plus", "reinforce_plus_plus_baseline"]
ESTIMATOR = (
    "an answer's reward less: grpo the mean of its group, rloo the mean of the others in it,"
    " reinforce_plus_plus nothing, reinforce_plus_plus_baseline the mean of its group (verl's"
    " names)"
)
Scale = Literal["group", "batch", "none"]
SCALE = (
    "what advantages are divided by: the deviation of the rewards of the group, of the batch, or"
    " nothing (TRL's name); batch with reinforce_plus_plus: mean 0 and deviation 1 over the tokens"
    " of the batch"
)
Level = Literal["token", "sequence", "sequence_product"]
LEVEL = (
    "the ratio to the policy before the batch: of a token, the geometric mean over an answer, or"
    " the product over it"
)
IN_REWARD = (
    "the KL to the reference is taken off the reward, as k1: of the whole answer (TRL's RLOO); with"
    " reinforce_plus_plus of what follows a token; false: it is a term of the loss"
)
KL_A_TOKEN = "of the KL a token: half the log ratio's square, or r - 1 - log r"


class GroupMethod(OnlineMethod):
    """Methods without a value head: answers are judged by other answers. The KL to the reference is
    a term of the loss, or is taken off the reward.
    """

    advantage_estimator: Estimator = Field(default="grpo", description=ESTIMATOR)
    scale_rewards: Scale = Field(default="group", description=SCALE)
    importance_sampling_level: Level = Field(default="token", description=LEVEL)
    off_policy_mask_threshold: float | None = Field(
        default=None,
        gt=0,
        description="answers of negative advantage whose tokens the sampler found likelier than the"
        " policy does, by this many nats in the mean, are left out (DeepSeek-V3.2, eq. 9); default:"
        " none",
    )
    kl_in_reward: bool = Field(default=False, description=IN_REWARD)
    kl_estimator: Annotated[Literal["k2", "k3"], BeforeValidator(in_the_loss)] = Field(
        default="k3", description=KL_A_TOKEN
    )
    use_bias_correction_kl: bool = Field(
        default=True,
        description="with the ratio to the policy that sampled, so that its expected gradient is"
        " that of KL(policy || reference); false: without",
    )
    truncated: Literal["reward", "mask"] = Field(
        default="reward",
        description="answers that rollout.max_tokens cut: reward learns from them by their grade,"
        " mask leaves them out, after they have counted in their group",
    )
    dynamic_sampling: bool = Field(
        default=False,
        description="sample further prompts in place of groups of equal rewards (DAPO, eq. 11;"
        " ms-swift's dynamic_sample)",
    )
    max_rounds: Count = Field(
        default=8,
        description="of sampling for one step with dynamic_sampling; then groups of equal rewards"
        " fill it up (ms-swift's max_resample_times, verl's max_num_gen_batches)",
    )

    @property
    def compares(self) -> bool:
        """REINFORCE++ without a baseline can learn from one answer."""
        return self.advantage_estimator != "reinforce_plus_plus"

    @property
    def rounds(self) -> int:
        return self.max_rounds if self.dynamic_sampling else 1

    @property
    def by_token(self) -> bool:
        """Whether the tokens of an answer have advantages of their own, scaled over the batch's."""
        return self.advantage_estimator.startswith("reinforce")

    def _idle(self) -> Iterator[tuple[str, bool, tuple[str, ...]]]:
        yield from super()._idle()
        unread = ("kl_estimator", "use_bias_correction_kl")
        yield "method.kl_in_reward=false", self.kl_in_reward, unread
        yield "method.dynamic_sampling", not self.dynamic_sampling, ("max_rounds",)

    @model_validator(mode="after")
    def _has_a_scale(self) -> Self:
        if self.by_token and self.scale_rewards == "group":
            raise ValueError(
                f"method.scale_rewards=group: {self.advantage_estimator} is scaled over the batch."
                " Give scale_rewards=batch"
            )
        plain = self.scale_rewards == "none" and not (self.beta and self.kl_in_reward)
        if self.advantage_estimator == "reinforce_plus_plus_baseline" and plain:
            raise ValueError(
                "method.scale_rewards=none: reinforce_plus_plus_baseline is grpo then. Give"
                " scale_rewards=batch, or advantage_estimator=grpo"
            )
        return self
