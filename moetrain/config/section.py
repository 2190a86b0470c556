"""What every part of a recipe is, and every method's."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field


def as_list(value: object) -> object:
    """One string is a list of one."""
    return [value] if isinstance(value, str) else value


def _expand_home(value: str) -> str:
    return os.path.expanduser(value)  # in YAML and after `key=` no shell does it


def _whole_or_share(value: float) -> float:
    if value >= 1 and value != int(value):
        raise ValueError(
            f"optim.warmup={value} is neither a number of steps nor a share of them: give a whole"
            " number, or less than 1"
        )
    return value if 0 < value < 1 else int(value)


Location = Annotated[str, AfterValidator(_expand_home)]
Folder = Annotated[Path, AfterValidator(lambda path: Path(_expand_home(str(path))))]
Paths = Annotated[list[Location], BeforeValidator(as_list)]
Count = Annotated[int, Field(ge=1)]
WarmUp = Annotated[int | float, AfterValidator(_whole_or_share)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


class Section(BaseModel):
    """A part of a recipe."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False
    )


class MethodSection(Section):
    """A training method and its numbers."""

    # The records of data.train: an indexed corpus, conversations, pairs, answers with a label, or
    # prompts that are answered by rollouts. Every method says it.
    learns_from: ClassVar[Literal["corpus", "chat", "pairs", "labels", "prompts"]]
    scalar_head: ClassVar[bool] = False  # the model ends in one number per token
    value_head: ClassVar[bool] = False  # it has one beside the vocabulary
    samples: ClassVar[bool] = False  # it learns from rollouts
    demonstrated: ClassVar[bool] = False  # and from data.demonstrations beside them
    taught: ClassVar[bool] = False  # it learns from a teacher's log-probs
    # Held-out figures that can say which checkpoint is the best -> whether more is better.
    judged_by: ClassVar[Mapping[str, bool]] = {"eval_loss": False}
    # What it is about: the figures that the bar, the tables, the plots and the report open on.
    about: ClassVar[tuple[str, ...]] = ("loss",)

    @property
    def needs_rewards(self) -> bool:
        """Whether it learns from rewards."""
        return self.samples

    @property
    def teacher_tokens(self) -> int:
        """A teacher's likeliest tokens that it learns from at each place; 0: none."""
        return 0

    @property
    def kl_limit(self) -> float | None:
        """Nats an answer past which `kl` is warned of; None: never."""
        return None
