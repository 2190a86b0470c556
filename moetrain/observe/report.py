"""`moetrain report`: runs side by side, as one HTML page that needs nothing else, as CSV and in the
terminal.
"""

import json
import math
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import moetrain
from moetrain import files
from moetrain.errors import MoetrainError
from moetrain.observe import report_answers, report_memory, report_trajectories
from moetrain.observe.curves import Series
from moetrain.observe.runs import Run, find_runs
from moetrain.observe.table import (
    LAYER,
    OWN,
    Cell,
    Column,
    columns_of,
    differs,
    first_of,
    keys_of,
    shown,
    write_csv,
)
from moetrain.observe.terminal import print_runs

# A page of ten long runs stays under a megabyte: so many numbers in all its curves and heat maps.
CURVE_NUMBERS, HEAT_NUMBERS = 90_000, 40_000
POINTS, HEAT_COLUMNS = (40, 250), (20, 120)  # fewest and most of a curve, of a heat map
_HEAT = "load_max_over_mean"
_UNPLOTTED = ("tokens", "seconds")
PAGE = "report.html"


def write_report(paths: Sequence[Path], out: Path | None = None, table: Path | None = None) -> int:
    """Write the page and the CSV (by default beside it) of the runs at `paths`; print the table.
    Without `out` it goes into the folder that was given; where several were, into this one.
    """
    runs = find_runs(paths)
    out = out or (paths[0] / PAGE if len(paths) == 1 else Path(PAGE))
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


# The page


def page(runs: Sequence[Run], columns: Sequence[Column], title: str) -> str:
    """The HTML of the runs: the template beside this file with their data in it."""
    template = Path(__file__).with_name("report.html").read_text(encoding="utf-8")
    text = json.dumps(_data(runs, columns, title), separators=(",", ":"), ensure_ascii=False)
    # What would end the script element, or is no line of JavaScript, within a name.
    text = text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    template = template.replace('"MOETRAIN_DATA"', text)
    for part in (
        report_memory,
        report_answers,
        report_trajectories,
    ):  # whose texts are escaped: they hold no mark
        template = template.replace(part.MARK, part.section(runs))
    return template


def _data(runs: Sequence[Run], columns: Sequence[Column], title: str) -> dict[str, Any]:
    series = [_series(run) for run in runs]
    num_curves = sum(map(len, series))
    points = _within(CURVE_NUMBERS // (3 * max(1, num_curves)), POINTS)
    # As many neighbours in a point for every run: else a short one looks noisier than it is.
    strides = {
        key: math.ceil(max(len(run_series.get(key, ())) for run_series in series) / points)
        for key in keys_of(series)
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
            "curves": {
                key: _curve(values, strides[key], grids) for key, values in run_series.items()
            },
            "heat": _heat(own_layers, heat_columns),
        }
        for run, run_series, own_layers in zip(runs, series, layers, strict=True)
    ]
    return {
        "title": title,
        "made": datetime.now().strftime("%Y-%m-%d %H:%M"),
        "version": moetrain.__version__,
        "columns": [
            {
                "key": c.key,
                "group": c.group,
                "better": c.better,
                "best": c.best,
                "cells": [*map(_json, c.cells)],
                "halves": [*map(_json, c.halves)],
                "nums": c.nums,
            }
            for c in columns
        ],
        "first": first_of(runs),
        "runs": out_runs,
        "grids": [list(grid) for grid in grids],
        "shared": {
            key: shown(value)
            for key, value in (shared[0] if shared else {}).items()
            if key not in OWN and not differs(key, runs)
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
    selected = {key: series.finite() for key, series in run.curves.figures.items() if wanted(key)}
    return {key: series for key, series in selected.items() if len(series)}


def _series(run: Run) -> dict[str, Series]:
    return _select(run, lambda key: key not in _UNPLOTTED and not LAYER.fullmatch(key))


def _layers(run: Run) -> dict[int, Series]:
    def is_heat(key: str) -> bool:
        match = LAYER.fullmatch(key)
        return match is not None and match[2] == _HEAT

    layers = {int(key.split("/")[1].removeprefix("layer")): s
             for key, s in _select(run, is_heat).items()}  # fmt: skip
    return dict(sorted(layers.items()))


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
