"""`moetrain report`: runs side by side, as one HTML page that needs nothing else, as CSV and in the
terminal.
"""

import csv
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

import moetrain
from moetrain import files
from moetrain.errors import MoetrainError
from moetrain.observe.curves import Series
from moetrain.observe.report_answers import MARK, section
from moetrain.observe.runs import Run, find_runs

# A page of ten long runs stays under a megabyte: so many numbers in all its curves and heat maps.
CURVE_NUMBERS, HEAT_NUMBERS = 90_000, 40_000
POINTS, HEAT_COLUMNS = (40, 250), (20, 120)  # fewest and most of a curve, of a heat map
_LAYER = re.compile(r"router/layer(\d+)/(\w+)")
_HEAT = "load_max_over_mean"
# Said of the machine and the optimizer rather than of what was learned.
_HEALTH = ("lr", "tokens", "seconds", "tokens_per_s", "memory_gib", "grad_norm", "eval_seconds")
# What runs are compared by stands before the rest of its group.
_FIRST = ("loss", "rewards/accuracies", "rewards/margins", "kl")
# In the terminal: so many runs, columns as wide as this, a table as wide as that where it goes into
# a file, and no columns of models' own configs. The page and the CSV have all.
PRINTED, CELL_WIDTH, FILE_WIDTH = 1000, 40, 120
_MODEL_CONFIG = "model.hf."
_UNPLOTTED = ("tokens", "seconds")
_OWN = ("run_dir",)  # differs by its nature

Cell = float | int | str | bool | None


@dataclass(frozen=True)
class Column:
    """A column of the table of runs. `better`: -1 when less is better, 1 when more is, 0 when who
    knows.
    """

    key: str
    group: str  # run, settings, evaluation, held out, training, health
    cells: list[Cell]
    better: int = 0


def write_report(paths: Sequence[Path], out: Path, table: Path | None = None) -> int:
    """Write the page and the CSV (by default beside it) of the runs at `paths`; print the table."""
    runs = find_runs(paths)
    table = table or out.with_suffix(".csv")
    if table == out:
        raise MoetrainError(f"-o {out} and the CSV are one file. Name the page .html.")
    columns = columns_of(runs)
    title = " · ".join(dict.fromkeys(path.resolve().name for path in paths))
    text = page(runs, columns, title if len(title) < 60 else "Runs")
    try:
        with files.publish(out) as (new_page,), files.publish(table) as (new_table,):
            new_page.write_bytes(text.encode("utf-8", "backslashreplace"))
            write_csv(columns, new_table)
    except OSError as error:
        raise MoetrainError(f"{error.filename}: {error.strerror}. Give another -o.") from None
    print_runs(runs, columns=columns)
    print(f"page: {out}   table: {table}")
    return 0


# The table


def columns_of(runs: Sequence[Run]) -> list[Column]:
    """What the runs are, what differs between their settings, and what came of them."""
    steps = [f"{r.step}/{r.num_steps}" if r.num_steps else str(r.step) for r in runs]
    columns = [
        Column("run", "run", [r.name for r in runs]),
        Column("status", "run", [r.status for r in runs]),
        Column("steps", "run", [*steps]),
        Column("warnings", "run", [len(r.warnings) or None for r in runs]),
    ]
    columns += [
        Column(key, "settings", [_shown(r.settings.get(key, r.planned.get(key))) for r in runs])
        for key in _keys([r.settings for r in runs] + [r.planned for r in runs])
        if key not in _OWN and _differs(key, runs)
    ]
    scores = _keys([r.scores for r in runs])
    for key in scores:
        columns.append(Column(key, "evaluation", [r.scores.get(key) for r in runs], 1))
        halves = [r.spreads.get(key) for r in runs]
        if any(_given([*halves])):  # what two runs' difference is to be held against
            columns.append(Column(f"{key} ±", "evaluation", [*halves]))
    finals = [r.final for r in runs]
    found: list[Column] = []
    for key in _keys(finals):
        if not _LAYER.fullmatch(key):
            found.append(Column(key, _group(key), [f.get(key) for f in finals], _better(key)))
    for group in ("held out", "training", "health"):
        columns += sorted((c for c in found if c.group == group), key=_rank)
    columns.append(Column("best checkpoint", "run", [r.best for r in runs]))
    return [c for c in columns if c.key in ("run", "status", "steps") or any(_given(c.cells))]


