"""The sections of methods that learn from a teacher, and the `teacher` section. What they compute
is in moetrain.methods.
"""

from collections.abc import Iterator, Mapping
from typing import Annotated, ClassVar, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from moetrain.config.online_base import (
    ClippedMethod,
    Count,
    Estimator,
    GroupMethod,
    Mismatch,
    OnlineMethod,
    Scale,
)
from moetrain.config.section import Location, MethodSection, Paths, Section

START = "start"
TOP_K = (
    "the teacher's likeliest tokens at each place, whose probabilities are compared one by one; all"
    " others count as one token"
)
INTERPOLATION = (
    "between KL(teacher || student) at 0, which covers all that the teacher says, and KL(student ||"
    " teacher) at 1, which keeps to what it is likely to say; between them the generalised"
    " Jensen-Shannon divergence (GKD, arXiv 2306.13649, eq. 1; TRL's beta)"
)
Share = Annotated[float, Field(ge=0, le=1)]


def _url(value: list[str]) -> list[str]:
    for one in value:
        if not one.startswith(("http://", "https://")):
            raise ValueError(f"teacher.address: {one!r} does not begin with http:// or https://")
    return value


def _of_groups(value: object) -> object:
    if isinstance(value, str) and value.startswith("reinforce"):
        raise ValueError(
            f"{value} brings the advantages of a batch's tokens to one scale, the teacher's among"
            " them. Take grpo or rloo"
        )
    return value


def _no_ratio(value: object) -> object:
    if value != "none":
        raise ValueError("gkd has no ratios to correct. Leave mismatch out")
    return value


class TeacherConfig(Section):
    """Whose log-probs are learned from, for methods that distil. It has the student's tokenizer."""

    path: Location | None = Field(
        default=None,
        description="a model's folder, which is loaded beside the student at the same layout; or"
        " start: the model as the run starts, as a teacher that is told more (teacher.system)",
    )
    address: Annotated[Paths, AfterValidator(_url)] = Field(
        default=[],
        description="OpenAI-compatible servers of vLLM, such as http://HOST:8000/v1, among which"
        " answers are dealt",
    )
    system: str | None = Field(
        default=None,
        min_length=1,
        description="a system message that the teacher alone is told before the prompt, {COLUMN}"
        " standing for what the record has there: a worked solution, say. With path: start the"
        " student learns to do without it (self-distillation)",
    )
    model: str | None = Field(
        default=None, description="the name that they serve it under; default: the first they list"
    )
    key_env: str = Field(
        default="TEACHER_API_KEY", description="environment variable that holds their key, if any"
    )
    concurrency: Count = Field(default=32, description="answers that a server is asked at a time")
    seconds: float = Field(default=300.0, gt=0, description="that one answer may take to be scored")

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.path is None) == (not self.address):
            raise ValueError("give exactly one of teacher.path and teacher.address")
        given = [n for n in ("model", "key_env", "concurrency", "seconds")
                 if getattr(self, n) != type(self).model_fields[n].default]  # fmt: skip
        if self.path is not None and given:
            raise ValueError(
                f"teacher.{given[0]} does nothing with teacher.path: it is about servers. Leave it"
                " out"
            )
        if self.path == START and self.system is None:
            raise ValueError(
                "teacher.path=start teaches nothing by itself: the student is that model. Give"
                " teacher.system, or another model's folder"
            )
        return self


class DistillMethod(MethodSection):
    """Distillation offline: the teacher's distributions over given answers."""

    learns_from = "chat"
    taught: ClassVar[bool] = True
    judged_by: ClassVar[Mapping[str, bool]] = {"eval_loss": False, "eval_kl/teacher": False}
    about: ClassVar[tuple[str, ...]] = ("kl/teacher", "loss")
    name: Literal["distill"] = Field(default="distill", description="`method: distill` for short")
    top_k: Count = Field(default=16, description=TOP_K)
    interpolation: Share = Field(default=0.0, description=INTERPOLATION)
    answer_weight: Share = Field(
        default=0.0,
        description="share of the loss that is fine-tuning on the answers' own tokens; the rest is"
        " the divergence",
    )

    @property
    def teacher_tokens(self) -> int:
        """As many as are kept."""
        return self.top_k


