"""A reward of one's own, with TRL's signature: one emoji, and not too long."""

from typing import Any

EMOJI = range(0x1F300, 0x1FAFF)


def emoji(completions: list[str], **columns: Any) -> list[float | None]:
    """1 for an answer with exactly one emoji; None for an empty answer, which is left out."""
    return [
        None if not text else float(sum(ord(letter) in EMOJI for letter in text) == 1)
        for text in completions
    ]


def short(completions: list[str], limit: int = 40, **columns: Any) -> list[float | None]:
    """From 1 for nothing to 0 at `limit` characters and more."""
    return [max(0.0, 1 - len(text) / limit) for text in completions]
