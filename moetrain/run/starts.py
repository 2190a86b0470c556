"""Why a run started each time, and how each start ended: `<run_dir>/starts.jsonl`. No torch.

A start is {"start": fresh | resumed | requeued, "step", ...}, written by the run; an end is {"end":
its exit code, "step": of the newest checkpoint, "crash", ...}, written by the batch script in a
Slurm job, elsewhere by `moetrain train`. A start without an end was killed, or lost with its node.
Order is that of the lines: no clock is asked.
"""

import json
import os
import platform
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from moetrain import files

StartRow = dict[str, Any]


def read_starts(run_dir: Path) -> list[StartRow]:
    """The rows so far; a line cut short by a kill is left out."""
    try:
        lines = (run_dir / "starts.jsonl").read_bytes().split(b"\n")
    except OSError:
        return []
    rows: list[StartRow] = []
    for line in lines:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def add_row(run_dir: Path, row: Mapping[str, Any]) -> None:
    """Append a row and wait until it is on disk. Raises OSError."""
    path = run_dir / "starts.jsonl"
    whole = not path.exists() or path.read_bytes()[-1:] in (b"", b"\n")
    with files.named(path), path.open("a", encoding="utf-8") as file:
        file.write(("" if whole else "\n") + json.dumps(dict(row) | _place()) + "\n")
        file.flush()
        os.fsync(file.fileno())


def record_start(run_dir: Path, step: int, damaged: Sequence[str] = ()) -> str:
    """Record a start from checkpoint `step` (0: none), and what was said of damaged ones; what to
    tell the user of it.
    """
    restart = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    why = "requeued" if restart else "resumed" if step else "fresh"
    note = {"damaged": list(damaged)} if damaged else {}
    add_row(run_dir, {"start": why, "step": step} | note)
    start = f"requeued (restart {restart} of Slurm job {_place()['job']})" if restart else why
    after = f", from step {step}" if step else ", from the beginning" if restart else ""
    return f"start {num_starts(run_dir)}: {start}{after}"


def num_starts(run_dir: Path) -> int:
    """How often the run has started so far."""
    return sum("start" in row for row in read_starts(run_dir))


def record_end(run_dir: Path, code: int, good: Sequence[int]) -> None:
    """Record how a start outside of Slurm ended; `good` are the exit codes of what is no crash."""
    if "SLURM_JOB_ID" in os.environ:
        return
    with suppress(OSError):  # a disk that takes no more: the run has said so
        step = saved_step(run_dir)
        add_row(run_dir, {"end": code, "step": step, "crash": code not in good})


def saved_step(run_dir: Path) -> int:
    """The step of the newest published checkpoint; 0 without one."""
    names = [path.name.removeprefix("step_") for path in run_dir.glob("checkpoints/step_*")]
    return max((int(name) for name in names if name.isdecimal()), default=0)


def streak(rows: list[StartRow], step: int) -> int:
    """How often the run has broken off since it came to checkpoint `step`, the newest."""
    count, later = 0, "end"
    for row in reversed(rows):
        is_start = "start" in row
        # A start whose next row is a start has no end: its node was lost.
        broke = later == "start" if is_start else bool(row.get("crash"))
        if row.get("step") != step or (not is_start and not broke):
            break
        count += broke
        later = "start" if is_start else "end"
    return count


def _place() -> StartRow:
    job = os.environ.get("SLURM_JOB_ID")
    place: StartRow = {"host": platform.node()}
    if job is not None:
        place |= {"job": int(job), "restart": int(os.environ.get("SLURM_RESTART_COUNT", "0"))}
    return place
