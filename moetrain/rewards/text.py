"""Rewards that read the text alone."""

import math
import re
import unicodedata
from collections.abc import Sequence
from typing import Any

from moetrain.rewards.base import Scores, text_of

THINKING = re.compile(
    r"\s*<think>(?:(?!</?think>).)*</think>\s*<answer>(?:(?!</?answer>).)*</answer>\s*", re.DOTALL
)
_WORD = re.compile(r"[぀-ヿ㐀-䶿一-鿿豈-﫿]|\w+")


def format(
    completions: Sequence[Any],
    pattern: str | None = None,
    opened: list[str] | None = None,
    **columns: Any,
) -> Scores:
    """1 when the whole completion, with what the prompt has begun of it, is
    <think>…</think><answer>…</answer> (or matches `pattern`).
    """
    wanted = THINKING if pattern is None else re.compile(pattern, re.DOTALL)
    begun = opened or [""] * len(completions)
    return [
        float(wanted.fullmatch(start + text_of(text)) is not None)
        for start, text in zip(begun, completions, strict=True)
    ]


def tag_count(
    completions: Sequence[Any],
    tags: Sequence[str] = ("think", "answer"),
    opened: list[str] | None = None,
    **columns: Any,
) -> Scores:
    """The share of the tags <NAME> and </NAME> of `tags` that stand in the completion, with what
    the prompt has begun of it, exactly once. As open-r1's tag_count_reward, but that newlines
    around them do not count.

    It pays for a part of what `format` asks for, which a model that never does all of it can learn.
    """
    marks = [mark for tag in tags for mark in (f"<{tag}>", f"</{tag}>")]
    begun = opened or [""] * len(completions)
    wholes = [start + text_of(text) for start, text in zip(begun, completions, strict=True)]
    return [sum(whole.count(mark) == 1 for mark in marks) / len(marks) for whole in wholes]


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
        share = min(len(text), max_length) / max_length
        near = 0.5 + 0.5 * math.cos(share * math.pi)  # 1 at no length, 0 at max_length
        short, long = (
            (right_short, right_long) if mark and mark > 0.5 else (wrong_short, wrong_long)
        )
        scores.append(None if mark is None else long + near * (short - long))
    return scores


def words(text: str) -> list[str]:
    """Words in lower case; each Chinese or Japanese character is one."""
    return _WORD.findall(unicodedata.normalize("NFKC", text).lower())


def repetition(
    completions: Sequence[Any], n: int = 3, max_penalty: float = 1.0, **columns: Any
) -> Scores:
    """From 0 down to -max_penalty: the share of n-grams that stood there before (arXiv 2502.03373,
    section 3.3).
    """
    scores: Scores = []
    for text in map(text_of, completions):
        own = words(text)
        grams = [tuple(own[i : i + n]) for i in range(len(own) - n + 1)]
        share = 1 - len(set(grams)) / len(grams) if grams else 0.0
        scores.append(-max_penalty * share)
    return scores


SCRIPTS = ("LATIN", "CJK", "HIRAGANA", "KATAKANA", "HANGUL", "CYRILLIC", "ARABIC", "DEVANAGARI",
           "GREEK", "HEBREW", "THAI")  # fmt: skip


def script_of(text: str) -> str | None:
    """The script of most letters; text with kana is Japanese. None without letters."""
    counts: dict[str, int] = {}
    for letter in text:
        if letter.isalpha():
            name = unicodedata.name(letter, "").split(" ")[0]
            if name in SCRIPTS:
                counts[name] = counts.get(name, 0) + 1
    kana = counts.pop("HIRAGANA", 0) + counts.pop("KATAKANA", 0)
    if kana:
        counts["JAPANESE"] = kana + counts.pop("CJK", 0)
    return max(counts, key=lambda name: counts[name]) if counts else None


def language(
    completions: Sequence[Any],
    prompt: list[Any] | None = None,
    script: str | None = None,
    **columns: Any,
) -> Scores:
    """1 when the completion is in the prompt's script (or in `script`), 0 when not; None when
    either has no letters.

    Scripts, not languages: what goes wrong in practice is an answer that slips into another script,
    and no model is needed to see it.
    """
    prompts = prompt or [""] * len(completions)
    scores: Scores = []
    for text, asked in zip(map(text_of, completions), prompts, strict=True):
        own, wanted = script_of(text), script or script_of(text_of(asked))
        scores.append(None if own is None or wanted is None else float(own == wanted))
    return scores
