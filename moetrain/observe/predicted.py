"""A warning where steps take or hold something else than was predicted of them (docs/planning.md).

A training row then has `predicted/seconds` beside `seconds`, and `predicted/memory_gib` beside
`memory_gib`.
"""

from collections.abc import Mapping
from statistics import median
from typing import Any

from moetrain.observe.ledger import is_number

SKIPPED = 2  # rows: kernels are chosen and memory is taken for the first time
ROWS = 10
GAP = 0.1  # of what was predicted
PREFIX = "predicted/"
_SECONDS, _MEMORY = "seconds", "memory_gib"


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
            for name in (_SECONDS, _MEMORY)
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
            measured = (median if name == _SECONDS else max)(each[name] for each in rows)
            if predicted > 0 and abs(measured / predicted - 1) > GAP:
                texts.append(_text(name, predicted, measured))
        return f"Prediction: {' and '.join(texts)} (docs/planning.md)." if texts else None


def _text(name: str, predicted: float, measured: float) -> str:
    what, unit = ("a step takes", "s") if name == _SECONDS else ("the first rank holds", "GiB")
    share = measured / predicted - 1
    return f"{what} {measured:.3g} {unit} where {predicted:.3g} were predicted ({share:+.0%})"
