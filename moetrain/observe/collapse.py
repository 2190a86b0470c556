"""Warnings that learning from rollouts is coming to nothing: groups without signal, a held-out
reward that falls while the training reward rises, a policy far from its reference or from its
sampler.

Each is a function of the ledger's rows alone, in their order.
"""

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moetrain.observe.figures import interval
from moetrain.observe.interval import Z
from moetrain.observe.ledger import is_number

WINDOW = 10  # training rows: figures are means over so many, or one batch would set them off
WORSE = 1.5  # a warning is repeated when its figure is this many times what was warned of
# Groups without signal: half of what is sampled teaches nothing, and it was otherwise; or nearly
# nothing does. A rise is one by RISE and by CERTAIN errors of the difference: of a thousand windows
# the extreme ones are three errors out by chance.
MANY, NEARLY_ALL, RISE, CERTAIN = 0.5, 0.95, 0.25, 5.0
# Both of the last two evaluations are so many errors of a difference below the first one, or below
# the best of all: which is the luckiest of many, so it takes more. The training reward has climbed
# by so many errors of its own meanwhile.
BELOW_FIRST, BELOW_BEST, CLIMB = 2.25, 3.5, 4.0
# Nats a token. At 1 the reference thinks e times less of the mean token, where InstructGPT and GRPO
# stay below 0.2; sampler and trainer are one policy, so what is between them is arithmetic.
FAR, APART = 1.0, 0.1

_REWARD, _SIGNAL, _KL, _LENGTH = "reward/mean", "groups/no_signal", "kl", "length/mean"
_MISMATCH = "mismatch/kl"


@dataclass(frozen=True)
class _Evaluation:
    """A held-out mean reward, its standard error, and the training reward when it was taken."""

    step: int
    mean: float
    error: float
    training: "_Mean | None"


@dataclass(frozen=True)
class _Mean:
    """A mean over the rows of a window; its error is that of rows."""

    value: float
    error: float


