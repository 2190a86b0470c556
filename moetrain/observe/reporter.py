"""One door to all that a run tells about itself; silent on every rank but the first."""

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from moetrain.config.recipe import Recipe
from moetrain.observe.answers import ANSWERS, Answer, picked, read_answers
from moetrain.observe.collapse import Collapse
from moetrain.observe.figures import label, written
from moetrain.observe.ledger import Ledger, rows_of
from moetrain.observe.overoptimisation import Watch
from moetrain.observe.plot import plot_figures
from moetrain.observe.predicted import Gap
from moetrain.observe.progress import ProgressDisplay
from moetrain.observe.sinks import open_sinks
from moetrain.observe.summary import print_summaries, summarise

TABLES, FEW = 50, 4  # batches of a run whose rollouts the sinks get, and how many of each end
WARN_SECONDS = 60.0  # between two lines about answers without a reward


def describe_ungraded(
    graded: float, answers: float, row: Mapping[str, Any], prefix: str = ""
) -> str:
    """How many answers have a reward, and what a reward said when it failed."""
    fault = row.get(f"{prefix}reward/fault")
    why = f"the last fault: {fault}" if fault else "the rewards do not apply to the others"
    return f"{graded:.0f} of {answers:.0f} answers graded ({why})"


class Reporter:
    """Writes rows to the ledger, the progress display and the sinks. A context manager.

    Args:
        num_steps: the run's last step; `step`: the one it continues from.
        speaks: whether this rank is the one that writes.
        predicted: figures that every training row gets beside its own (`predicted/...`).
    """

    def __init__(
        self,
        recipe: Recipe,
        num_steps: int,
        step: int,
        *,
        speaks: bool,
        predicted: Mapping[str, float] | None = None,
    ):
        self.recipe, self.speaks = recipe, speaks
        self._predicted = predicted or {}
        self._num_steps = num_steps
        self._warned = -math.inf
        self._open = ExitStack()
        if not speaks:
            return
        self._ledger = Ledger(recipe.run_dir / "ledger.jsonl", step)
        limit = recipe.method.kl_limit
        self._watches = (Watch(limit), Collapse(limit), Gap())
        for row in rows_of(recipe.run_dir / "ledger.jsonl"):
            self._warning(row)
        self._open.callback(self._ledger.close)
        self._sinks = open_sinks(recipe, step)
        for sink in self._sinks:
            self._open.callback(sink.close)
        self._progress: ProgressDisplay | None = None
        if recipe.observe.progress:
            method = recipe.method
            self._progress = ProgressDisplay(method.name, num_steps, step, method.about)
            self._open.callback(self._progress.close)

    def __enter__(self) -> "Reporter":
        return self

    def __exit__(self, *exc: object) -> None:
        self._open.close()

    def step(self, row: Mapping[str, Any]) -> None:
        """Record a training row."""
        self._write({**row, **self._predicted})
        if self.speaks and self._progress:
            self._progress.step(row)
            lost = row.get("faults/dropped/ungraded", 0)
            if lost and time.monotonic() - self._warned >= WARN_SECONDS:
                self._warned = time.monotonic()
                note = describe_ungraded(row["reward/graded"], row["reward/graded"] + lost, row)
                self.say(f"{self.recipe.method.name} {row['step']}: {note}")

    def held_out(self, row: Mapping[str, Any]) -> None:
        """Record a held-out row."""
        self._write(row)
        names = [n for n in self.recipe.method.about if f"eval_{n}" in row]
        texts = [f"{label(n)} {written(row, f'eval_{n}')}" for n in names]
        graded, answers = row.get("eval_reward/graded", 0), row.get("eval_reward/answers", 0)
        if graded < answers:
            note = describe_ungraded(graded, answers, row, "eval_")
            texts.insert(int("eval_reward/mean" in row), note)
        self.say(f"{self.recipe.method.name} {row['step']}: held-out {', '.join(texts)}")

    def answers(self, step: int) -> None:
        """Hand a few answers of an evaluation, the best and the worst, to the sinks: as they are in
        the run's folder.
        """
        if self.speaks and self._sinks:
            path = self.recipe.run_dir / ANSWERS / f"{step:08d}.jsonl"
            self._tables("held_out", step, read_answers(path))

    def rollouts(self, step: int, answers: Iterable[Answer]) -> None:
        """The same of what a step learned from, of TABLES steps in all."""
        every = math.ceil(self._num_steps / TABLES)
        if self.speaks and self._sinks and (step % every == 0 or step == self._num_steps):
            self._tables("rollouts", step, list(answers))

    def _tables(self, name: str, step: int, answers: Sequence[Answer]) -> None:
        few = picked(answers, FEW, FEW)
        for sink in self._sinks:
            sink.answers(f"answers/{name}", step, few)

    def say(self, line: str) -> None:
        """Tell the user something that is no figure."""
        if self.speaks and self._progress:
            self._progress.say(line)

    def finish(self) -> None:
        """Draw `<run_dir>/loss.png` and print the run's line of the summary table."""
        if not self.speaks:
            return
        self._open.close()
        run_dir = self.recipe.run_dir
        method = self.recipe.method
        ledgers = {method.name: (run_dir / "ledger.jsonl", method.about)}
        plot_figures(ledgers, run_dir / "loss.png")
        if self._progress:
            print_summaries([summarise(method.name, run_dir, first=method.about)])

    def _write(self, row: Mapping[str, Any]) -> None:
        if self.speaks:
            warning = self._warning(row)
            if warning is not None:
                row = {**row, "warning": warning}
                self.say(warning)
            self._ledger.write(row)
            for sink in self._sinks:
                sink.write(row)

    def _warning(self, row: Mapping[str, Any]) -> str | None:
        return " ".join(text for watch in self._watches if (text := watch.row(row))) or None
