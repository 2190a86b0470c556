"""The sections of methods that learn from rollouts. What they compute is in moetrain.methods."""

from typing import Annotated, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from moetrain.config.online_base import (
    ESTIMATOR,
    IN_REWARD,
    KL_A_TOKEN,
    LEVEL,
    SCALE,
    SOFT_LENGTH,
    ClippedMethod,
    Count,
    Estimator,
    GroupMethod,
    Level,
    Scale,
    in_the_loss,
)


def _in_the_reward(value: object) -> object:
    if value in ("k2", "k3"):
        raise ValueError(
            f"{value} in the reward leads elsewhere than the KL: its expected gradient is another."
            " Leave kl_estimator out: ppo takes k1 off each token's reward"
        )
    return value


class GrpoMethod(ClippedMethod, GroupMethod):
    """Group-relative policy optimisation."""

    name: Literal["grpo"] = Field(default="grpo", description="`method: grpo` for short")


class DrGrpoMethod(ClippedMethod, GroupMethod):
    """GRPO done right: no division by the group's deviation or by an answer's length."""

    name: Literal["dr_grpo"] = Field(default="dr_grpo", description="`method: dr_grpo` for short")
    scale_rewards: Scale = Field(default="none", description=SCALE)
    length: Count | None = Field(
        default=None,
        description="what all answers' sums are divided by; default: rollout.max_tokens, of all"
        " turns together where an environment replies",
    )

    def within(self, max_tokens: int, most: int | None = None) -> Self:
        """Divided by the longest answer."""
        settings = super().within(max_tokens, most)
        if settings.length:
            return settings
        return settings.model_copy(update={"length": most or max_tokens})


