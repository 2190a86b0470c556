"""The table of runs: what they are, what came of them, what differs between their settings."""

import csv
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moetrain.observe.figures import first_figures, interval
from moetrain.observe.runs import Run

LAYER = re.compile(r"router/layer(\d+)/(\w+)")
OWN = ("run_dir",)  # differs by its nature
SETTINGS = 8  # that differ and stand before all other figures; a table of more is not read
# Said of the machine and the optimizer rather than of what was learned.
_HEALTH = ("lr", "tokens", "seconds", "tokens_per_s", "memory_gib", "grad_norm", "eval_seconds")
# Settings that a held-out figure does not depend on but through the weights; all others of their
# sections define what it is a mean of.
_HELD_OUT_BY = ("data.", "rewards", "train.eval_packs", "method.name")
_HELD_OUT_BY += ("rollout.eval_prompts", "rollout.eval_temperature", "rollout.max_tokens")
_HELD_OUT_BY += ("rollout.repetition_penalty", "rollout.stop")
_DRAWN_BY = ("rollout.top_p", "rollout.top_k", "rollout.min_p")  # where answers are not greedy
_TRAINED_BY = ("train", "weights", "take", "demonstrations", "pack", "share_prompt", "cache",
               "reference", "shuffle", "max_rejected", "num_workers")  # fmt: skip
_TRAINED_ON = {f"data.{name}" for name in _TRAINED_BY}
# And a loss on what it is a function of: beta scales it, and tokens are a tokenizer's.
_LOSS_BY = ("method.", "model.path", "model.hf", "model.tokenizer")

Cell = float | int | str | bool | None


@dataclass(frozen=True)
class Column:
    """A column of the table of runs. `better`: -1 when less is better, 1 when more is, 0 when who
    knows. `halves` and `nums`: half of the 95 % intervals of its cells, and of how many they are.
    `best`: the run that is clearly the best, where the runs can be compared by this figure.
    """

    key: str
    group: str  # run, evaluation, held out, training, settings, more, health
    cells: list[Cell]
    better: int = 0
    halves: list[float | None] = field(default_factory=list[float | None])
    nums: list[int | None] = field(default_factory=list[int | None])
    best: int | None = None


def first_of(runs: Sequence[Run]) -> tuple[str, ...]:
    """What the runs' methods are about."""
    methods = [run.settings.get("method.name", run.settings.get("method")) for run in runs]
    names = dict.fromkeys(name for name in methods if isinstance(name, str))
    return first_figures(names or ["sft"])


def columns_of(runs: Sequence[Run]) -> list[Column]:
    """What the runs are, what came of them, what differs between their settings, and the rest."""
    steps = [f"{r.step}/{r.num_steps}" if r.num_steps else str(r.step) for r in runs]
    columns = [
        Column("run", "run", [r.name for r in runs]),
        Column("status", "run", [r.status for r in runs]),
        Column("steps", "run", [*steps]),
        Column("warnings", "run", [len(r.warnings) or None for r in runs]),
    ]
    figures = _figures(runs)
    for group in ("evaluation", "held out", "training"):
        columns += [column for column in figures if column.group == group]
    columns += _settings(runs)
    for group in ("more", "health"):
        columns += [column for column in figures if column.group == group]
    columns.append(Column("best checkpoint", "run", [r.best for r in runs]))
    return [c for c in columns if c.key in ("run", "status", "steps") or any(_given(c.cells))]


def _settings(runs: Sequence[Run]) -> list[Column]:
    """What differs. Of runs that have little in common, what few of them have at all comes last."""
    keys = keys_of([r.settings for r in runs] + [r.planned for r in runs])
    keys = [key for key in keys if key not in OWN and differs(key, runs)]
    common = [key for key in keys if all(key in (r.settings or r.planned) for r in runs)]
    first = keys if len(keys) <= SETTINGS else common[:SETTINGS]
    return [
        Column(
            key,
            "settings" if key in first else "more",
            [shown(r.settings.get(key, r.planned.get(key))) for r in runs],
        )
        for key in [*first, *(key for key in keys if key not in first)]
    ]


