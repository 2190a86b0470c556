"""The training methods' sections of a recipe: a union told apart by `name`. What they compute is in
moetrain.methods, on a page each.
"""

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal, get_args

from pydantic import Field

from moetrain.config.online import (
    ChordMethod,
    DapoMethod,
    DrGrpoMethod,
    GrpoMethod,
    GspoMethod,
    PpoMethod,
)
from moetrain.config.section import Location, MethodSection

# Of weighted fine-tuning, of answers with labels or in pairs, and of pairs.
WEIGHTED = {"eval_loss": False, "eval_token_prob": True}
GRADED = {"eval_loss": False, "eval_rewards/accuracies": True, "eval_logps/chosen": True}
PAIRED = GRADED | {"eval_rewards/margins": True}
PREFERS = ("rewards/accuracies", "rewards/margins", "loss")


class PretrainMethod(MethodSection):
    """Next-token prediction on an indexed corpus."""

    learns_from = "corpus"
    name: Literal["pretrain"] = Field(
        default="pretrain", description="`method: pretrain` for short"
    )


class CptMethod(MethodSection):
    """Continued pretraining: `pretrain` from given weights."""

    learns_from = "corpus"
    name: Literal["cpt"] = Field(default="cpt", description="`method: cpt` for short")


class SftMethod(MethodSection):
    """Supervised fine-tuning on the assistant's turns."""

    learns_from = "chat"
    name: Literal["sft"] = Field(default="sft", description="`method: sft` for short")


class DftMethod(MethodSection):
    """Dynamic fine-tuning: a token's loss weighted by its own probability."""

    learns_from = "chat"
    judged_by: ClassVar[Mapping[str, bool]] = WEIGHTED
    about: ClassVar[tuple[str, ...]] = ("token_prob", "loss")
    name: Literal["dft"] = Field(default="dft", description="`method: dft` for short")


class ChordSftMethod(MethodSection):
    """CHORD's supervised loss: a token weighted by p (1 - p)."""

    learns_from = "chat"
    judged_by: ClassVar[Mapping[str, bool]] = WEIGHTED
    about: ClassVar[tuple[str, ...]] = ("token_prob", "loss")
    name: Literal["chord_sft"] = Field(
        default="chord_sft", description="`method: chord_sft` for short"
    )


class ReferencedMethod(MethodSection):
    """What methods with a reference share; all but kto learn from pairs."""

    learns_from = "pairs"
    judged_by: ClassVar[Mapping[str, bool]] = PAIRED
    about: ClassVar[tuple[str, ...]] = (*PREFERS, "kl")
    beta: float = Field(
        default=0.1, gt=0, description="strength of the penalty for drifting from the reference"
    )
    reference: Location = Field(
        default="start",
        description="start: the model as the run starts, adapter.path included; base: without it;"
        " or another model's folder",
    )
    kl_budget: float | None = Field(
        default=None, gt=0, description="warn when `kl`, in nats an answer, passes it"
    )

    @property
    def kl_limit(self) -> float | None:
        return self.kl_budget


class DpoMethod(ReferencedMethod):
    """Direct preference optimisation with a sigmoid."""

    name: Literal["dpo"] = Field(default="dpo", description="`method: dpo` for short")
    label_smoothing: float = Field(
        default=0.0, ge=0, lt=0.5, description="share of labels that are thought to be wrong"
    )
    rpo_alpha: float = Field(
        default=0.0, ge=0, description="weight of the chosen answers' negative log-likelihood"
    )


class IpoMethod(ReferencedMethod):
    """Identity preference optimisation: a squared loss on log-probs a token."""

    name: Literal["ipo"] = Field(default="ipo", description="`method: ipo` for short")


class HingeMethod(ReferencedMethod):
    """Preference optimisation with a hinge (SLiC)."""

    name: Literal["hinge"] = Field(default="hinge", description="`method: hinge` for short")


class RobustMethod(ReferencedMethod):
    """DPO with labels of which a known share is flipped (rDPO)."""

    name: Literal["robust"] = Field(default="robust", description="`method: robust` for short")
    label_smoothing: float = Field(
        default=0.1, ge=0, lt=0.5, description="share of labels that are flipped"
    )


class KtoMethod(ReferencedMethod):
    """Kahneman-Tversky optimisation, on single answers with a label."""

    learns_from = "labels"
    judged_by: ClassVar[Mapping[str, bool]] = GRADED
    about: ClassVar[tuple[str, ...]] = ("rewards/accuracies", "loss", "kl")  # no pair, no margin
    name: Literal["kto"] = Field(default="kto", description="`method: kto` for short")
    desirable_weight: float = Field(default=1.0, ge=0, description="of good answers")
    undesirable_weight: float = Field(default=1.0, ge=0, description="of bad answers")


class OrpoMethod(MethodSection):
    """Odds-ratio preference optimisation, without a reference."""

    learns_from = "pairs"
    judged_by: ClassVar[Mapping[str, bool]] = PAIRED
    about: ClassVar[tuple[str, ...]] = PREFERS
    name: Literal["orpo"] = Field(default="orpo", description="`method: orpo` for short")
    beta: float = Field(default=0.1, gt=0, description="weight of the odds ratio")


class SimpoMethod(MethodSection):
    """Simple preference optimisation, without a reference."""

    learns_from = "pairs"
    judged_by: ClassVar[Mapping[str, bool]] = PAIRED
    about: ClassVar[tuple[str, ...]] = PREFERS
    name: Literal["simpo"] = Field(default="simpo", description="`method: simpo` for short")
    beta: float = Field(default=2.0, gt=0, description="scale of the mean log-probs")
    gamma: float = Field(
        default=1.0,
        ge=0,
        description="margin of the rewards to reach, gamma itself, not gamma / beta",
    )


class RewardMethod(MethodSection):
    """A Bradley-Terry reward model: a scalar head in place of the vocabulary."""

    learns_from = "pairs"
    scalar_head: ClassVar[bool] = True
    judged_by: ClassVar[Mapping[str, bool]] = {
        name: more for name, more in PAIRED.items() if name != "eval_logps/chosen"
    }
    about: ClassVar[tuple[str, ...]] = PREFERS
    name: Literal["reward"] = Field(default="reward", description="`method: reward` for short")
    center_rewards: float = Field(
        default=0.0, ge=0, description="weight of the square of a pair's summed rewards"
    )


MethodConfig = Annotated[
    PretrainMethod
    | CptMethod
    | SftMethod
    | DftMethod
    | ChordSftMethod
    | DpoMethod
    | IpoMethod
    | HingeMethod
    | RobustMethod
    | KtoMethod
    | OrpoMethod
    | SimpoMethod
    | RewardMethod
    | GrpoMethod
    | DrGrpoMethod
    | DapoMethod
    | GspoMethod
    | PpoMethod
    | ChordMethod,
    Field(discriminator="name"),
]

SECTIONS: dict[str, type[MethodSection]] = {
    section.model_fields["name"].default: section for section in get_args(get_args(MethodConfig)[0])
}
"""Of each method, by its name."""


def about(method: str) -> tuple[str, ...]:
    """The figures that a method is about, the first of all first; the loss for a name that no
    method here has.
    """
    return SECTIONS.get(method, MethodSection).about
