"""A warning where steps take or hold something else than was predicted of them (docs/planning.md).

A training row then has `predicted/seconds` beside `seconds`, and `predicted/memory_gib` beside
`memory_gib`.
"""

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from moetrain.observe.ledger import is_number

SKIPPED = 2  # rows: kernels are chosen and memory is taken for the first time
ROWS = 10
GAP = 0.1  # of what was predicted
PREFIX = "predicted/"
_SECONDS, _MEMORY = "seconds", "memory_gib"
UNITS = {_SECONDS: "s", _MEMORY: "GiB"}


def measured_of(name: str, rows: Sequence[Mapping[str, Any]]) -> float | None:
    """What rows say of a figure that is predicted; None where they do not."""
    values = [row[name] for row in rows if is_number(row.get(name))]
    if not values:
        return None
    return median(values) if name == _SECONDS else max(values)


class Gap:
    """Reads a run's training rows in order and says once where they part from the prediction.

    It holds no state but what the rows gave it: after a resume, feed it the earlier rows again.
    """

    def __init__(self) -> None:
        self._predicted: dict[str, float] = {}
        self._rows: list[dict[str, float]] = []

    def row(self, row: Mapping[str, Any]) -> str | None:
        """The warning, with the row that completes ROWS of them; again only where a later start
        predicts something else.
        """
        now = {
            name: float(row[PREFIX + name])
            for name in UNITS
            if is_number(row.get(PREFIX + name)) and is_number(row.get(name))
        }
        if not now:
            return None
        if now != self._predicted:
            self._predicted, self._rows = now, []
        self._rows.append({name: float(row[name]) for name in now})
        if len(self._rows) != SKIPPED + ROWS:
            return None
        rows = self._rows[SKIPPED:]
        texts: list[str] = []
        for name, predicted in now.items():
            measured = measured_of(name, rows)
            assert measured is not None
            if predicted > 0 and abs(measured / predicted - 1) > GAP:
                texts.append(_text(name, predicted, measured))
        return f"Prediction: {' and '.join(texts)} (docs/planning.md)." if texts else None


def _text(name: str, predicted: float, measured: float) -> str:
    what, unit = "a step takes" if name == _SECONDS else "the first rank holds", UNITS[name]
    share = measured / predicted - 1
    return f"{what} {measured:.3g} {unit} where {predicted:.3g} were predicted ({share:+.0%})"
