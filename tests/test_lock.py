"""One job to a run folder: the kernel's lock, and the lease for other nodes."""

import fcntl
import json
import os
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from moetrain.errors import ConfigError
from moetrain.run import lock as lock_module
from moetrain.run.lock import LEASE, Lease, RunLock


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Lease]]:
    """In these tests pytest is the holder, which a lost lease would end without a word: it fails
    the test instead.
    """
    lost: list[Lease] = []
    monkeypatch.setattr(RunLock, "_stop_writing", lambda self, holder: lost.append(holder))
    monkeypatch.setattr(RunLock, "PATIENCE", 0.6)
    monkeypatch.setattr(RunLock, "BEAT", 0.05)
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
    yield lost
    assert lost == []


@pytest.fixture
def without_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system whose locks stay on a node: another node's are not seen."""

    def refuses(*args: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuses)


def test_a_folder_in_use_is_refused(tmp_path: Path) -> None:
    RunLock(tmp_path / "new").take()
    assert not (tmp_path / "new").exists()
    holder = RunLock(tmp_path)
    holder.take()
    holder.take()
    with pytest.raises(ConfigError, match=rf"in use by process {os.getpid()} on"):
        RunLock(tmp_path).take()
    holder.release()
    RunLock(tmp_path).take()


def test_a_released_lease_is_not_missed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hasty: list[Lease]
) -> None:
    """Its holder may be looking at it just as it is released and the next job takes it."""
    looks, taken, looked = threading.Event(), threading.Event(), threading.Event()
    read = lock_module._read

    def slowly(path: Path) -> Lease:
        if threading.current_thread().name != "lease":
            return read(path)
        looks.set()
        assert taken.wait(30)
        try:
            return read(path)
        finally:
            looked.set()

    monkeypatch.setattr(lock_module, "_read", slowly)
    holder, following = RunLock(tmp_path), RunLock(tmp_path)
    holder.take()
    assert looks.wait(30)
    holder.release()
    following.take()
    taken.set()
    assert looked.wait(30)
    time.sleep(0.05)  # for what it makes of that
    assert hasty == []
    following.release()


def test_another_node_is_refused(
    tmp_path: Path, without_locks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    holder = RunLock(tmp_path)
    holder.take()
    monkeypatch.setattr(platform, "node", lambda: "elsewhere")
    started = time.monotonic()
    with pytest.raises(ConfigError, match=r"in use by process .* on "):
        RunLock(tmp_path).take()
    assert time.monotonic() - started < RunLock.PATIENCE, "its count goes up: no need to wait"
    holder.release()
    assert not (tmp_path / LEASE).exists()


def abandoned(folder: Path, **changes: object) -> None:
    """What a job leaves that was killed on another node."""
    lease = {"token": "t", "host": "gone", "boot": "b", "process": 1, "count": 7}
    (folder / LEASE).write_text(json.dumps(lease | changes))


def test_an_abandoned_lease_runs_out(tmp_path: Path) -> None:
    abandoned(tmp_path)
    started = time.monotonic()
    lock = RunLock(tmp_path)
    lock.take()
    assert time.monotonic() - started > RunLock.PATIENCE
    assert json.loads((tmp_path / LEASE).read_text())["host"] == platform.node()
    lock.release()
    (tmp_path / LEASE).write_text("")  # killed in between making it and writing it
    RunLock(tmp_path).take()


def test_a_requeued_job_knows_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On whatever nodes it starts again, it need not wait for its own lease to run out."""
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    monkeypatch.setattr(RunLock, "PATIENCE", 60.0)
    abandoned(tmp_path, job="7", restart=0)
    started = time.monotonic()
    RunLock(tmp_path).take()
    assert time.monotonic() - started < 5


def test_one_of_many_wins(tmp_path: Path, without_locks: None) -> None:
    """Threads stand for nodes: all see an abandoned lease run out at the same moment."""
    from concurrent.futures import ThreadPoolExecutor

    abandoned(tmp_path)
    locks = [RunLock(tmp_path) for _ in range(8)]

    def wins(lock: RunLock) -> bool:
        try:
            lock.take()
        except ConfigError:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(wins, locks)) == 1


def test_who_was_given_up_stops_writing(tmp_path: Path) -> None:
    """A node that stood still for minutes must not go on beside the job that took its place."""
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom moetrain.run.lock import RunLock\n"
        "RunLock.BEAT = 0.05\nRunLock(Path(sys.argv[1])).take()\nprint('held', flush=True)\n"
        "time.sleep(60)"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as held:
        assert held.stdout is not None and held.stdout.readline() == "held\n"
        (tmp_path / LEASE).unlink()
        abandoned(tmp_path, token="another")
        _, err = held.communicate(timeout=30)
    assert held.returncode == 2 and "in use by process 1 on gone" in err