def _keys(mappings: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(key for mapping in mappings for key in mapping))


def _given(cells: Sequence[Cell]) -> list[bool]:
    return [cell is not None for cell in cells]


def _differs(key: str, runs: Sequence[Run]) -> bool:
    """Among the runs that have settings; one that has not begun says what it was to change."""
    first: list[str] = []
    for run in runs:
        if run.settings or key in run.planned:
            value = json.dumps((run.settings or run.planned).get(key), default=str)
            if value not in (first or [value]):
                return True
            first = [value]
    return False


def _shown(value: Any) -> Cell:
    if value is None or isinstance(value, str | int | float):
        return value
    return json.dumps(value, default=str)


def _group(key: str) -> str:
    if key in _HEALTH or key.startswith("router/"):
        return "health"
    return "held out" if key.startswith("eval_") else "training"


def _rank(column: Column) -> int:
    key = column.key.removeprefix("eval_")
    return _FIRST.index(key) if key in _FIRST else len(_FIRST)


def _better(key: str) -> int:
    if "loss" in key and not key.startswith("router/"):
        return -1
    return 1 if "accurac" in key else 0


def write_csv(columns: Sequence[Column], path: Path) -> None:
    """One row a run, one column a `Column`; what a run lacks is empty."""
    with path.open("w", encoding="utf-8", errors="backslashreplace", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([column.key for column in columns])
        writer.writerows(zip(*(column.cells for column in columns), strict=True))


def print_runs(
    runs: Sequence[Run], console: Console | None = None, columns: Sequence[Column] | None = None
) -> None:
    """Print the table of the first PRINTED runs: as many of its columns as the terminal is wide,
    measures of the machine and what models' configs are made of left out.
    """
    console = console or Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, file=console.file, width=FILE_WIDTH)
    columns = [c for c in columns or columns_of(runs) if c.group != "health"]
    nested = sum(c.key.startswith(_MODEL_CONFIG) for c in columns)
    columns = [c for c in columns if not c.key.startswith(_MODEL_CONFIG)]
    texts = [[c.key, *(_text(cell) for cell in c.cells[:PRINTED])] for c in columns]
    widths = [min(max(map(len, column)), CELL_WIDTH) + 3 for column in texts]
    fits = max(2, sum(sum(widths[: i + 1]) < console.width for i in range(len(widths))))
    table = Table()
    for column in columns[:fits]:
        is_number = any(isinstance(cell, int | float) for cell in column.cells)
        justify = "right" if is_number else "left"
        table.add_column(Text(column.key), justify=justify, overflow="fold", max_width=CELL_WIDTH)
    for row in zip(*(column[1:] for column in texts[:fits]), strict=True):
        table.add_row(*(Text(text) for text in row))
    console.print(table)
    left = [column.key for column in columns[fits:]]
    left += [f"{_MODEL_CONFIG}* ({nested})"] * (nested > 0)
    if left:
        console.print(f"not shown: {', '.join(left)}", markup=False, soft_wrap=True)
    if len(runs) > PRINTED:
        console.print(f"not shown: {len(runs) - PRINTED} more runs")
    for run in runs[:PRINTED]:
        for problem in run.problems:
            console.print(f"{run.name}: {problem}", markup=False, soft_wrap=True)
        for step, text in run.warnings[-1:]:
            count = f" ({len(run.warnings)} in all)" if len(run.warnings) > 1 else ""
            console.print(
                f"{run.name}: warning at step {step}: {text}{count}", markup=False, soft_wrap=True
            )


def _text(cell: Cell) -> str:
    if cell is None:
        return "-"
    return f"{cell:.5g}" if isinstance(cell, float) else str(cell)


# The page


def page(runs: Sequence[Run], columns: Sequence[Column], title: str) -> str:
    """The HTML of the runs: the template beside this file with their data in it."""
    template = Path(__file__).with_name("report.html").read_text(encoding="utf-8")
    text = json.dumps(_data(runs, columns, title), separators=(",", ":"), ensure_ascii=False)
    # What would end the script element, or is no line of JavaScript, within a name.
    text = text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    return template.replace('"MOETRAIN_DATA"', text).replace(MARK, section(runs))