class DapoMethod(ClippedMethod, GroupMethod):
    """Decoupled clipping and dynamic sampling: token-level loss, overlong shaping."""

    name: Literal["dapo"] = Field(default="dapo", description="`method: dapo` for short")
    clip_high: float = Field(default=0.28, gt=0, description="ratios are clipped above 1 + this")
    dynamic_sampling: bool = Field(
        default=True, description="sample further prompts in place of groups of equal rewards"
    )
    soft_length: int | None = Field(
        default=None,
        ge=0,
        description=SOFT_LENGTH + "default: a fifth of max_length; 0: no penalty",
    )

    def soft_tokens(self, longest: int) -> int:
        """The paper's: 4,096 of 20,480."""
        return max(1, longest // 5) if self.soft_length is None else self.soft_length


class GspoMethod(ClippedMethod, GroupMethod):
    """Group sequence policy optimisation: one ratio an answer."""

    name: Literal["gspo"] = Field(default="gspo", description="`method: gspo` for short")
    importance_sampling_level: Level = Field(default="sequence", description=LEVEL)
    clip_low: float = Field(
        default=3e-4, gt=0, lt=1, description="ratios are clipped below 1 - this"
    )
    clip_high: float = Field(default=4e-4, gt=0, description="ratios are clipped above 1 + this")


class PpoMethod(ClippedMethod):
    """Proximal policy optimisation with a value head on the policy."""

    value_head: ClassVar[bool] = True
    name: Literal["ppo"] = Field(default="ppo", description="`method: ppo` for short")
    kl_estimator: Annotated[Literal["k1"], BeforeValidator(_in_the_reward)] = Field(
        default="k1", description="of the KL that is taken off each token's reward: the log ratio"
    )
    truncated: Literal["reward", "bootstrap", "mask"] = Field(
        default="reward",
        description="answers that rollout.max_tokens cut: reward takes their grade, bootstrap in"
        " its place the value head's word for what would have followed, mask leaves them out",
    )
    gamma: float = Field(default=1.0, gt=0, le=1, description="discount a token")
    lam: float = Field(default=0.95, ge=0, le=1, description="of generalised advantage estimation")
    whiten: bool = Field(
        default=True, description="advantages of a batch's tokens have mean 0 and deviation 1"
    )
    missing_eos_penalty: float = Field(
        default=0.0,
        ge=0,
        description="taken off the reward of answers that rollout.max_tokens cut, after reward_norm"
        " and reward_clip (TRL's and ms-swift's name)",
    )
    reward_norm: Literal["none", "scale", "standardise"] = Field(
        default="none",
        description="rewards divided by the deviation of all so far, or brought to mean 0 before"
        " (TRL's use_score_scaling, use_score_norm)",
    )
    reward_clip: float | None = Field(
        default=None,
        gt=0,
        description="rewards are cut at this and at minus this, after reward_norm (TRL's"
        " score_clip)",
    )
    kl_target: float | None = Field(
        default=None,
        gt=0,
        description="nats an answer to which beta is steered, batch by batch (arXiv 1909.08593;"
        " verl's target_kl); default: beta stays",
    )
    kl_horizon: Count = Field(
        default=10_000, description="answers over which beta moves by what kl is off by"
    )
    value_weight: float = Field(default=0.1, ge=0, description="of the value loss")
    value_clip: float = Field(
        default=0.2, gt=0, description="how far a value may move from the one at rollout"
    )

    @model_validator(mode="after")
    def _moves_something(self) -> Self:
        if self.kl_target is not None and not self.beta:
            raise ValueError(
                "method.kl_target does nothing without method.beta: give where the weight starts"
            )
        if self.kl_target is None and self.kl_horizon != 10_000:
            raise ValueError(
                "method.kl_horizon does nothing without method.kl_target: give it, or leave"
                " kl_horizon out"
            )
        if self.missing_eos_penalty and self.truncated != "reward":
            raise ValueError(
                f"method.missing_eos_penalty does nothing with truncated={self.truncated}: answers"
                " that were cut have no reward then. Leave one of them out"
            )
        return self

    @property
    def compares(self) -> bool:
        """The value head is the baseline."""
        return False


class CispoMethod(GroupMethod):
    """Clipped importance sampling policy optimisation: the ratio is a weight without a gradient, so
    that no token is left out.
    """

    name: Literal["cispo"] = Field(default="cispo", description="`method: cispo` for short")
    clip_low: float = Field(
        default=1.0, gt=0, le=1, description="weights are raised to 1 - this; 1: none is"
    )
    clip_high: float = Field(
        default=4.0,
        gt=-1,
        description="weights are cut at 1 + this (arXiv 2510.13786 advises 5; TRL and ms-swift call"
        " epsilon_high what is 1 + this)",
    )

    @property
    def bounds(self) -> tuple[float, float]:
        """Of the weights."""
        return 1 - self.clip_low, 1 + self.clip_high

    @model_validator(mode="after")
    def _leaves_room(self) -> Self:
        if self.clip_high <= -self.clip_low:
            raise ValueError(
                f"method.clip_high={self.clip_high:g} is not above"
                f" -method.clip_low={-self.clip_low:g}: give more"
            )
        return self


class SapoMethod(GroupMethod):
    """Soft adaptive policy optimisation: a gate that closes slowly stands in for the clip."""

    name: Literal["sapo"] = Field(default="sapo", description="`method: sapo` for short")
    tau_pos: float = Field(
        default=1.0,
        gt=0,
        description="how soon the gate closes on tokens of positive advantage (TRL's"
        " sapo_temperature_pos)",
    )
    tau_neg: float = Field(
        default=1.05, gt=0, description="the same for the others (sapo_temperature_neg)"
    )


class RlooMethod(ClippedMethod, GroupMethod):
    """REINFORCE with the other answers' mean as the baseline; an answer is one action."""

    name: Literal["rloo"] = Field(default="rloo", description="`method: rloo` for short")
    beta: float = Field(
        default=0.05, ge=0, description="weight of the KL to the reference; 0: no reference is kept"
    )
    advantage_estimator: Estimator = Field(default="rloo", description=ESTIMATOR)
    scale_rewards: Scale = Field(default="none", description=SCALE)
    importance_sampling_level: Level = Field(default="sequence_product", description=LEVEL)
    kl_in_reward: bool = Field(default=True, description=IN_REWARD)


class ReinforceMethod(ClippedMethod, GroupMethod):
    """REINFORCE++: PPO's clip without a value head, rewards whole and scaled over the batch."""

    name: Literal["reinforce_pp"] = Field(
        default="reinforce_pp", description="`method: reinforce_pp` for short"
    )
    beta: float = Field(
        default=0.01, ge=0, description="weight of the KL to the reference; 0: no reference is kept"
    )
    advantage_estimator: Estimator = Field(default="reinforce_plus_plus", description=ESTIMATOR)
    scale_rewards: Scale = Field(default="batch", description=SCALE)
    kl_in_reward: bool = Field(default=True, description=IN_REWARD)


class ReinforceBaselineMethod(ClippedMethod, GroupMethod):
    """REINFORCE++ with the group's mean as the baseline and the KL, as k2, in the loss."""

    name: Literal["reinforce_pp_baseline"] = Field(
        default="reinforce_pp_baseline", description="`method: reinforce_pp_baseline` for short"
    )
    advantage_estimator: Estimator = Field(
        default="reinforce_plus_plus_baseline", description=ESTIMATOR
    )
    scale_rewards: Scale = Field(default="batch", description=SCALE)
    kl_estimator: Annotated[Literal["k2", "k3"], BeforeValidator(in_the_loss)] = Field(
        default="k2", description=KL_A_TOKEN
    )


class ChordMethod(ClippedMethod, GroupMethod):
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
