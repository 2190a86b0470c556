"""Rewards of length: by itself, and by whether the answer is right."""

import math
from collections.abc import Sequence
from typing import Any, Literal

from moetrain.rewards.accuracy import accuracy
from moetrain.rewards.base import Scores, text_of


def length(completions: Sequence[Any], target: int = 200, **columns: Any) -> Scores:
    """1 at `target` characters, falling linearly to 0 at none and at twice as many."""
    return [max(0.0, 1 - abs(len(text) - target) / target) for text in map(text_of, completions)]


def cosine_length(
    completions: Sequence[Any],
    right: list[float | None] | None = None,
    max_length: int = 1000,
    right_short: float = 1.0,
    right_long: float = 0.5,
    wrong_short: float = -1.0,
    wrong_long: float = -0.5,
    **columns: Any,
) -> Scores:
    """Short right answers are worth most, short wrong ones least (arXiv 2502.03373, section 3.2).

    `right` is a column with 1 for right answers; without one all count as right. Half a cosine over
    the length in characters leads from *_short at none to *_long at `max_length`.
    """
    marks = right or [1.0] * len(completions)
    scores: Scores = []
    for text, mark in zip(map(text_of, completions), marks, strict=True):
        short, long = (
            (right_short, right_long) if mark and mark > 0.5 else (wrong_short, wrong_long)
        )
        value = along_cosine(len(text), max_length, short, long)
        scores.append(None if mark is None else value)
    return scores


def cosine(
    completions: Sequence[Any],
    answer: list[Any] | None = None,
    solution: list[Any] | None = None,
    opened: list[str] | None = None,
    completion_ids: list[Any] | None = None,
    min_value_wrong: float = -1.0,
    max_value_wrong: float = -0.5,
    min_value_correct: float = 0.5,
    max_value_correct: float = 1.0,
    max_len: int = 1000,
    unit: Literal["characters", "tokens"] = "characters",
    **columns: Any,
) -> Scores:
    """Half a cosine over the length, open-r1's cosine_scaled_reward: from max_value_correct at no
    length to min_value_correct at `max_len` where the answer is right by `accuracy`, from
    min_value_wrong to max_value_wrong where it is wrong. None without a gold that can be read.

    Behind `max_len` the value stays. open-r1's comes up again there, and is that of no length at
    twice `max_len`.
    """
    rights = accuracy(completions, answer, solution, opened)
    scores: Scores = []
    for place, (text, right) in enumerate(zip(map(text_of, completions), rights, strict=True)):
        length = len(text)
        if unit == "tokens":
            ids = completion_ids[place] if completion_ids else None
            if ids is None:
                raise ValueError("unit: tokens needs token ids, in a column completion_ids")
            length = len(ids)
        short, long = (
            (max_value_correct, min_value_correct) if right else (min_value_wrong, max_value_wrong)
        )
        scores.append(None if right is None else along_cosine(length, max_len, short, long))
    return scores


def along_cosine(length: int, most: int, short: float, long: float) -> float:
    """Half a cosine from `short` at no length to `long` at `most`, and `long` behind it."""
    return long + (0.5 + 0.5 * math.cos(min(length, most) / most * math.pi)) * (short - long)


def len_reward(
    completions: Sequence[Any],
    answer: list[Any] | None = None,
    solution: list[Any] | None = None,
    opened: list[str] | None = None,
    group_lengths: list[tuple[int, int]] | None = None,
    **columns: Any,
) -> Scores:
    """From 0.5 for the shortest answer to a prompt down to -0.5 for the longest, and at most 0 for
    a wrong one (Kimi k1.5, arXiv 2501.12599, section 2.3.3; open-r1's `length`). 0 where all have
    the same length, None without a gold that can be read.

    `group_lengths` has the shortest and the longest of each prompt's answers, in characters;
    without it `completions` are the answers to one prompt.
    """
    lengths = [len(text_of(text)) for text in completions]
    ends = group_lengths or [(min(lengths), max(lengths))] * len(lengths)
    rights = accuracy(completions, answer, solution, opened)
    scores: Scores = []
    for length, (shortest, longest), right in zip(lengths, ends, rights, strict=True):
        value = 0.5 - (length - shortest) / (longest - shortest) if longest > shortest else 0.0
        scores.append(None if right is None else value if right else min(0.0, value))
    return scores