def _data(runs: Sequence[Run], columns: Sequence[Column], title: str) -> dict[str, Any]:
    series = [_series(run) for run in runs]
    num_curves = sum(map(len, series))
    points = _within(CURVE_NUMBERS // (3 * max(1, num_curves)), POINTS)
    # As many neighbours in a point for every run: else a short one looks noisier than it is.
    strides = {
        key: math.ceil(max(len(own.get(key, ())) for own in series) / points)
        for key in _keys(series)
    }
    grids: dict[tuple[int, ...], int] = {}
    layers = [_layers(run) for run in runs]
    heat_columns = _within(HEAT_NUMBERS // max(1, sum(map(len, layers))), HEAT_COLUMNS)
    shared = [r.settings for r in runs if r.settings]
    out_runs = [
        {
            "name": run.name,
            "path": str(run.path),
            "status": run.status,
            "has_settings": bool(run.settings),
            "problems": run.problems,
            "warnings": run.warnings,
            "curves": {key: _curve(values, strides[key], grids) for key, values in own.items()},
            "heat": _heat(own_layers, heat_columns),
        }
        for run, own, own_layers in zip(runs, series, layers, strict=True)
    ]
    return {
        "title": title,
        "made": datetime.now().strftime("%Y-%m-%d %H:%M"),
        "version": moetrain.__version__,
        "columns": [
            {"key": c.key, "group": c.group, "better": c.better, "cells": [*map(_json, c.cells)]}
            for c in columns
        ],
        "runs": out_runs,
        "grids": [list(grid) for grid in grids],
        "shared": {
            key: _shown(value)
            for key, value in (shared[0] if shared else {}).items()
            if key not in _OWN and not _differs(key, runs)
        },
    }


def _json(cell: Cell) -> Cell:
    """NaN is no JSON; infinities are none either."""
    if isinstance(cell, float) and not math.isfinite(cell):
        return str(cell)
    return float(f"{cell:.6g}") if isinstance(cell, float) else cell


def _within(value: int, bounds: tuple[int, int]) -> int:
    return max(bounds[0], min(bounds[1], value))


def _select(run: Run, wanted: Callable[[str], bool]) -> dict[str, Series]:
    """Every wanted figure, where it is a number."""
    found = {key: own.finite() for key, own in run.curves.figures.items() if wanted(key)}
    return {key: own for key, own in found.items() if len(own)}


def _series(run: Run) -> dict[str, Series]:
    return _select(run, lambda key: key not in _UNPLOTTED and not _LAYER.fullmatch(key))


def _layers(run: Run) -> dict[int, Series]:
    def is_heat(key: str) -> bool:
        match = _LAYER.fullmatch(key)
        return match is not None and match[2] == _HEAT

    found = {int(key.split("/")[1].removeprefix("layer")): s
             for key, s in _select(run, is_heat).items()}  # fmt: skip
    return dict(sorted(found.items()))


def _curve(
    series: Series, stride: int, grids: dict[tuple[int, ...], int]
) -> dict[str, int | list[float]]:
    """A thinned curve: means of `stride` neighbours, and their least and greatest.

    `g` is the number of its steps in `grids`, which curves of one run share.
    """
    starts = range(0, len(series), stride)
    steps = tuple(series.steps[i : i + stride][-1] for i in starts)
    curve: dict[str, int | list[float]] = {"g": grids.setdefault(steps, len(grids))}
    values = [series.values[i : i + stride] for i in starts]
    curve["m"] = [_short(sum(v) / len(v)) for v in values]
    if stride > 1:
        curve |= {"lo": [_short(min(v)) for v in values], "hi": [_short(max(v)) for v in values]}
        curve["n"] = stride
    return curve


def _short(value: float) -> float:
    return float(f"{value:.5g}")


def _heat(layers: dict[int, Series], columns: int) -> dict[str, Any] | None:
    """Router load by layer (rows) and time (columns): means over neighbours, in hundredths."""
    if not layers:
        return None
    series = list(layers.values())
    longest = max(series, key=len)
    stride = math.ceil(len(longest) / columns)
    parts = [slice(i, i + stride) for i in range(0, len(longest), stride)]
    return {
        "layers": list(layers),
        "steps": [longest.steps[part][-1] for part in parts],
        "rows": [
            [_hundredths(s.values[part]) for part in parts]
            for s in series
        ],
    }  # fmt: skip


def _hundredths(values: Sequence[float]) -> int:
    """Of their mean; 0 where there is none, or none that is a number."""
    mean = sum(values) / len(values) if values else 0.0
    return round(100 * mean) if abs(mean) < 1e9 else 0
