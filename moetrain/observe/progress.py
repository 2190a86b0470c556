"""How far a run is: a bar on a terminal, a line now and then in a log."""

import datetime
import time
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from moetrain.observe.answers import harmless
from moetrain.observe.figures import line_of

QUIET_SECONDS = 10.0
# Of a terminal's width, beside the name and two step numbers: a slash, gaps and the time left take
# FRAME columns. The bar gives way to figures.
FRAME, SHORTEST_BAR, LONGEST_BAR = 12, 5, 40


class ProgressDisplay:
    """Shows training rows on stdout. In a log: the first, the last, each fiftieth part and one
    every ten seconds.

    Args:
        first: the figures that come first; a terminal shows as many as it is wide.
    """

    def __init__(self, name: str, num_steps: int, step: int = 0, first: Sequence[str] = ("loss",)):
        self.name, self.num_steps, self.first = name, num_steps, first
        self.console = Console(highlight=False, soft_wrap=True)
        self._last_line = 0.0
        self._bar: Progress | None = None
        if self.console.is_terminal:
            self.open_bar(step)

    def open_bar(self, step: int) -> None:
        """Show the bar, at `step`."""
        self._width = BarColumn(bar_width=None)
        self._bar = _bar(self.console, self._width)
        total = self.num_steps
        self._task = self._bar.add_task(self.name, total=total, completed=step, figures="")
        self._bar.start()

    def step(self, row: Mapping[str, Any]) -> None:
        """Show a training row."""
        step = int(row["step"])
        figures = line_of(row, self.first)
        if self._bar is not None:
            figures += line_of(row, [n for n in ("loss",) if n not in self.first])
            figures.append(f"{row['tokens_per_s']:,.0f} tok/s")
            room = self.console.width - FRAME - len(self.name) - 2 * len(str(self.num_steps))
            shown = _within(figures, room)
            self._width.bar_width = max(SHORTEST_BAR, min(LONGEST_BAR, room - len(shown)))
            self._bar.update(self._task, completed=step, figures=shown)
            return
        now = time.monotonic()
        regular = step in (1, self.num_steps) or step % max(1, self.num_steps // 50) == 0
        if regular or now - self._last_line >= QUIET_SECONDS:
            self._last_line = now
            figures += line_of(row, [n for n in ("loss", "lr") if n not in self.first])
            figures += [f"{row['tokens_per_s']:,.0f} tok/s", f"|g| {row['grad_norm']:.3f}"]
            figures.append(f"{row['memory_gib']:.2f} GiB")
            self.say(f"{self.name} {step}/{self.num_steps}  {'  '.join(figures)}")

    def say(self, line: str) -> None:
        """Print a line above the bar, which a terminal would break within a word."""
        self.console.print(harmless(line), markup=False, soft_wrap=not self.console.is_terminal)

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
            self._bar = _bar(self.console, BarColumn())
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


class ByteDisplay:
    """Shows how many bytes are done, how fast and the time left, on stderr: a bar on a terminal,
    else a line every ten seconds.
    """

    def __init__(self, name: str):
        self.name = name
        self.console = Console(highlight=False, soft_wrap=True, stderr=True)
        self._started = self._last_line = time.monotonic()
        self._first: int | None = None  # bytes that an earlier start has done
        self._bar: Progress | None = None

    def advance(self, done: int, total: int) -> None:
        """So many of all are done; the first call says where this start begins."""
        now = time.monotonic()
        if self._first is None:
            self._started, self._first = now, done
            if self.console.is_terminal:
                columns = (DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
                name = TextColumn("[bold]{task.description}")
                self._bar = Progress(name, BarColumn(), *columns, console=self.console)
                self._task = self._bar.add_task(self.name, total=total, completed=done)
                self._bar.start()
        if self._bar is not None:
            self._bar.update(self._task, completed=done)
        elif now - self._last_line >= QUIET_SECONDS:
            self._last_line = now
            rate = (done - self._first) / max(now - self._started, 1e-9)
            left = (
                f"  {datetime.timedelta(seconds=round((total - done) / rate))} left" if rate else ""
            )
            self.say(
                f"{self.name} {done / 1e6:,.0f} of {total / 1e6:,.0f} MB"
                f"  {rate / 1e6:.1f} MB/s{left}"
            )

    def say(self, line: str) -> None:
        """Print a line above the bar."""
        self.console.print(harmless(line), markup=False)

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._bar is not None:
            self._bar.stop()


def _within(figures: Sequence[str], room: int) -> str:
    """As many of the figures as there is room for behind the shortest bar; the first one always."""
    shown = figures[0] if figures else ""
    for figure in figures[1:]:
        if len(shown) + 2 + len(figure) > room - SHORTEST_BAR:
            break
        shown += f"  {figure}"
    return shown


def _bar(console: Console, bar: BarColumn) -> Progress:
    return Progress(
        TextColumn("[bold]{task.description}"),
        bar,
        MofNCompleteColumn(),
        TextColumn("{task.fields[figures]}"),
        TimeRemainingColumn(),
        console=console,
    )
