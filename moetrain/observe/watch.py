"""`moetrain watch`: a run in the terminal, as its folder tells it while it goes on."""

import math
import signal
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from moetrain.errors import MoetrainError, plural
from moetrain.observe.answers import (
    ANSWERS,
    ROLLOUTS,
    TITLES,
    Answer,
    Summary,
    describe_reward,
    harmless,
    picked,
    read_answers,
    shortened,
    steps_of,
)
from moetrain.observe.figures import first_figures, label, number, written
from moetrain.observe.follow import Followed, Follower, Holder, Thinned, last_end
from moetrain.observe.ledger import is_number
from moetrain.observe.predicted import PREFIX, UNITS, measured_of
from moetrain.observe.runs import is_run, num_steps, settings_of

# After what the method is about and the parts of the reward: what is looked at first, then the rest
# by the beginnings of its names. What has a line of its own, or says of how many another is, stands
# in no table.
_MAIN = ("turns/mean", "tools/calls", "tools/errors", "entropy", "kl", "mismatch/kl", "loss", "lr",
         "tokens_per_s", "grad_norm", "length/truncated")  # fmt: skip
_NO_PARTS = ("mean", "std", "chosen", "rejected", "min", "max")
_ORDER = ("reward/", "rewards/", "length", "turns/", "tools/", "tokens/", "kl", "mismatch/",
          "memory_gib")  # fmt: skip
_ELSEWHERE = ("step", "seconds", "predicted/", "faults/", "router/layer", "eval_")
_PUSH = ("push/logprob_gap", "push/reloads")  # of how weights went to the servers
_COUNTS = ("/graded", "/answers")
_NAME, _NOW, _CURVE, _HELD_OUT = 22, 10, 14, 20  # columns of 80
_BARS = {True: "▁▂▃▄▅▆▇█", False: "_.-:=+*#"}  # by whether the terminal has such
_LONG_AGO = 10  # steps' time without a row, while it runs
# Characters and lines of a prompt and of an answer where the frame has no height.
_PROMPT, _ANSWER = (300, 4), (900, 12)


class Watch:
    """What is known of the run in `folder`. Raises MoetrainError where that is none."""

    def __init__(self, folder: Path):
        if not folder.is_dir():
            raise MoetrainError(f"{folder} is no folder. Give a run's (its recipe's run_dir).")
        if not is_run(folder) and not (folder / ".lock").exists():
            raise MoetrainError(
                f"{folder} holds no run (no resolved.yaml, no ledger.jsonl). Give a run_dir."
            )
        self.folder = folder
        self.ledger = Follower(folder / "ledger.jsonl")
        self.holder = Holder(folder)
        self.host: str | None = None
        self.problem = ""
        self.method, self.total = "", None
        self.title, self.summary, self.picked = "", "", list[tuple[str, Answer]]()
        self._answers: tuple[Path, int] | None = None
        self._rest = 0.0  # until then no answers are read: of a large batch that takes seconds

    def look(self) -> None:
        """Read what is new."""
        self.problem = ""
        try:
            self.ledger.poll()
        except OSError as error:
            self.problem = f"{self.ledger.path} cannot be read ({error.strerror})"
        self.host = self.holder.look()
        self.total = num_steps(self.folder) or self.total
        if not self.method:
            settings = settings_of(self.folder / "resolved.yaml", [])
            method = settings.get("method.name", settings.get("method"))
            self.method = method if isinstance(method, str) else ""
        if time.monotonic() >= self._rest:
            started = time.monotonic()
            self._look_at_answers()
            self._rest = started + 10 * (time.monotonic() - started)

    def _look_at_answers(self) -> None:
        for name in (ROLLOUTS, ANSWERS):
            files = steps_of(self.folder / name)
            if not files:
                continue
            step = max(files)
            try:
                place = files[step], files[step].stat().st_mtime_ns
                answers = read_answers(files[step]) if place != self._answers else []
            except (OSError, MoetrainError):  # a head alone, or it was removed meanwhile
                continue
            if answers:
                self._answers = place
                self.title = f"{TITLES[name]} of step {step}"
                self.summary = Summary.of(answers).describe()
                self.picked = picked(answers, 1, 1)
            return

    def state(self) -> tuple[str, str]:
        """(what the run does, a colour)."""
        followed = self.ledger.said
        if self.host is not None:
            where = "" if self.host == "here" else f" on {self.host}"
            return f"running{where}", "green"
        if self.total is not None and followed.step >= self.total:
            return "finished", "cyan"
        if not followed.num_rows:
            return "has not begun", "yellow"
        end = last_end(self.folder)
        return "stopped" + f" ({end})" * bool(end), "yellow"


