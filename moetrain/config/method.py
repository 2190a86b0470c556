"""The training methods' sections of a recipe: a union told apart by `name`. What they compute is in
moetrain.methods, on a page each.
"""

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal, Self, get_args

from pydantic import BeforeValidator, Field, model_validator

from moetrain.config.distill import DistillMethod, GkdMethod, OnPolicyDistillMethod
from moetrain.config.online import (
    ChordMethod,
    CispoMethod,
    DapoMethod,
    DrGrpoMethod,
    GrpoMethod,
    GspoMethod,
    PpoMethod,
    ReinforceBaselineMethod,
    ReinforceMethod,
    RlooMethod,
    SapoMethod,
)
from moetrain.config.section import Location, MethodSection, as_list

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


PairLoss = Literal[
    "sigmoid",
    "sigmoid_norm",
    "hinge",
    "ipo",
    "robust",
    "exo_pair",
    "nca_pair",
    "bco_pair",
    "sppo_hard",
    "apo_zero",
    "apo_down",
    "discopop",
    "sft",
]
SMOOTHED: frozenset[PairLoss] = frozenset({"sigmoid", "robust", "exo_pair"})


def _pair_losses(value: object) -> object:
    names = as_list(value)
    for name in ("aot", "aot_unpaired"):
        if isinstance(names, list) and name in names:
            raise ValueError(
                f"{name} sorts the log-ratios of a batch, so that what a pair costs would depend on"
                " how batches are cut. Take sigmoid, or exo_pair, which compares two distributions"
            )
    return names  # pyright: ignore[reportUnknownVariableType]


class DpoMethod(ReferencedMethod):
    """Direct preference optimisation, with any loss of the pair's log-ratios, or several."""

    name: Literal["dpo"] = Field(default="dpo", description="`method: dpo` for short")
    loss_type: Annotated[list[PairLoss], BeforeValidator(_pair_losses), Field(min_length=1)] = (
        Field(
            default=["sigmoid"],
            description="what is minimised, a name or a list (TRL's and ms-swift's names;"
            " methods.md has the formulas); sft is the chosen answers' negative log-likelihood a"
            " token",
        )
    )
    loss_weights: list[Annotated[float, Field(gt=0)]] | None = Field(
        default=None,
        description="of each loss_type (MPO: [0.8, 0.2, 1.0] of [sigmoid, bco_pair, sft]);"
        " default: 1 each",
    )
    label_smoothing: float = Field(
        default=0.0,
        ge=0,
        lt=0.5,
        description="share of labels that are thought to be wrong: of sigmoid, robust, exo_pair",
    )
    rpo_alpha: float = Field(
        default=0.0, ge=0, description="weight of the chosen answers' negative log-likelihood"
    )
    reward_shift: Literal["running", "none"] = Field(
        default="running",
        description="what bco_pair takes off rewards: their mean over the steps before (the paper,"
        " ms-swift), or nothing (TRL 1.16)",
    )
    discopop_tau: float = Field(default=0.05, gt=0, description="temperature of discopop's blend")
    ld_alpha: float | None = Field(
        default=None,
        ge=0,
        lt=1,
        description="weight of the tokens of the longer answer past the shorter one's length"
        " (LD-DPO); default: as all others",
    )
    use_weighting: bool = Field(
        default=False,
        description="pairs weigh what the policy itself would say of both answers (WPO); the"
        " likelihood of sft and rpo_alpha is not weighted",
    )

    @property
    def weights(self) -> dict[PairLoss, float]:
        """Of each loss."""
        given = self.loss_weights or [1.0] * len(self.loss_type)
        return dict(zip(self.loss_type, given, strict=True))

    @property
    def nll_weight(self) -> float:
        """Of the chosen answers' negative log-likelihood."""
        return self.rpo_alpha + self.weights.get("sft", 0.0)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        names = self.loss_type
        if len({*names}) < len(names):
            raise ValueError(f"method.loss_type={names} has a loss twice: give each once")
        if self.loss_weights is not None and len(self.loss_weights) != len(names):
            raise ValueError(
                f"method.loss_weights={self.loss_weights} are {len(self.loss_weights)} numbers for"
                f" the {len(names)} of loss_type={names}: give one for each"
            )
        if names == ["sft"]:
            raise ValueError(
                "method.loss_type=sft alone prefers nothing: add a loss of pairs to it, or take"
                " method sft on the chosen answers"
            )
        if "sft" in names and self.rpo_alpha:
            raise ValueError(
                "method.rpo_alpha is the weight of what loss_type sft is: give that one's in"
                " loss_weights, and leave rpo_alpha out"
            )
        self._has_what_it_needs(names)
        return self

    def _has_what_it_needs(self, names: list[PairLoss]) -> None:
        if self.label_smoothing and not SMOOTHED & {*names}:
            raise ValueError(
                f"method.label_smoothing does nothing with loss_type {', '.join(names)}: leave it"
                f" out, or take one of {', '.join(sorted(SMOOTHED))}"
            )
        for name in ("exo_pair", "robust"):
            if name in names and not self.label_smoothing:
                raise ValueError(
                    f"method.loss_type {name} needs a label_smoothing above 0: the papers have"
                    " 0.001 for exo_pair and 0.1 for robust"
                )
        only: dict[str, PairLoss] = {"reward_shift": "bco_pair", "discopop_tau": "discopop"}
        for key, name in only.items():
            if name not in names and getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(
                    f"method.{key} does nothing without loss_type {name}: leave it out, or add that"
                )


class IpoMethod(ReferencedMethod):
    """Identity preference optimisation: a squared loss on log-probs per token."""

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
    loss_type: Literal["kto", "apo_zero_unpaired"] = Field(
        default="kto",
        description="apo_zero_unpaired: good answers up and bad ones down from the reference, with"
        " no reference point between them (APO)",
    )
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
    | CispoMethod
    | SapoMethod
    | RlooMethod
    | ReinforceMethod
    | ReinforceBaselineMethod
    | PpoMethod
    | ChordMethod
    | DistillMethod
    | OnPolicyDistillMethod
    | GkdMethod,
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
