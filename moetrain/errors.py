"""What a user can do wrong. Every message is one line: what was given, what is allowed, the way
out.
"""

import difflib
from collections.abc import Iterable


class MoetrainError(Exception):
    """A problem the user can mend; the command line prints its message alone and exits with
    `exit_code`.
    """

    exit_code = 2


class ConfigError(MoetrainError):
    """A recipe, an override or a model's config.json says something that cannot be."""


class LayoutError(MoetrainError):
    """The parallel layout does not divide the model or the world."""


class DataError(MoetrainError):
    """A data file, a record or a tokenizer is not usable."""


class WeightsError(MoetrainError):
    """A weight file is missing, damaged, or is not the model's."""


class CheckpointError(MoetrainError):
    """A checkpoint cannot be written, or is not one of this run's."""


class RolloutError(MoetrainError):
    """A rollout engine gave up, or serves other weights than the trainer holds."""


class DivergedError(MoetrainError):
    """The loss or a gradient is not finite; raised before the optimizer step."""

    exit_code = 3


def nearest(word: str, allowed: Iterable[str]) -> str:
    """Return " Did you mean 'x'?" for the closest of `allowed`, or "" when none is close."""
    close = difflib.get_close_matches(word, list(allowed), n=1, cutoff=0.6)
    return f" Did you mean '{close[0]}'?" if close else ""


def plural(num: int, what: str) -> str:
    """`1 record`, `2 records`."""
    return f"{num} {what}{'s' * (num != 1)}"


def one_line(text: str, limit: int = 300) -> str:
    """The beginning of a text without what could begin another line, in a terminal or in a YAML
    comment.
    """
    text = text if len(text) <= limit else f"{text[:limit]}..."
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in text
    )