def watch(folder: Path, every: float, *, once: bool, console: Console | None = None) -> int:
    """Show the run in `folder` each `every` seconds until Ctrl-C; `once`, and where there is no
    terminal, one frame. Returns the exit code. Raises MoetrainError.
    """
    console = console or Console(highlight=False)
    run = Watch(folder)
    if once or not console.is_terminal:
        run.look()
        console.print(frame(run, console))
        return 0
    signal.signal(signal.SIGTERM, _ended)  # the full screen goes first
    try:
        with Live(console=console, screen=True, auto_refresh=False) as live:
            while True:
                run.look()
                live.update(frame(run, console, console.height), refresh=True)
                time.sleep(every)
    except KeyboardInterrupt:
        console.print(frame(run, console))  # stays when the full screen has gone
    return 0


def _ended(number: int, _: object) -> None:
    raise SystemExit(128 + number)


def frame(run: Watch, console: Console, height: int | None = None) -> RenderableType:
    """What there is to see now, as wide as the console; of so many lines at most."""
    most = None if height is None else max(6, height // 2 - 2)
    parts = [_head(run, console), *_figures(run, console, most), *_lines(run, console, height)]
    if height is None:
        return Group(*parts, *_answers(run, console, _PROMPT, _ANSWER))
    top = len(console.render_lines(Group(*parts), pad=False))
    room = height - top - 4  # below a blank line, a title and a summary
    num = 2 if room >= 8 else 1
    left = room // num - 1  # below the line of an answer
    if left >= 2:
        wide = console.width - 4
        prompt, answer = max(1, left // 3), left - max(1, left // 3)
        limits = (prompt * wide, prompt), (answer * wide, answer)
        parts += _answers(run, console, *limits, num=num)
    lines = console.render_lines(Group(*parts), pad=False)[:height]
    return _Lines(lines)


class _Lines:
    """Lines that are laid out already."""

    def __init__(self, lines: Sequence[Any]):
        self.lines = lines

    def __rich_console__(self, console: Console, options: Any) -> Iterable[Any]:
        from rich.segment import Segment

        for i, line in enumerate(self.lines):
            yield from [Segment.line()] * (i > 0)
            yield from line


def _safe(text: str, console: Console, *, line: bool = True) -> str:
    """Without what a terminal would act on, and in its characters; by default in one line."""
    text = harmless(text)
    if line:
        text = text.replace("\n", " ")
    return text.encode(console.encoding, "backslashreplace").decode(console.encoding)


def _head(run: Watch, console: Console) -> Text:
    followed, (state, colour) = run.ledger.said, run.state()
    text = Text(_safe(run.folder.resolve().name, console), style="bold", overflow="fold")
    if run.method:
        text.append(f"  {_safe(run.method, console)}", style="not bold")
    text.append(f"  {_safe(state, console)}", style=colour)
    of = f"/{run.total:,}" if run.total else ""
    text.append(f"  step {followed.step:,}{of}", style="not bold")
    takes = median([row["seconds"] for row in followed.recent if "seconds" in row] or [math.nan])
    if run.ledger.changed is not None and followed.num_rows:
        ago = max(0.0, time.time() - run.ledger.changed)
        late = run.host is not None and ago > max(60.0, _LONG_AGO * takes)
        text.append(f"  newest row {_ago(ago)} ago", style="red" if late else "not bold")
    if run.host is not None and run.total and math.isfinite(takes):
        text.append(f"  about {_ago(takes * (run.total - followed.step))} left", style="not bold")
    if run.problem:
        text.append(f"\n{_safe(run.problem, console)}", style="red")
    if not followed.num_rows:
        text.append("\nno row of the ledger yet", style="not bold dim")
    if followed.num_broken:
        text.append(
            f"\nledger.jsonl: no row in {plural(followed.num_broken, 'line')}", style="yellow"
        )
    return text


def _ago(seconds: float) -> str:
    for limit, unit, name in ((100, 1, "s"), (6000, 60, "min"), (48 * 3600, 3600, "h")):
        if seconds < limit:
            return f"{seconds / unit:.0f} {name}"
    return f"{seconds / 86400:.0f} days"


def _figures(run: Watch, console: Console, most: int | None) -> list[RenderableType]:
    """The table of figures, and how many more there are."""
    followed = run.ledger.said
    names = names_of(followed, run.method)
    if not names:
        return []
    at = f"held out ({followed.held_out['step']})" if followed.held_out else "held out"
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    extra = max(0, console.width - 80)
    is_plain = not console.encoding.lower().startswith("utf")
    bars = _BARS[not is_plain]
    name, curve = _NAME + extra // 4, _CURVE + extra // 4
    for title, width in (("figure", name), ("now", _NOW)):
        justify = "left" if title != "now" else "right"
        table.add_column(title, width=width, no_wrap=True, overflow="crop", justify=justify)
    table.add_column(f"curve to {followed.step}", width=curve, no_wrap=True, overflow="crop")
    table.add_column(at, no_wrap=True, overflow="crop")
    for one in names[:most]:
        row, held = followed.training, f"eval_{one}"
        series = followed.curves.get(one) or followed.curves.get(held)
        text = written(followed.held_out, held) if is_number(followed.held_out.get(held)) else ""
        table.add_row(
            Text(_safe(label(one), console), overflow="crop"),
            Text(number(row[one]) if is_number(row.get(one)) else "-"),
            Text(curve_of(series, curve, bars), style="cyan"),
            Text(_safe(text.replace("±", "+-") if is_plain else text, console)),
        )
    left = len(names) - len(names[:most])
    return [table, *([Text(f"{left} more with --once", style="dim")] if left else [])]


def names_of(followed: Followed, method: str) -> list[str]:
    """The figures of a run in the order of the table: those that its method is about first."""
    there = {*followed.training, *(name.removeprefix("eval_") for name in followed.held_out)}
    there = {
        n for n in there if is_number(followed.training.get(n, followed.held_out.get(f"eval_{n}")))
    }
    there = {n for n in there if not n.startswith(_ELSEWHERE) and not n.endswith(_COUNTS)}
    there = {n for n in there if n in _PUSH or (not n.startswith("push/") and n != "tokens")}
    first = first_figures([method or "sft"])

    def place(name: str) -> tuple[int, int, str]:
        if name in first:
            return 0, first.index(name), name
        if name.startswith("reward/") and name.split("/")[-1] not in _NO_PARTS:
            return 1, 0, name
        if name in _MAIN:
            return 2, _MAIN.index(name), name
        begins = (i for i, start in enumerate(_ORDER) if name.startswith(start))
        return 3, next(begins, len(_ORDER)), name

    return sorted(there, key=place)


def curve_of(series: Thinned | None, width: int, bars: str) -> str:
    """A figure's way as heights between its least and its most: a bar a point, of more than there
    is room for the means of equal parts of the steps.
    """
    if series is None:
        return ""
    points = [(s, v) for s, v in zip(series.steps, series.values, strict=True) if math.isfinite(v)]
    cells: dict[int, list[float]] = {}
    for i, (step, value) in enumerate(points):
        # A resumed run may look at its held-out data twice at a step, so steps alone will not do.
        span = points[-1][0] - points[0][0] + 1
        cell = i if len(points) <= width else (step - points[0][0]) * width // span
        cells.setdefault(cell, []).append(value)
    means = {cell: sum(v / len(values) for v in values) for cell, values in cells.items()}
    low, high = min(means.values(), default=0.0), max(means.values(), default=0.0)
    scale = high / 2 - low / 2  # the whole may be no float
    text = ""
    for cell in range(max(means, default=-1) + 1):
        if cell not in means:
            text += text[-1]
            continue
        height = (means[cell] / 2 - low / 2) / scale if scale > 0 else 0.0
        text += bars[round(height * (len(bars) - 1))]
    return text


def _lines(run: Watch, console: Console, height: int | None) -> list[RenderableType]:
    """Seconds by phase, the prediction, faults and warnings."""
    followed, row = run.ledger.said, run.ledger.said.training
    lines: list[RenderableType] = []

    def add(title: str, text: str, style: str = "") -> None:
        grid = Table.grid(padding=(0, 2, 0, 0))
        grid.add_column(width=9)
        grid.add_column(overflow="fold")
        grid.add_row(Text(title, style="dim"), Text(_safe(text, console), style=style))
        lines.append(grid)

    phases = [n for n in row if n.startswith("seconds/") and is_number(row[n])]
    if is_number(row.get("seconds")):
        means = {n: fmean(r[n] for r in followed.recent if n in r) for n in ["seconds", *phases]}
        parts = sorted(phases, key=lambda n: -means[n])
        words = [f"{number(means['seconds'])} a step"]
        words += [f"{n.removeprefix('seconds/')} {number(means[n])}" for n in parts]
        add("seconds", ", ".join(words))
    if predicted := _predicted(row, followed):
        add("predicted", predicted)
    if followed.faults:
        words = [f"{n.removeprefix('faults/')} {c:,}" for n, c in followed.faults.most_common()]
        add("faults", ", ".join(words) + f" (last at step {followed.fault_step})", "red")
    few, wide = (3, 2000) if height is None else (1, 2 * (console.width - 12))
    for step, warning in list(followed.warnings)[-few:]:
        text = f"step {step}: {warning}"
        add("warning", text if len(text) <= wide else f"{text[: wide - 4]} ...", "yellow")
    return lines


def _predicted(row: Mapping[str, Any], followed: Followed) -> str:
    """What was predicted of a step, beside what was measured in the newest rows."""
    words: list[str] = []
    for name, unit in UNITS.items():
        expected = row.get(PREFIX + name)
        measured = measured_of(name, list(followed.recent))
        if is_number(expected) and expected > 0 and measured is not None:
            text = f"{number(expected)} {unit}, measured {number(measured)} {unit}"
            words.append(f"{text} ({measured / expected - 1:+.0%})")
    return "; ".join(words)


def _answers(
    run: Watch, console: Console, prompt: tuple[int, int], answer: tuple[int, int], num: int = 2
) -> list[RenderableType]:
    """The best and the worst of the newest answers, with what was said of them."""
    if not run.picked:
        return []
    parts: list[RenderableType] = [
        Text(f"\n{run.title}", style="bold"),
        Text(run.summary, overflow="fold"),
    ]
    for title, one in run.picked[:num]:
        words = [
            title,
            describe_reward(one),
            f"{one.tokens} tokens",
            "cut at the limit" * one.was_cut,
        ]
        head = "  ".join(word for word in words if word)
        parts.append(Text(_safe(head, console), style="bold cyan", overflow="fold"))
        for text, limits, style in ((one.prompt, prompt, "dim"), (one.text, answer, "")):
            short = _safe(shortened(text, *limits), console, line=False)
            parts.append(
                Padding(Text(short or "(nothing)", style=style, overflow="fold"), (0, 0, 0, 4))
            )
    return parts
