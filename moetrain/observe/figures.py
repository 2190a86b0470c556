"""The figures of a ledger's rows: which come first, what they are called, how they are written, and
what number of answers, pairs or groups stands behind a rate.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from moetrain.config.method import about
from moetrain.observe.interval import around
from moetrain.observe.ledger import is_number

LABELS = {
    "reward/mean": "reward",
    "length/mean": "length",
    "groups/no_signal": "no signal",
    "rewards/accuracies": "accuracy",
    "rewards/margins": "margin",
    "token_prob": "token prob",
    "kl": "KL",
}
# Shares, which lie in [0, 1]: by the last part of their names. `reward/mean` has a deviation.
_RATES = ("accuracies", "no_signal", "truncated", "accuracy", "exact", "format")
_DIGITS = ((0.0995, 4), (9.9995, 3), (99.995, 2), (999.95, 1))  # below so much, so many decimals
_HELD_OUT = "eval_"


def first_figures(methods: Iterable[str]) -> tuple[str, ...]:
    """What all of `methods` are about, each figure once."""
    return tuple(dict.fromkeys(name for method in methods for name in about(method)))


def label(name: str) -> str:
    """What a figure is called where its name in the ledger is too long."""
    return LABELS.get(name, name)


def number(value: float) -> str:
    """A figure for people: 0.513, 0.0213, 12.35, 1,432; powers of ten only below 0.001."""
    size = abs(value)
    if not math.isfinite(value) or value == 0:
        return f"{value:g}"
    if 0 < size < 1e-3:
        return f"{value:.2e}"
    digits = next((d for limit, d in _DIGITS if size < limit), 0)
    return f"{value:,.{digits}f}"


def interval(row: Mapping[str, Any], name: str) -> tuple[int, float] | None:
    """(n, half of the 95 % interval) of a rate or a mean reward of a row; None where the row does
    not say how many it is of. The answers to one prompt count as the one observation that they are:
    n of a training row with groups is their number.
    """
    prefix = _HELD_OUT if name.startswith(_HELD_OUT) else ""
    parent, _, leaf = name.rpartition("/")
    is_mean = name == f"{prefix}reward/mean"
    if not (is_mean or leaf in _RATES) or not is_number(row.get(name)):
        return None
    places = (f"{prefix}groups/graded", f"{name}/graded", f"{parent}/graded")
    num = next((row[place] for place in places if is_number(row.get(place))), None)
    std = row.get(f"{prefix}reward/std" if prefix else "groups/std") if is_mean else None
    if num is None or (is_mean and not is_number(std)):
        return None
    bounds = around(row[name], num, std)
    return None if bounds is None else (round(num), (bounds[1] - bounds[0]) / 2)


def written(row: Mapping[str, Any], name: str) -> str:
    """A figure of a row; a rate with its interval and what it is of: `0.550 ±0.15 of 40`."""
    sure = interval(row, name)
    text = number(row[name])
    return text if sure is None else f"{text} ±{half(sure[1])} of {sure[0]:,}"


def half(value: float) -> str:
    """Half of an interval, to two digits."""
    return f"{value:.2f}" if 0.01 <= value < 10 else number(value)


def line_of(row: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    """`label figure` of those that the row has."""
    return [f"{label(n)} {number(row[n])}" for n in names if is_number(row.get(n))]
