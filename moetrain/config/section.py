"""What every part of a recipe is, and every method's."""

from typing import ClassVar

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A part of a recipe."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False
    )


class MethodSection(Section):
    """A training method and its numbers."""

    scalar_head: ClassVar[bool] = False  # the model ends in one number a token
    value_head: ClassVar[bool] = False  # it has one beside the vocabulary
    samples: ClassVar[bool] = False  # it learns from rollouts
    demonstrated: ClassVar[bool] = False  # and from data.demonstrations beside them

    @property
    def kl_limit(self) -> float | None:
        """Nats an answer past which `kl` is warned of; None: never."""
        return None
