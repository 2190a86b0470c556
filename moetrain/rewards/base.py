"""What a reward is."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Scores = list[float | None]
"""One for each completion; None where the reward does not apply."""

RewardFunction = Callable[..., Scores]
"""TRL's signature: f(completions: list[str], **columns: list[Any]) -> Scores. Options of the recipe
come as keyword arguments beside the columns.
"""


@dataclass(frozen=True)
class Graded:
    """The verdict on one completion."""

    reward: float | None  # the weighted sum of the parts; None: leave the completion out
    parts: Mapping[str, float | None]  # by name
    fault: str | None = None  # "timeout", "crash" or "error": then the reward is None


def text_of(message: Any) -> str:
    """The text of a prompt or completion, given as text or as messages."""
    if isinstance(message, str):
        return message
    return "\n".join(str(part.get("content") or "") for part in message)
