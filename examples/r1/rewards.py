"""A reward for requests without one right answer."""

from typing import Any


def to_the_point(
    completions: list[str], subject: list[str | None] | None = None, **columns: Any
) -> list[float | None]:
    """1 for naming the record's `subject` in at most 20 characters, half for the one or the other;
    None for records without a subject.
    """
    subjects = subject or [None] * len(completions)
    return [
        None if word is None else 0.5 * (word in text) + 0.5 * (0 < len(text) <= 20)
        for text, word in zip(completions, subjects, strict=True)
    ]
