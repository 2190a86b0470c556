"""The sections of methods that learn from rollouts. What they compute is in moetrain.methods."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from moetrain.config.section import MethodSection

Count = Annotated[int, Field(ge=1)]


class OnlineMethod(MethodSection):
    """What all of them share."""

    samples: ClassVar[bool] = True
    beta: float = Field(
        default=0.0, ge=0, description="weight of the KL to the reference; 0: no reference is kept"
    )
    kl_estimator: Literal["k1", "k2", "k3"] = Field(
        default="k3", description="of the KL a token: log ratio, half its square, or r - 1 - log r"
    )
    kl_budget: float | None = Field(
        default=None, gt=0, description="warn when `kl`, in nats an answer, passes it"
    )
    clip_low: float = Field(
        default=0.2, gt=0, lt=1, description="ratios are clipped below 1 - this"
    )
    clip_high: float = Field(default=0.2, gt=0, description="ratios are clipped above 1 + this")
    mismatch: Literal["none", "tis", "mask", "sequence"] = Field(
        default="tis",
        description="weights for what sampler and trainer disagree on: tis truncates a token's"
        " ratio, mask leaves out tokens whose ratio is outside, sequence truncates an answer's",
    )
    mismatch_cap: float = Field(
        default=2.0, gt=1, description="where these ratios are cut (mask: also at 1 / this)"
    )
    inner_steps: Count = Field(
        default=1, description="optimizer steps that share out a batch of rollouts"
    )

    @property
    def kl_limit(self) -> float | None:
        """Nats an answer past which `kl` is warned of."""
        return self.kl_budget


class GrpoMethod(OnlineMethod):
    """Group-relative policy optimisation."""

    name: Literal["grpo"] = Field(default="grpo", description="`method: grpo` for short")


class DrGrpoMethod(OnlineMethod):
    """GRPO done right: no division by the group's deviation or by an answer's length."""

    name: Literal["dr_grpo"] = Field(default="dr_grpo", description="`method: dr_grpo` for short")
    length: Count = Field(
        default=512, description="what all answers' sums are divided by: rollout.max_tokens"
    )


class DapoMethod(OnlineMethod):
    """Decoupled clipping and dynamic sampling: token-level loss, overlong shaping."""

    name: Literal["dapo"] = Field(default="dapo", description="`method: dapo` for short")
    clip_high: float = Field(default=0.28, gt=0, description="ratios are clipped above 1 + this")
    dynamic_sampling: bool = Field(
        default=True, description="sample further prompts in place of groups of equal rewards"
    )
    max_length: Count | None = Field(
        default=None, description="tokens at which an answer has the whole penalty; default: none"
    )
    soft_length: Count = Field(
        default=128, description="tokens before max_length over which the penalty grows to 1"
    )


class GspoMethod(OnlineMethod):
    """Group sequence policy optimisation: one ratio an answer."""

    name: Literal["gspo"] = Field(default="gspo", description="`method: gspo` for short")
    clip_low: float = Field(
        default=3e-4, gt=0, lt=1, description="ratios are clipped below 1 - this"
    )
    clip_high: float = Field(default=4e-4, gt=0, description="ratios are clipped above 1 + this")


class PpoMethod(OnlineMethod):
    """Proximal policy optimisation with a value head on the policy."""

    value_head: ClassVar[bool] = True
    name: Literal["ppo"] = Field(default="ppo", description="`method: ppo` for short")
    gamma: float = Field(default=1.0, gt=0, le=1, description="discount a token")
    lam: float = Field(default=0.95, ge=0, le=1, description="of generalised advantage estimation")
    whiten: bool = Field(
        default=True, description="advantages of a batch's tokens have mean 0 and deviation 1"
    )
    value_weight: float = Field(default=0.1, ge=0, description="of the value loss")
    value_clip: float = Field(
        default=0.2, gt=0, description="how far a value may move from the one at rollout"
    )


class ChordMethod(OnlineMethod):
    """GRPO and weighted fine-tuning on demonstrations in one loss, mu deciding between them."""

    demonstrated: ClassVar[bool] = True
    name: Literal["chord"] = Field(default="chord", description="`method: chord` for short")
    mu_peak: float = Field(
        default=0.9, ge=0, le=1, description="weight of data.demonstrations after the warm-up"
    )
    mu_valley: float = Field(default=0.05, ge=0, le=1, description="their weight in the end")
    mu_warmup: int = Field(default=0, ge=0, description="steps over which mu rises from 0")
    mu_decay: Count = Field(
        default=200, description="steps over which mu falls to mu_valley, along a cosine"
    )
    phi: bool = Field(
        default=True, description="a demonstration's token weighs p (1 - p); false: all the same"
    )
    packs: Count = Field(
        default=4,
        description="of demonstrations (data.seq_len tokens) an optimizer step, over all ranks",
    )
