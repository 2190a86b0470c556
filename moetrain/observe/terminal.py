"""The table of runs in a terminal: what was measured first, then the settings that differ."""

import re
from collections import Counter
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from moetrain.errors import plural
from moetrain.observe.answers import harmless
from moetrain.observe.figures import half, number
from moetrain.observe.runs import Run
from moetrain.observe.table import Cell, Column, columns_of

# So many runs, names and values as wide as this, heads too, a table as wide as that where it goes
# into a file, and no columns of models' own configs. The page and the CSV have all.
PRINTED, CELL_WIDTH, HEAD_WIDTH, FILE_WIDTH = 1000, 40, 13, 120
_MODEL_CONFIG = "model.hf."
_SAME_FOR_ALL = ("status", "steps")  # said once


def print_runs(
    runs: Sequence[Run], console: Console | None = None, columns: Sequence[Column] | None = None
) -> None:
    """Print the table of the first PRINTED runs, as many of its columns as the terminal is wide:
    held-out figures first (training ones, where there are none), then the settings that differ.
    Measures of the machine and what models' configs are made of are left out.
    """
    console = console or Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, file=console.file, width=FILE_WIDTH)
    columns = [c for c in columns or columns_of(runs) if c.group != "health"]
    nested = sum(c.key.startswith(_MODEL_CONFIG) for c in columns)
    columns = [c for c in columns if not c.key.startswith(_MODEL_CONFIG)]
    judged = [c for c in columns if c.group in ("evaluation", "held out")]
    judged = judged or [c for c in columns if c.group == "training"]
    first = [c for c in columns if c.group == "run" and c.key != "best checkpoint"] + judged
    first += [c for c in columns if c.group == "settings"]
    columns = first + [c for c in columns if c not in first]
    alike = [c for c in columns if c.key in _SAME_FOR_ALL and len(set(c.cells)) == 1]
    columns = [c for c in columns if c not in alike]
    widest = max(20, min(CELL_WIDTH, console.width // 3))
    texts = [_texts(column, widest) for column in columns]
    widths = [max(len(line) for text in cells for line in text.split("\n")) + 3 for cells in texts]
    fits = max(2, sum(sum(widths[: i + 1]) < console.width for i in range(len(widths))))
    table = Table()
    for column, text in zip(columns[:fits], texts, strict=False):
        is_number = any(isinstance(cell, int | float) for cell in column.cells)
        table.add_column(Text(text[0]), justify="right" if is_number else "left", overflow="fold")
    for row in zip(*(text[1:] for text in texts[:fits]), strict=True):
        table.add_row(*map(Text, row))
    _say(console, _about(runs, alike))
    console.print(table)
    left = [column.key for column in columns[fits:]]
    left += [f"{_MODEL_CONFIG}* ({nested})"] * (nested > 0)
    if left:
        _say(console, f"not shown: {', '.join(left)}")
    if len(runs) > PRINTED:
        _say(console, f"not shown: {len(runs) - PRINTED} more runs")
    for run in runs[:PRINTED]:
        for problem in run.problems:
            _say(console, f"{run.name}: {problem}")
        for step, text in run.warnings[-1:]:
            count = f" ({len(run.warnings)} in all)" if len(run.warnings) > 1 else ""
            _say(console, f"{run.name}: warning at step {step}: {text}{count}")


def _say(console: Console, line: str) -> None:
    """A terminal would break a long line within a word; a file keeps it as one."""
    console.print(harmless(line), markup=False, soft_wrap=not console.is_terminal)


def _about(runs: Sequence[Run], alike: Sequence[Column]) -> str:
    states = Counter(run.status for run in runs)
    steps = [f"steps {column.cells[0]}" for column in alike if column.key == "steps"]
    counts = ", ".join([*(f"{count} {status}" for status, count in states.items()), *steps])
    return f"{plural(len(runs), 'run')}: {counts}"


def _texts(column: Column, widest: int) -> list[str]:
    """The head and the cells, in lines. The head has the unit that all cells share."""
    nums = {num for num in column.nums if num is not None}
    head = broken(column.key, HEAD_WIDTH) + (f"\nof {min(nums):,}" if len(nums) == 1 else "")
    texts: list[str] = []
    for i, cell in enumerate(column.cells[:PRINTED]):
        text = _text(cell, column.group)
        if column.halves and column.halves[i] is not None:
            text += f" ±{half(column.halves[i] or 0.0)}"
            text += f" of {column.nums[i]:,}" if len(nums) > 1 and column.nums[i] else ""
        texts.append(broken(harmless(text), widest))
    return [head, *texts]


def broken(text: str, width: int) -> str:
    """In lines of `width` at most that end where a name does, else where a part of it does; only a
    part that is longer is cut.
    """
    lines = [""]
    for piece in _pieces(text, width, ("/_, ", "=.-")):
        if len(lines[-1]) + len(piece) > width and lines[-1]:
            lines.append("")
        lines[-1] += piece
    return "\n".join(line.rstrip(" ") for line in lines)


def _pieces(text: str, width: int, marks: tuple[str, ...]) -> list[str]:
    if not marks:
        return [text[i : i + width] for i in range(0, len(text), width)]
    pieces = re.findall(rf"[^{marks[0]}]+[{marks[0]}]?|[{marks[0]}]", text, re.DOTALL)
    parts = (_pieces(one, width, marks[1:]) if len(one) > width else [one] for one in pieces)
    return [part for parts_of in parts for part in parts_of]


def _text(cell: Cell, group: str) -> str:
    if cell is None:
        return "-"
    if not isinstance(cell, float):
        return str(cell)
    return f"{cell:.6g}" if group == "settings" else number(cell)