class OnPolicyDistillMethod(ClippedMethod, GroupMethod):
    """On-policy distillation: the student answers, and each of its tokens is worth what the teacher
    finds it likelier than the student did.
    """

    taught: ClassVar[bool] = True
    about: ClassVar[tuple[str, ...]] = ("reward/mean", "kl/teacher", "length/mean")
    name: Literal["on_policy_distill"] = Field(
        default="on_policy_distill", description="`method: on_policy_distill` for short"
    )
    discount: Share = Field(
        default=0.0,
        description="how much what follows a token counts for it, token by token; 0: its own"
        " log-ratio alone, 1: those of the whole rest of the answer (MiniLLM, arXiv 2306.08543,"
        " eq. 5)",
    )
    reward_weight: float = Field(
        default=0.0,
        ge=0,
        description="weight of the rewards' advantages beside the teacher's; 0: rewards, where"
        " there are any, are told and not learned from",
    )
    advantage_estimator: Annotated[Estimator, BeforeValidator(_of_groups)] = Field(
        default="grpo",
        description="an answer's reward less: grpo the mean of its group, rloo the mean of the"
        " others in it",
    )
    scale_rewards: Scale = Field(
        default="none",
        description="what the rewards' advantages are divided by: the deviation of the group, of"
        " the batch, or nothing",
    )

    @property
    def compares(self) -> bool:
        """Where rewards are learned from."""
        return self.reward_weight > 0

    @property
    def needs_rewards(self) -> bool:
        """The teacher can do without."""
        return self.reward_weight > 0

    def _idle(self) -> Iterator[tuple[str, bool, tuple[str, ...]]]:
        yield from super()._idle()
        of_rewards = ("advantage_estimator", "scale_rewards", "dynamic_sampling", "soft_length")
        yield "method.reward_weight", not self.reward_weight, of_rewards


class GkdMethod(OnlineMethod):
    """Generalised knowledge distillation: the student answers, and learns the teacher's
    distributions at each place of its answers.
    """

    taught: ClassVar[bool] = True
    about: ClassVar[tuple[str, ...]] = ("reward/mean", "kl/teacher", "length/mean")
    name: Literal["gkd"] = Field(default="gkd", description="`method: gkd` for short")
    top_k: Count = Field(default=16, description=TOP_K)
    interpolation: Share = Field(default=1.0, description=INTERPOLATION)
    mismatch: Annotated[Mismatch, BeforeValidator(_no_ratio)] = Field(
        default="none", description="none: a divergence is right on anybody's answers"
    )

    def _idle(self) -> Iterator[tuple[str, bool, tuple[str, ...]]]:
        of_rewards = ("beta", "soft_length", "max_length")
        yield "a method that learns from rewards, such as on_policy_distill", True, of_rewards
        yield from super()._idle()

    @property
    def compares(self) -> bool:
        """One answer is enough."""
        return False

    @property
    def teacher_tokens(self) -> int:
        """As many as are compared."""
        return self.top_k

    @property
    def corrects(self) -> bool:
        """There is nothing to correct: whoever drew an answer, the divergence is the same."""
        return True

    @property
    def needs_rewards(self) -> bool:
        """It learns from none."""
        return False


def check_teacher(method: MethodSection, teacher: TeacherConfig | None, environment: str) -> None:
    """Raises ValueError where a method lacks one, or it would be told what nobody can tell it."""
    if method.taught and teacher is None:
        raise ValueError(
            f"method {getattr(method, 'name', '')} learns from a teacher: give teacher.path or"
            " teacher.address"
        )
    if teacher is None or teacher.system is None:
        return
    if not method.samples:
        raise ValueError(
            "teacher.system: answers in records have the prompt that the student has. Leave it out,"
            " or take on_policy_distill"
        )
    if environment != "single":
        raise ValueError(
            f"teacher.system goes before a record's prompt, and rollout.environment={environment}"
            " writes prompts itself. Leave one of them out"
        )