class Collapse:
    """Reads a run's ledger rows in order and says when it looks like collapsing.

    It holds no state but what the rows gave it: after a resume, feed it the earlier rows again.

    Args:
        kl_budget: nats an answer that the recipe allows, which is watched elsewhere; None: FAR.
    """

    def __init__(self, kl_budget: float | None = None):
        self._has_budget = kl_budget is not None
        self._rows: deque[dict[str, float]] = deque(maxlen=WINDOW)
        self._first: tuple[float, float] | None = None  # share without signal, groups
        self._start: _Mean | None = None  # the first window's reward
        self._initial: _Evaluation | None = None
        self._best: _Evaluation | None = None
        self._latest: deque[_Evaluation] = deque(maxlen=2)
        self._warned: dict[str, float] = {}

    def row(self, row: Mapping[str, Any]) -> str | None:
        """A warning, when this row gives a new reason for one."""
        held_out = "loss" not in row
        if held_out:
            return self._held_out(row)
        if _REWARD not in row:
            return None
        keys = (_REWARD, _SIGNAL, _KL, _LENGTH, _MISMATCH, "groups/graded")
        figures = {key: row[key] for key in keys if is_number(row.get(key))}
        self._rows.append({key: float(v) for key, v in figures.items() if math.isfinite(v)})
        if len(self._rows) < WINDOW:
            return None
        self._start = self._start or self._mean(_REWARD)
        warnings = [self._signal(), *self._distances()]
        return " ".join(text for text in warnings if text) or None

    def _signal(self) -> str | None:
        shares = [row[_SIGNAL] for row in self._rows if 0 <= row.get(_SIGNAL, -1) <= 1]
        if len(shares) < WINDOW:
            return None
        share = sum(shares) / WINDOW
        groups = sum(max(1.0, row.get("groups/graded", 1.0)) for row in self._rows)
        self._first = self._first or (share, groups)
        before, num = self._first
        both = (before * num + share * groups) / (num + groups)
        error = math.sqrt(both * (1 - both) * (1 / num + 1 / groups))
        rises = share >= max(MANY, before + RISE, before + CERTAIN * error)
        if not (rises or share >= NEARLY_ALL) or not self._worse("signal", share):
            return None
        was = f", {before:.2f} at first" if rises else ""
        return (
            f"Collapse: {share:.2f} of the groups have answers of one reward, from which nothing"
            f" is learned (mean of {WINDOW} steps{was}). If the reward is not near its highest, the"
            " answers have become alike: an earlier checkpoint, method.beta or a lower optim.lr may"
            " help; if it is, harder prompts."
        )

    def _distances(self) -> list[str | None]:
        warnings: list[str | None] = []
        length = self._mean(_LENGTH)
        for key, limit, tokens, text in (
            (_KL, FAR, length, "the policy is {:.2f} nats a token from its reference (kl)"),
            (_MISMATCH, APART, _Mean(1.0, 0.0), "sampler and trainer are {:.2f} nats a token apart"
             " (mismatch/kl)"),
        ):  # fmt: skip
            mean = self._mean(key)
            if mean is None or tokens is None or (key == _KL and self._has_budget):
                continue
            a_token = mean.value / max(tokens.value, 1.0)
            if a_token > limit and self._worse(key, a_token):
                bound = f"mean of {WINDOW} steps; out of bounds above {limit:g}"
                warnings.append(f"Collapse: {text.format(a_token)}, {bound}.")
        return warnings

    def _far_from_pairs(self, row: Mapping[str, Any]) -> str | None:
        """Of a method of pairs: how far the policy is from its reference on held-out answers."""
        keys = ("eval_kl", "eval_lengths/chosen", "eval_lengths/rejected")
        if not all(is_number(row.get(key)) and math.isfinite(row[key]) for key in keys):
            return None
        kl, chosen, rejected = (float(row[key]) for key in keys)
        a_token = kl / max((chosen + rejected) / 2, 1.0)
        if a_token <= FAR or not self._worse("eval_kl", a_token):
            return None
        return (
            f"Collapse: on held-out pairs the policy is {a_token:.2f} nats a token from its"
            f" reference (eval_kl {kl:.3g}; out of bounds above {FAR:g}): what it says may be"
            " broken although it tells pairs apart. Look at its answers (train.sample_prompts); a"
            " lower optim.lr or fewer steps may help."
        )

    def _held_out(self, row: Mapping[str, Any]) -> str | None:
        if far := self._far_from_pairs(row):
            return far
        sure, training = interval(row, "eval_reward/mean"), self._mean(_REWARD)
        if sure is None:
            return None
        mean, (num, half) = row["eval_reward/mean"], sure
        newest = _Evaluation(int(row["step"]), mean, half / Z, training)
        self._latest.append(newest)
        self._initial = self._initial or newest
        if self._best is None or newest.mean >= self._best.mean:
            self._best = newest
        for earlier, errors in ((self._best, BELOW_BEST), (self._initial, BELOW_FIRST)):
            fall = earlier.mean - newest.mean
            if self._fell(earlier, errors) and self._worse("held out", fall):
                return (
                    f"Collapse: the held-out reward has fallen from {earlier.mean:.3f} at step"
                    f" {earlier.step} to {newest.mean:.3f} (of {num} answers) while the training"
                    " reward rose: the run learns its own prompts, or to please the reward; an"
                    " earlier checkpoint may be better."
                )
        return None

    def _fell(self, earlier: _Evaluation, errors: float) -> bool:
        """Whether the last two evaluations lie that far below, and training has climbed since."""
        now, then = self._mean(_REWARD), earlier.training or self._start
        if len(self._latest) < 2 or now is None or then is None:
            return False
        if now.value - then.value <= CLIMB * math.hypot(now.error, then.error):
            return False
        return all(
            evaluation.step > earlier.step
            and earlier.mean - evaluation.mean
            > errors * math.hypot(earlier.error, evaluation.error)
            for evaluation in self._latest
        )

    def _mean(self, key: str) -> _Mean | None:
        values = [row[key] for row in self._rows if key in row]
        if len(values) < WINDOW:
            return None
        mean = sum(values) / WINDOW
        variance = sum((v - mean) * (v - mean) for v in values) / (WINDOW - 1)
        return _Mean(mean, math.sqrt(variance / WINDOW))

    def _worse(self, reason: str, figure: float) -> bool:
        if figure < WORSE * self._warned.get(reason, 0.0):
            return False
        self._warned[reason] = figure
        return True