def _figures(runs: Sequence[Run]) -> list[Column]:
    """Scores and the last of every figure, those that the methods are about first."""
    finals, first = [r.final for r in runs], first_of(runs)
    changed = {key for key in keys_of([r.settings for r in runs]) if differs(key, runs)}
    columns = [
        _judged(
            Column(
                key,
                "evaluation",
                [r.scores.get(key) for r in runs],
                1,
                [r.spreads.get(key) for r in runs],
                [r.counts.get(key) for r in runs],
            )
        )
        for key in keys_of([r.scores for r in runs])
    ]
    names = [key for key in keys_of(finals) if not LAYER.fullmatch(key)]
    places = {name: i for i, name in enumerate(first)}
    for key in sorted(names, key=lambda n: places.get(n.removeprefix("eval_"), len(places))):
        sure = [interval(row, key) for row in finals]
        column = Column(
            key,
            _group(key, first),
            [row.get(key) for row in finals],
            _better(key),
            [s and s[1] for s in sure] if any(sure) else [],
            [s and s[0] for s in sure] if any(sure) else [],
        )
        columns.append(_judged(column) if _comparable(key, changed, runs) else column)
    return columns


def _judged(column: Column) -> Column:
    """With its best run, where that is further from the next than chance would put it; what of a
    rate without an interval nobody knows.
    """
    values = {i: v for i, v in enumerate(column.cells) if isinstance(v, int | float)}
    values = {i: v for i, v in values.items() if math.isfinite(v)}
    order = sorted(values, key=lambda i: -column.better * values[i])
    if not column.better or len(order) < 2:
        return column
    first, second = order[:2]
    halves = [column.halves[i] or 0.0 if column.halves else 0.0 for i in (first, second)]
    if column.better > 0 and not all(halves):
        return column
    if abs(values[first] - values[second]) <= math.hypot(*halves):
        return column
    return Column(**{**vars(column), "best": first})


def _comparable(key: str, changed: set[str], runs: Sequence[Run]) -> bool:
    """Whether a held-out figure means the same for all runs. Of training there is the last batch
    alone, which is another's.
    """
    if not key.startswith("eval_") or not all(r.settings for r in runs if key in r.final):
        return False
    by = _HELD_OUT_BY + (_LOSS_BY if "loss" in key else ())
    by += _DRAWN_BY if any(r.settings.get("rollout.eval_temperature") for r in runs) else ()
    drawn = ("data.eval_share", "train.eval_packs", "rollout.eval_prompts")
    if "seed" in changed and any(r.settings.get(name) for r in runs for name in drawn):
        return False  # each seed has drawn held-out records of its own
    return not any(
        changed_key.startswith(by) and changed_key not in _TRAINED_ON for changed_key in changed
    )


def _group(key: str, first: Sequence[str]) -> str:
    if key in _HEALTH or key.startswith(("router/", "predicted/")):
        return "health"
    if key.removeprefix("eval_") not in first:
        return "more"
    return "held out" if key.startswith("eval_") else "training"


def _better(key: str) -> int:
    if "loss" in key and not key.startswith("router/"):
        return -1
    return 1 if "accurac" in key or key.endswith("reward/mean") else 0


def keys_of(mappings: Sequence[Mapping[str, Any]]) -> list[str]:
    """The keys of all, in the order in which they come."""
    return list(dict.fromkeys(key for mapping in mappings for key in mapping))


def _given(cells: Sequence[Cell]) -> list[bool]:
    return [cell is not None for cell in cells]


def differs(key: str, runs: Sequence[Run]) -> bool:
    """Among the runs that have settings; one that has not begun says what it was to change."""
    first: list[str] = []
    for run in runs:
        if run.settings or key in run.planned:
            value = json.dumps((run.settings or run.planned).get(key), default=str)
            if value not in (first or [value]):
                return True
            first = [value]
    return False


def shown(value: Any) -> Cell:
    """A setting in a cell."""
    if value is None or isinstance(value, str | int | float):
        return value
    return json.dumps(value, default=str)


def write_csv(columns: Sequence[Column], path: Path) -> None:
    """One row a run, one column a `Column`, and behind a figure with intervals half of them and of
    how many it is; what a run lacks is empty.
    """
    parts: dict[str, Sequence[Cell]] = {}
    for column in columns:
        parts[column.key] = column.cells
        for mark, cells in (("±", column.halves), ("n", column.nums)):
            if any(_given(cells)):
                parts[f"{column.key} {mark}"] = cells
    with path.open("w", encoding="utf-8", errors="backslashreplace", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(parts)
        writer.writerows(zip(*parts.values(), strict=True))
