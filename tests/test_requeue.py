"""What comes after a job's step: the verdict, the account of what broke off, and why a run started.
No Slurm.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from moetrain.cluster.requeue import after, cause, judge
from moetrain.commands.train import _recorded
from moetrain.run.starts import add_row, read_starts, record_start, saved_step, streak


@pytest.fixture(autouse=True)
def no_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)


def start(step: int) -> dict[str, Any]:
    return {"start": "fresh", "step": step}


def crash(step: int) -> dict[str, Any]:
    return {"end": 137, "step": step, "crash": True}


@pytest.mark.parametrize(
    ("code", "told", "rows", "step", "says"),
    [
        (2, "nothing", [], 0, "stopped: a mistake"),
        (3, "USR1", [], 5, "stopped: the loss"),
        (143, "USR1", [start(0)], 7, "again in 0 s: its time was over, saved at step 7"),
        (143, "TERM", [start(4)], 7, "again in 0 s: Slurm said SIGTERM, saved at step 7"),
        # No step came of it: else a time limit that is too short would go on for ever.
        (143, "USR1", [start(7)], 7, "again in 60 s: its time was over, time 1 since checkpoint 7"),
        (137, "nothing", [start(0)], 0, "again in 60 s: exit code 137, time 1 since the beginning"),
        (75, "nothing", [start(0), crash(0), start(0)], 0, "again in 120 s: it hung, time 2"),
        (1, "nothing", [start(0), crash(0)] * 3, 0, "stopped: exit code 1; it broke off 4 times"),
        # A new checkpoint clears the account.
        (1, "nothing", [start(0), crash(0)] * 3, 5, "again in 60 s: exit code 1, time 1"),
        # A start without an end was lost with its node.
        (1, "nothing", [start(5), start(5)], 5, "again in 120 s: exit code 1, time 2"),
    ],
)
def test_verdicts(code: int, told: str, rows: list[dict[str, Any]], step: int, says: str) -> None:
    assert str(judge(code, told, rows, step, retries=3, pause=60)).startswith(says)


def test_pauses_grow_and_have_an_end() -> None:
    rows = [start(0), crash(0)] * 20
    assert judge(1, "nothing", rows, 0, retries=99, pause=60).seconds == 3600


@pytest.mark.parametrize(
    ("codes", "why"),
    [
        ([143, 143, 1], 1),
        ([143, 2, 143], 2),
        ([137, 75, 1], 75),
        ([143], 143),
        ([143, 143, 0], 143),
    ],
)
def test_who_was_ended_by_srun_says_nothing(codes: list[int], why: int) -> None:
    assert cause(codes) == why


def test_the_account_is_kept_beside_the_run(tmp_path: Path) -> None:
    """Killed at once each time, before there is a run folder."""
    run = tmp_path / "run"
    said = [str(after(run, 137, "nothing", 2, 10)) for _ in range(3)]
    assert [line.split(":")[0] for line in said] == ["again in 10 s", "again in 20 s", "stopped"]
    assert [row["end"] for row in read_starts(run)] == [137] * 3
    assert not (tmp_path / "other").exists() and after(tmp_path / "other", 2, "nothing", 2, 10)
    assert not (tmp_path / "other").exists(), "a mistake leaves nothing behind"


def test_why_it_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert record_start(tmp_path, 0) == "start 1: fresh"
    assert record_start(tmp_path, 4) == "start 2: resumed, from step 4"
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    line = "start 3: requeued (restart 2 of Slurm job 12), from step 8"
    assert record_start(tmp_path, 8, ["step_9 is damaged"]) == line
    rows = read_starts(tmp_path)
    assert [row["start"] for row in rows] == ["fresh", "resumed", "requeued"]
    assert rows[2]["damaged"] == ["step_9 is damaged"] and rows[2]["restart"] == 2


def test_an_end_is_of_its_own_start(tmp_path: Path) -> None:
    """A second job is refused while the first one runs: the first has not ended."""
    record_start(tmp_path, 0)
    with _recorded(tmp_path, is_rank=False) as end:
        end.code = 2
    assert [next(iter(row)) for row in read_starts(tmp_path)] == ["start"]
    with _recorded(tmp_path, is_rank=False) as end:
        record_start(tmp_path, 4)
        end.code = 143
    assert read_starts(tmp_path)[-1]["end"] == 143


def test_a_line_cut_short(tmp_path: Path) -> None:
    add_row(tmp_path, crash(3))
    with (tmp_path / "starts.jsonl").open("a") as file:
        file.write('{"end": 1')
    add_row(tmp_path, crash(3))
    assert streak(read_starts(tmp_path), 3) == 2


def test_the_saved_step_is_told_by_its_name(tmp_path: Path) -> None:
    """Not by a clock, which may jump: the older one has the later date."""
    import os

    for step, when in ((5, 4e9), (10, 1.0)):
        folder = tmp_path / "checkpoints" / f"step_{step:08d}"
        folder.mkdir(parents=True)
        os.utime(folder, (when, when))
    (tmp_path / "checkpoints" / "damaged_step_00000015").mkdir()
    assert saved_step(tmp_path) == 10
    assert json.dumps(saved_step(tmp_path / "none")) == "0"
