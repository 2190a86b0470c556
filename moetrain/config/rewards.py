"""The `rewards` list of a recipe: names, own files, weights and options."""

from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from moetrain.config.section import Section


class RewardConfig(Section):
    """One part of the reward; the whole is their weighted sum."""

    name: str = Field(description="a reward of moetrain, or FILE.py:FUNCTION")
    weight: float = Field(default=1.0, description="of this part in the sum")
    options: dict[str, Any] = Field(
        default_factory=dict[str, Any], description="keyword arguments of the reward"
    )

    @property
    def label(self) -> str:
        """What the ledger calls it: the function's name of an own file."""
        return self.name.rpartition(":")[2]


def _as_reward(value: object) -> object:
    return {"name": value} if isinstance(value, str) else value


Reward = Annotated[RewardConfig, BeforeValidator(_as_reward)]
