"""How far a run is: a bar on a terminal, a line now and then in a log."""

import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

QUIET_SECONDS = 10.0


class ProgressDisplay:
    """Shows training rows on stdout. In a log: the first, the last, each fiftieth part and one
    every ten seconds.
    """

    def __init__(self, name: str, num_steps: int, step: int = 0):
        self.name, self.num_steps = name, num_steps
        self.console = Console(highlight=False, soft_wrap=True)
        self._last_line = 0.0
        self._bar: Progress | None = None
        if self.console.is_terminal:
            self._bar = _bar(self.console)
            self._task = self._bar.add_task(name, total=num_steps, completed=step, figures="")
            self._bar.start()

    def step(self, row: Mapping[str, Any]) -> None:
        """Show a training row."""
        step = int(row["step"])
        figures = f"loss {row['loss']:.4f}  lr {row['lr']:.2e}  {row['tokens_per_s']:,.0f} tok/s"
        if self._bar is not None:
            self._bar.update(self._task, completed=step, figures=figures)
            return
        now = time.monotonic()
        regular = step in (1, self.num_steps) or step % max(1, self.num_steps // 50) == 0
        if regular or now - self._last_line >= QUIET_SECONDS:
            self._last_line = now
            norm = f"  |g| {row['grad_norm']:.3f}  {row['memory_gib']:.2f} GiB"
            self.say(f"{self.name} {step}/{self.num_steps}  {figures}{norm}")

    def say(self, line: str) -> None:
        """Print a line above the bar."""
        self.console.print(line, markup=False)

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._bar is not None:
            self._bar.stop()


class CountDisplay:
    """Shows how many of `total` things are done, on stderr: a bar on a terminal, else a line every
    ten seconds and one at the end of what took longer.
    """

    def __init__(self, name: str, total: int, done: int = 0):
        self.name, self.total, self.done = name, total, done
        self.console = Console(highlight=False, soft_wrap=True, stderr=True)
        self._last_line = time.monotonic()
        self._started, self._first = time.monotonic(), done
        self._bar: Progress | None = None
        if self.console.is_terminal:
            self._bar = _bar(self.console)
            self._task = self._bar.add_task(name, total=total, completed=done, figures="")
            self._bar.start()

    def advance(self, figures: str = "") -> None:
        """One more is done."""
        self.done += 1
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done, figures=figures)
            return
        now = time.monotonic()
        ends = self.done == self.total and now - self._started >= QUIET_SECONDS
        if ends or now - self._last_line >= QUIET_SECONDS:
            self._last_line = now
            rate = (self.done - self._first) / max(now - self._started, 1e-9)
            line = f"{self.name} {self.done}/{self.total}  {rate:.1f}/s  {figures}"
            self.console.print(line.rstrip(), markup=False)

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._bar is not None:
            self._bar.stop()


def _bar(console: Console) -> Progress:
    return Progress(
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[figures]}"),
        TimeRemainingColumn(),
        console=console,
    )
