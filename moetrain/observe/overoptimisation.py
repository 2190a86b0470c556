"""Warnings that a preference run is being over-optimised: it still wins on its data while the model
gets worse at what it should say (the chosen answers), or strays from its reference.

Held-out figures are judged as soon as there are enough of them, training figures until then.
"""

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean
from typing import Any

from moetrain.observe.ledger import is_number

WINDOW, STRIDE = 60, 10  # training rows: log-prob and margin are means over WINDOW, every STRIDE
FALLS = 3  # how many of these means in a row must each be lower than the one before
FALL = 0.1  # nats a token: how far below its best the chosen answers' log-prob must be
WORSE = 1.5  # a warning is repeated when its figure is this many times what was warned of

_LOGP, _LENGTH, _MARGIN, _KL = "logps/chosen", "lengths/chosen", "rewards/margins", "kl"


@dataclass(frozen=True)
class _Point:
    """Means over the rows that end with `step`'s; None where they lack a figure."""

    step: int
    logp: float | None  # of a token of the chosen answers
    margin: float | None
    kl: float | None


class _Curve:
    """The points of the training rows, or of the held-out ones, each of which is a point."""

    def __init__(self, prefix: str, window: int, stride: int):
        self.prefix, self.stride = prefix, stride
        self.rows: deque[dict[str, float]] = deque(maxlen=window)
        self.num_rows = 0
        self.best: _Point | None = None  # where the chosen answers' log-prob was highest
        self.latest: deque[_Point] = deque(maxlen=FALLS + 1)

    def add(self, row: Mapping[str, Any]) -> _Point | None:
        """Take a row; the point that it completes, if it does."""
        values = {n: row.get(self.prefix + n) for n in (_LOGP, _LENGTH, _MARGIN, _KL)}
        figures = {n: float(v) for n, v in values.items() if is_number(v) and math.isfinite(v)}
        if not figures:
            return None
        self.rows.append(figures)
        self.num_rows += 1
        if self.num_rows % self.stride:
            return None
        point = self._point(int(row["step"]))
        self.latest.append(point)
        best = -math.inf if self.best is None or self.best.logp is None else self.best.logp
        if point.logp is not None and point.logp > best:
            self.best = point
        return point

    def _point(self, step: int) -> _Point:
        def mean(name: str, num: int) -> float | None:
            values = [row[name] for row in list(self.rows)[-num:] if name in row]
            return fmean(values) if len(self.rows) >= num and values else None

        window = self.rows.maxlen or 1
        logp, length = mean(_LOGP, window), mean(_LENGTH, window)
        # A ratio of means: the length of the answers that a batch happens to hold then cancels.
        per_token = logp / length if logp is not None and length else None
        return _Point(step, per_token, mean(_MARGIN, window), mean(_KL, self.stride))


class Watch:
    """Reads a run's ledger rows in order and says when it looks over-optimised.

    It holds no state but what the rows gave it: after a resume, feed it the earlier rows again.

    Args:
        kl_budget: nats an answer that `kl` may reach; None: no limit.
    """

    def __init__(self, kl_budget: float | None = None):
        self.kl_budget = kl_budget
        self._training = _Curve("", WINDOW, STRIDE)
        self._held_out = _Curve("eval_", 1, 1)
        self._warned_fall, self._warned_kl = 0.0, 0.0

    def row(self, row: Mapping[str, Any]) -> str | None:
        """A warning, when this row gives a new reason for one.

        Two reasons: `kl` past the budget; or the chosen answers' log-prob a token is FALL below its
        best and has fallen FALLS times in a row, while the margin is above what it was there. Each
        is given once, and again when it is WORSE times as bad.
        """
        held_out = "loss" not in row
        curve, where = (self._held_out, "held-out") if held_out else (self._training, "training")
        point = curve.add(row)
        if point is None:
            return None
        num_held_out = len(self._held_out.latest)
        warnings: list[str | None] = []
        if held_out or num_held_out == 0:
            warnings.append(self._kl(point, where))
        if held_out or num_held_out <= FALLS:
            warnings.append(self._fall(curve, point, where))
        return " ".join(text for text in warnings if text) or None

    def _kl(self, point: _Point, where: str) -> str | None:
        budget = self.kl_budget
        if budget is None or point.kl is None or point.kl <= budget:
            return None
        if point.kl < WORSE * self._warned_kl:
            return None
        self._warned_kl = point.kl
        return (
            f"Over-optimisation: the {where} KL to the reference is {point.kl:.3g} nats an answer,"
            f" past method.kl_budget={budget:g}."
        )

    def _fall(self, curve: _Curve, point: _Point, where: str) -> str | None:
        best = curve.best
        if best is None or best.logp is None or point.logp is None:
            return None
        if best.margin is None or point.margin is None or point.margin <= best.margin:
            return None
        recent = [p.logp for p in curve.latest if p.logp is not None]
        keeps_falling = len(recent) == FALLS + 1 and all(
            after < before for before, after in pairwise(recent)
        )
        fall = best.logp - point.logp
        if not keeps_falling or fall < max(FALL, WORSE * self._warned_fall):
            return None
        self._warned_fall = fall
        return (
            f"Over-optimisation: the {where} log-prob of chosen answers has fallen from"
            f" {best.logp:.3f} to {point.logp:.3f} a token since step {best.step} while the margin"
            f" rose from {best.margin:.3g} to {point.margin:.3g}; an earlier checkpoint may be"
            " better."
        )
