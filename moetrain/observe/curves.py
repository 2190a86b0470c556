"""The figures of a ledger, in columns: a long run has a million rows, and a sweep ten thousand
runs.
"""

import math
import sys
from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Any, cast

from moetrain.observe.ledger import is_number


@dataclass
class Series:
    """A figure as it went: its values, and the steps that had it."""

    steps: "array[int]" = field(default_factory=lambda: array("q"))
    values: "array[float]" = field(default_factory=lambda: array("d"))

    def __len__(self) -> int:
        return len(self.steps)

    def finite(self) -> "Series":
        """Without what cannot be drawn."""
        if all(map(math.isfinite, self.values)):
            return self
        finite_points = Series()
        for step, value in zip(self.steps, self.values, strict=True):
            if math.isfinite(value):
                finite_points.steps.append(step)
                finite_points.values.append(value)
        return finite_points


@dataclass
class Curves:
    """What a run's rows say, as they are added in their order."""

    num_rows: int = 0
    step: int = 0  # the last one
    figures: dict[str, Series] = field(default_factory=dict[str, Series])
    warnings: list[tuple[int, str]] = field(default_factory=list[tuple[int, str]])
    _last: dict[str, float] = field(default_factory=dict[str, float])

    def add(self, row: Mapping[str, Any]) -> None:
        """A row of the ledger, with a whole number as its `step`."""
        self.num_rows += 1
        self.step = int(row["step"])
        held_out = "loss" not in row
        for key, value in numbers(row).items():
            figure = self.figures.get(key)
            if figure is None:
                figure = self.figures[sys.intern(key)] = Series()
            figure.steps.append(self.step)
            figure.values.append(value)
            if key != "seconds" or not held_out:
                self._last[sys.intern(key)] = value
        message = row.get("warning") or []
        texts = cast(list[Any], message) if isinstance(message, list) else [message]
        self.warnings += [(self.step, str(text)) for text in texts]

    @property
    def final(self) -> dict[str, float]:
        """The last value of every figure; speed is the median over the steps."""
        speeds = self.figures.get("tokens_per_s")
        return self._last | ({"tokens_per_s": median(speeds.values)} if speeds else {})


def numbers(row: Mapping[str, Any]) -> dict[str, float]:
    """The figures of a ledger row, without its step."""
    return {key: float(value) for key, value in row.items() if key != "step" and is_number(value)}
