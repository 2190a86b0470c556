"""Rewards that an agent gave its own session (docs/agents.md)."""

from collections.abc import Sequence
from typing import Any


def agent(
    completions: Sequence[Any], agent_reward: Sequence[float | None] | None = None, **_: Any
) -> list[float | None]:
    """What each agent said of its session; None where it said nothing."""
    return [None] * len(completions) if agent_reward is None else list(agent_reward)
