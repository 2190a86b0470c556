"""Progress, and what happens without it: real processes that stand still. No torch."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from moetrain.cluster import launch, watchdog
from moetrain.cluster.watchdog import HUNG, Watch, Watchdog
from tests.test_launch import no_launcher  # noqa: F401  (a fixture for every test here)

HEAD = "import os, signal, sys, time\nfrom moetrain import pulse\npulse.listen()\n"
HEAD += "rank = int(os.environ['RANK'])\n"


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog, "WRITE_SECONDS", 0.5)
    monkeypatch.setattr(watchdog, "OTHERS_SECONDS", 0.0)


def run(does: str, watch: Watch | None) -> int:
    return launch.run_local([sys.executable, "-c", HEAD + does], 2, watch)


def test_stacks_of_every_rank(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """One rank is stopped, the other waits for it: both tell where they stand."""
    does = (
        "def waits_for_the_other():\n  while True: time.sleep(0.1)\n"
        "def stops():\n  os.kill(os.getpid(), signal.SIGSTOP)\n  time.sleep(60)\n"
        "pulse.beat()\nstops() if rank else waits_for_the_other()"
    )
    assert run(does, Watch(2.0, tmp_path / "stacks")) == HUNG
    first, second = ((tmp_path / f"stacks/rank_0000{i}.txt").read_text() for i in (0, 1))
    assert "waits_for_the_other" in first and "(stopped)" not in first
    assert "stops" in second and "(stopped)" in second
    err = capfd.readouterr().err
    assert "ranks 0, 1 have not moved for" in err and str(tmp_path / "stacks") in err


def test_slow_progress_is_progress(tmp_path: Path) -> None:
    does = "for _ in range(8):\n  time.sleep(0.5)\n  if not rank: pulse.beat()"
    assert run(does, Watch(3.0, tmp_path / "stacks")) == 0
    assert not (tmp_path / "stacks").exists()


def test_stacks_that_cannot_be_written(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert run("time.sleep(60)", Watch(0.5, tmp_path / "file" / "stacks")) == HUNG
    assert "could not be written" in capfd.readouterr().err


def test_all_nodes_write_at_the_same_time(tmp_path: Path) -> None:
    """Of two nodes one sees the hang, and a stopped rank there that must be woken to write; the
    other's rank, which moves whenever that one does, is ended too and has written its stacks.
    """
    does = (
        "beats = lambda: [(pulse.beat(), time.sleep(0.1)) for _ in range(600)]\n"
        "pulse.beat()\nos.kill(os.getpid(), signal.SIGSTOP) if rank == 1 else None\nbeats()"
    )
    code = (
        "import sys\nfrom pathlib import Path\nfrom moetrain.cluster import launch, watchdog\n"
        "watchdog.WRITE_SECONDS, watchdog.READ_SECONDS = 0.5, 0.2\n"
        f"watch = watchdog.Watch(float(sys.argv[1]), Path({str(tmp_path)!r}))\n"
        f"sys.exit(launch.run_local([sys.executable, '-c', {HEAD + does!r}], 1, watch))"
    )
    step = {"SLURM_STEP_NODELIST": "n[1-2]", "SLURM_STEP_NUM_NODES": "2", "SLURM_NTASKS": "2"}
    nodes = [
        subprocess.Popen(
            [sys.executable, "-c", code, seconds],
            env=os.environ | step | {"SLURM_NODEID": str(node)},
        )
        for node, seconds in enumerate(("100", "2"))
    ]
    assert [node.wait(30) for node in nodes] == [HUNG, HUNG]
    first, second = ((tmp_path / f"rank_0000{i}.txt").read_text() for i in (0, 1))
    assert "beats" in first or "<lambda>" in first
    assert "(stopped)" in second and "most recent call first" in second


def test_a_launcher_that_stood_still_itself_blames_nobody(tmp_path: Path) -> None:
    dog = Watchdog(Watch(10.0, tmp_path))
    assert not dog.hangs(moved=False)
    dog._looked -= 3600.0  # an hour since the last look
    assert not dog.hangs(moved=False)
    assert dog.quiet < 2


def test_beats_do_not_hold_a_rank_up(tmp_path: Path) -> None:
    """Neither a launcher that does not read nor one that is gone."""
    read, write = os.pipe()
    code = "from moetrain import pulse\npulse.listen()\nfor _ in range(300000): pulse.beat()"
    env = os.environ | {"MOETRAIN_PULSE_FD": str(write), "MOETRAIN_STACKS_FD": str(write)}
    started = time.monotonic()
    subprocess.run([sys.executable, "-c", code], env=env, pass_fds=(write,), timeout=60, check=True)
    os.close(read)
    subprocess.run([sys.executable, "-c", code], env=env, pass_fds=(write,), timeout=60, check=True)
    assert time.monotonic() - started < 60
    os.close(write)
