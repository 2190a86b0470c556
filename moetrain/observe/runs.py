"""Run folders as they are found, whole or not: settings, last figures, curves' rows, warnings."""

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

from moetrain import files
from moetrain.config.yaml_text import parse_value
from moetrain.errors import ConfigError, MoetrainError, plural
from moetrain.observe.curves import Curves
from moetrain.observe.ledger import LedgerRow, is_number, is_row

PLAN = "sweep.jsonl"  # of a sweep's folder: one line a run
LOG = "train.log"  # what a sweep's run printed
TAIL_BYTES = 1 << 16
_MARKS = ("resolved.yaml", "ledger.jsonl", "checkpoints", LOG, "evals")


@dataclass(frozen=True)
class Run:
    """A run as its folder tells it. `curves` are its ledger's; `problems` say what is amiss."""

    name: str
    path: Path
    status: str
    curves: Curves = field(default_factory=Curves)
    settings: dict[str, Any] = field(default_factory=dict)  # dotted keys of resolved.yaml
    planned: dict[str, Any] = field(default_factory=dict)  # what the sweep meant to lay over it
    best: str | None = None
    scores: dict[str, float] = field(default_factory=dict)
    spreads: dict[str, float] = field(default_factory=dict)  # half of a score's 95 % interval
    counts: dict[str, int] = field(default_factory=dict)  # questions behind a score
    problems: list[str] = field(default_factory=list)
    num_steps: int | None = None

    @property
    def step(self) -> int:
        """The last step in the ledger; 0 when there is none."""
        return self.curves.step

    @property
    def final(self) -> dict[str, float]:
        """The last value of every figure; speed is the median over the steps."""
        return self.curves.final

    @property
    def warnings(self) -> list[tuple[int, str]]:
        """(step, text) of every row that carries a warning."""
        return self.curves.warnings


def last_row(folder: Path) -> LedgerRow:
    """The latest of every figure in the ledger's last rows, and the last step; {} when there is
    none. Reads the file's end only.
    """
    last: LedgerRow = {}
    try:
        with (folder / "ledger.jsonl").open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - TAIL_BYTES))
            lines = file.read().decode(errors="replace").split("\n")[:-1]
    except OSError:
        return last
    for line in lines[1:] if size > TAIL_BYTES else lines:
        row = _json(line)
        if is_row(row):
            last |= row
    return last


def num_steps(folder: Path) -> int | None:
    """How many steps the run has in all, once that is known."""
    try:
        content = _json((folder / "environment.json").read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError):
        return None
    value = cast(dict[str, Any], content).get("num_steps") if isinstance(content, dict) else None
    return value if is_row({"step": value}) else None


def find_runs(paths: Iterable[Path]) -> list[Run]:
    """The runs that `paths` are or hold, each once, with names that tell them apart.

    Planned runs of a sweep that have not begun are among them. Raises MoetrainError when a path is
    missing, or when none holds a run.
    """
    folders: dict[Path, dict[str, Any]] = {}
    given = list(paths)
    for path in given:
        if not path.is_dir():
            if path.is_file() and len(given) > 1:
                continue  # runs/* holds an earlier report too
            raise MoetrainError(f"{path}: no such folder. Give run folders, or a folder of them.")
        plan = _plan(path if not is_run(path) else path.parent)
        runs = [path] if is_run(path) else _runs_in(path, plan)
        if not runs:
            if len(given) > 1:
                continue  # as runs/* does, an export or a tokenizer
            raise MoetrainError(
                f"{path} holds no run (no resolved.yaml, no ledger.jsonl). Give a run_dir, or a"
                " folder of them such as a sweep's."
            )
        folders |= {folder.resolve(): plan.get(folder.name, {}) for folder in runs}
    if not folders:
        raise MoetrainError(
            f"None of {plural(len(given), 'path')} holds a run (resolved.yaml, ledger.jsonl). Give"
            " a run_dir, or a folder of them such as a sweep's."
        )
    names = _names(list(folders))
    return [
        read_run(folder, name, planned)
        for (folder, planned), name in zip(folders.items(), names, strict=True)
    ]


def is_run(folder: Path) -> bool:
    """Whether it has anything that a run leaves."""
    return any((folder / mark).exists() for mark in _MARKS)


def _runs_in(folder: Path, plan: Mapping[str, Any]) -> list[Path]:
    planned = [folder / name for name in plan]
    others = sorted(path for path in folder.iterdir() if path.is_dir() and is_run(path))
    return planned + [path for path in others if path not in planned]


def _plan(folder: Path) -> dict[str, dict[str, Any]]:
    """name -> overrides of a sweep's runs; {} for any other folder."""
    try:
        lines = (folder / PLAN).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return {}
    plan: dict[str, dict[str, Any]] = {}
    for content in map(_json, lines):
        if isinstance(content, dict) and _is_name(content.get("name")):
            line = cast(dict[str, Any], content)
            words: Any = line.get("overrides")
            pairs = [
                str(word).partition("=") for word in (words if isinstance(words, list) else [])
            ]
            plan[str(line["name"])] = {key: _value(text) for key, _, text in pairs}
    return plan


def _is_name(value: Any) -> bool:
    """Whether it can be that of a folder beside the plan."""
    if not isinstance(value, str) or not value or Path(value).name != value:
        return False
    try:
        return "\0" not in value and len(os.fsencode(value)) < 256
    except UnicodeError:
        return False


def _value(text: str) -> Any:
    """As a recipe reads it."""
    try:
        return parse_value(text, "")
    except ConfigError:
        return text


