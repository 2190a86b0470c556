"""Moetrain's rewards that are functions, the recipe's all together, a completion at a time."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from moetrain.config.rewards import RewardConfig
from moetrain.rewards.base import Completion, Grade, RewardKind, Shape
from moetrain.rewards.find import find_reward


class Functions:
    """What the recipe's functions say of a completion."""

    def __init__(self, configs: Sequence[RewardConfig]):
        self._found = [(config, find_reward(config.name)) for config in configs]
        if any(config.name in ("accuracy", "cosine", "len_reward") for config in configs):
            import math_verify  # noqa: F401  # seconds, which no completion should pay

    def grade(self, completions: Sequence[Completion]) -> Iterator[tuple[int, Grade]]:
        for completion in completions:
            yield completion.number, self._answer(completion)

    def _answer(self, completion: Completion) -> Grade:
        lists = {
            name: [value] for name, value in completion.columns.items() if name != "completions"
        }
        lists["opened"] = [completion.opened]
        lists["group_lengths"] = [completion.group_lengths]
        if completion.tokens is not None:
            lists["completion_ids"] = [completion.tokens]
        values: dict[str, float | None] = {}
        try:
            for config, function in self._found:
                (score,) = function([completion.text], **{**lists, **config.options})
                values[config.label] = None if score is None else _finite(float(score))
        except Exception as error:  # columns hold anything
            return Grade(fault="error", detail=f"{config.label}: {type(error).__name__}: {error}")
        return Grade(values)


def _finite(score: float) -> float:
    if not math.isfinite(score):
        raise ValueError(f"the reward is {score}")
    return score


def _shape(options: Mapping[str, Any], recipe: Shape) -> Shape:
    return recipe


FUNCTIONS = RewardKind(Functions, _shape)