def _names(folders: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that differ from each other."""
    names = [folder.name for folder in folders]
    for depth in range(2, max((len(folder.parts) for folder in folders), default=0) + 1):
        counts = Counter(names)
        if len(counts) == len(names):
            break
        names = [
            "/".join(folder.parts[-depth:]) if counts[name] > 1 else name
            for name, folder in zip(names, folders, strict=True)
        ]
    return names


def read_run(folder: Path, name: str, planned: Mapping[str, Any] | None = None) -> Run:
    """Read a run's folder. Nothing that is missing or broken there raises: it becomes a problem."""
    problems: list[str] = []
    curves = _curves(folder / "ledger.jsonl", problems)
    total = num_steps(folder)
    scores, spreads, counts = _scores(folder / "evals", problems)
    return Run(
        name=name,
        path=folder,
        status=_status(folder, curves.step, total, problems),
        curves=curves,
        settings=settings_of(folder / "resolved.yaml", problems),
        planned=dict(planned or {}),
        best=_best(folder / "checkpoints" / "best.json", problems),
        scores=scores,
        spreads=spreads,
        counts=counts,
        problems=problems,
        num_steps=total,
    )


def _curves(path: Path, problems: list[str]) -> Curves:
    curves, num_lines, cut = Curves(), 0, False
    try:
        with path.open("rb") as file:
            for line in file:
                cut = not line.endswith(b"\n")
                num_lines += not cut
                if not cut and is_row(row := _json(line)):
                    curves.add(row)
    except FileNotFoundError:
        return curves
    except OSError as error:
        problems.append(f"ledger.jsonl is not readable ({type(error).__name__})")
        return Curves()
    if curves.num_rows < num_lines:
        missing = num_lines - curves.num_rows
        problems.append(f"ledger.jsonl: {missing} of {num_lines} lines are no rows")
    if cut:
        problems.append("ledger.jsonl: the last line is cut short")
    return curves


def _status(folder: Path, step: int, total: int | None, problems: list[str]) -> str:
    if is_locked(folder):
        return "running"
    if total is not None and step >= total:
        return "finished"
    failure = _failure(folder / LOG)
    if failure is not None:
        problems.append(failure)
        return "failed"
    if step:
        return "stopped" if total is not None else "unknown length"
    if not any((folder / mark).exists() for mark in _MARKS[:-1]) and is_run(folder):
        return "scores only"
    return "no steps" if is_run(folder) else "not started"


def is_locked(folder: Path) -> bool:
    """Whether a job holds the run (run/folder.py's lock)."""
    try:
        with (folder / ".lock").open("rb") as file:
            return not files.locked(file.fileno(), shared=True)
    except OSError:
        return False


def _failure(log: Path) -> str | None:
    """The error that a sweep's run ended with, when it did."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - TAIL_BYTES))
            text = file.read().decode(errors="replace")
    except OSError:
        return None
    lines = [line.strip() for line in text.rpartition("\n$ ")[2].splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("moetrain: error:")]
    if errors:
        return errors[-1].removeprefix("moetrain: error:").strip()
    return lines[-1] if any(line.startswith("Traceback") for line in lines) else None


def settings_of(path: Path, problems: list[str]) -> dict[str, Any]:
    """The dotted keys of a resolved.yaml; {} with a problem noted where it cannot be read."""
    try:
        text = path.read_text(encoding="utf-8")
        try:
            # The runs of a sweep differ in a section or two: the others are read once for all.
            parts = [_section(part) for part in re.split(r"^(?=\S)", text, flags=re.MULTILINE)]
            return {key: value for part in parts for key, value in part}
        except (TypeError, ConfigError):  # no sections, or they name each other
            content = parse_value(text, str(path))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, ConfigError) as error:
        problems.append(f"resolved.yaml is not readable ({type(error).__name__})")
        return {}
    return flatten(cast(dict[str, Any], content)) if isinstance(content, dict) else {}


@lru_cache(maxsize=10_000)
def _section(text: str) -> tuple[tuple[str, Any], ...]:
    """The settings in a part of a recipe. Raises TypeError for a part that is none."""
    content = parse_value(text, "resolved.yaml") or {}
    if not isinstance(content, dict):
        raise TypeError(text)
    return tuple(flatten(cast(dict[str, Any], content)).items())


def flatten(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in content.items():
        if isinstance(value, dict) and value:
            flat |= flatten(cast(dict[str, Any], value), f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _best(path: Path, problems: list[str]) -> str | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return f"{content['name']} ({content['metric']} {content['value']:.4g})"
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError, ArithmeticError, RecursionError):
        problems.append("checkpoints/best.json is not readable")
        return None


def _scores(
    folder: Path, problems: list[str]
) -> tuple[dict[str, float], dict[str, float], dict[str, int]]:
    """(scores, half of their intervals, questions) of `evals/*.json`: one `score` each, or several
    `scores` by name.
    """
    scores: dict[str, float] = {}
    spreads: dict[str, float] = {}
    counts: dict[str, int] = {}
    for path in sorted(folder.glob("*.json")):
        if path.name.endswith(".manifest.json"):
            continue
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            name = str(content["name"])
            for part, score in content.get("scores", {"": content}).items():
                key = f"{name} {part}".rstrip()
                scores[key] = float(score["score"])
                if "interval" in score:
                    low, high = score["interval"]
                    spreads[key] = (float(high) - float(low)) / 2
                if is_number(score.get("n")):
                    counts[key] = round(score["n"])
        except (
            OSError,
            ValueError,
            TypeError,
            KeyError,
            AttributeError,
            ArithmeticError,
            RecursionError,
        ):
            problems.append(f"evals/{path.name} has no name and score")
    return scores, spreads, counts


def _json(text: str | bytes) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
