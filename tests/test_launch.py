"""The launcher, with real processes that are signalled, fail and are killed. No torch."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from moetrain.cluster import launch
from moetrain.errors import ConfigError

ROOT = Path(__file__).parent.parent
# A rank of the tests below; what it does comes after.
HEAD = "import os, signal, sys, time; rank = int(os.environ['RANK']); "
SLEEP = "time.sleep(300)"  # longer than any wait below: no rank ends in time by itself


def rank(does: str) -> list[str]:
    return [sys.executable, "-S", "-c", HEAD + "\n" + does]


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests may themselves run in a job."""
    for name in list(os.environ):
        if name.startswith("SLURM_") or name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
            monkeypatch.delenv(name)
    monkeypatch.setattr(launch, "GRACE_SECONDS", 0.4)


# Ranks that are there already

STEP = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NTASKS": "4",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
}


def test_torchrun() -> None:
    env = {"RANK": "1", "WORLD_SIZE": "2"}
    assert launch.joined(None, env) == 2
    assert launch.joined(2, env) == 2
    with pytest.raises(ConfigError, match=r"--nproc 3, but .* 2 ranks"):
        launch.joined(3, env)
    assert launch.joined(3, {"WORLD_SIZE": "2"}) is None
    # torchrun inside srun: the inner launcher's numbers stand
    assert launch.joined(None, STEP | env) == 2


def test_srun() -> None:
    env = dict(STEP)
    assert launch.joined(None, env) == 4
    assert (env["RANK"], env["LOCAL_RANK"], env["WORLD_SIZE"]) == ("3", "1", "4")
    assert env["MASTER_ADDR"] == "gpu07"
    assert 20000 <= int(env["MASTER_PORT"]) < 32000
    given = STEP | {"MASTER_ADDR": "a", "MASTER_PORT": "1"}
    launch.joined(None, given)
    assert (given["MASTER_ADDR"], given["MASTER_PORT"]) == ("a", "1")
    other = STEP | {"SLURM_STEP_ID": "1"}
    launch.joined(None, other)
    assert other["MASTER_PORT"] != env["MASTER_PORT"]


def test_srun_of_one_task_starts_its_own_ranks() -> None:
    assert launch.joined(2, STEP | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}) is None
    assert launch.joined(2, STEP | {"SLURM_STEP_NUM_TASKS": "1"}) is None


def test_sbatch_without_srun_is_no_rank() -> None:
    """A batch script has these two of a job with several tasks, and is not one of them."""
    assert launch.joined(2, {"SLURM_PROCID": "0", "SLURM_NTASKS": "2"}) is None


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("n1", "n1"),
        ("n1,n2", "n1"),
        ("n[1-2]", "n1"),
        ("gpu[007,009-012],x", "gpu007"),
        ("r[1-2]n[03-04].local", "r1n03.local"),
        ("a-b[5]", "a-b5"),
    ],
)
def test_first_host(nodes: str, host: str) -> None:
    assert launch.first_host(nodes) == host


# Ranks of our own


def test_ranks_know_their_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    names = "RANK LOCAL_RANK WORLD_SIZE MASTER_ADDR MASTER_PORT OMP_NUM_THREADS".split()
    does = f"open(f'{tmp_path}/{{rank}}', 'w').write(' '.join(os.environ[n] for n in {names}))"
    assert launch.run_local(rank(does), 2) == 0
    found = [(tmp_path / str(i)).read_text().split() for i in range(2)]
    assert [row[:4] for row in found] == [[str(i), str(i), "2", "127.0.0.1"] for i in range(2)]
    assert found[0][4:] == found[1][4:]
    assert int(found[0][5]) == max(1, len(os.sched_getaffinity(0)) // 2)


def test_only_the_first_rank_speaks(capfd: pytest.CaptureFixture[str]) -> None:
    does = "print('out', rank); print('err', rank, file=sys.stderr)"
    assert launch.run_local(rank(does), 2) == 0
    assert capfd.readouterr() == ("out 0\n", "err 0\n")


ERROR = "print('moetrain: error: no', file=sys.stderr); sys.exit({code})"


@pytest.mark.parametrize(
    ("does", "code", "err"),
    [
        # the same mistake on every rank is told once
        (ERROR.format(code=2), 2, "moetrain: error: no\n"),
        (ERROR.format(code=3), 3, "moetrain: error: no\n"),
        # another rank's mistake: its line alone, without the warnings before it
        (
            f"if rank: print('warning', file=sys.stderr); {ERROR.format(code=2)}\n{SLEEP}",
            2,
            "moetrain: error: no\n",
        ),
        # the first rank's connection breaks before the other has gone: the mistake is the cause
        (
            f"if rank: time.sleep(.2); {ERROR.format(code=2)}\nsys.exit('peer closed')",
            2,
            "peer closed\nmoetrain: error: no\n",
        ),
        (f"if rank: sys.exit('boom')\n{SLEEP}", 1, "moetrain: rank 1 failed:\nboom\n"),
        (f"if not rank: sys.exit('boom')\n{SLEEP}", 1, "boom\n"),
        (f"if rank: os.kill(os.getpid(), 9)\n{SLEEP}", 137, "rank 1 was ended by SIGKILL. The ho"),
        (
            "if rank: os.kill(os.getpid(), 11)\ntime.sleep(.2); sys.exit('peer closed')",
            139,
            "peer closed\nmoetrain: rank 1 was ended by SIGSEGV.\n",
        ),
    ],
)
def test_the_cause_is_told_once(
    does: str,
    code: int,
    err: str,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if SLEEP in does:  # no use in waiting for those to end by themselves
        monkeypatch.setattr(launch, "OWN_END_SECONDS", 0.2)
    assert launch.run_local(rank(does), 2) == code
    told = capfd.readouterr().err
    assert told == err if err.endswith("\n") else err in told


def test_a_rank_that_hangs_is_killed_with_what_it_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "OWN_END_SECONDS", 0.2)
    does = "signal.signal(15, signal.SIG_IGN)\n"
    does += f"while rank and not os.path.exists('{tmp_path}/pid'): time.sleep(.01)\n"
    does += "if rank: sys.exit(4)\n"
    does += "import subprocess; p = subprocess.Popen(['sleep', '60'])\n"
    does += f"open('{tmp_path}/pid', 'w').write(str(p.pid))\n{SLEEP}"
    started = time.monotonic()
    assert launch.run_local(rank(does), 2) == 4
    assert time.monotonic() - started < 40
    assert ended(int((tmp_path / "pid").read_text()))


# The launcher in a process of its own, to be sent signals

READY = "signal.signal({number}, lambda *_: os._exit(143))\nopen(f'{folder}/{{rank}}', 'w')"
READY += ".write(str(os.getpid()))\n"


def ended(pid: int) -> bool:
    """Soon; init may take a while to reap what is dead."""
    for _ in range(1000):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except OSError:
            return True
        if state in "ZX":
            return True
        time.sleep(0.01)
    return False


def launched(folder: Path, does: str) -> tuple[subprocess.Popen[str], list[int]]:
    """A launcher of two ranks and their pids, once both have written them."""
    # Under nohup the tests would hand down that SIGHUP is ignored.
    code = "import signal, sys; from moetrain.cluster.launch import run_local\n"
    code += "signal.signal(signal.SIGHUP, signal.SIG_DFL)\n"
    code += f"sys.exit(run_local({rank(does)!r}, 2))"
    process = subprocess.Popen(
        [sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, cwd=ROOT
    )
    files = [folder / "0", folder / "1"]
    wait_for(lambda: all(file.exists() and file.read_text() for file in files))
    wait_for(lambda: listens(process.pid))
    return process, [int(file.read_text()) for file in files]


def listens(pid: int) -> bool:
    """Whether all handlers of a launcher are there; those for SIGUSR1 and SIGHUP come last."""
    status = Path(f"/proc/{pid}/status").read_text()
    masks = {line.split()[0]: line.split()[1] for line in status.splitlines() if "Sig" in line}
    caught, ignored = (int(masks[name], 16) for name in ("SigCgt:", "SigIgn:"))
    hup, usr1 = (1 << (number - 1) for number in (signal.SIGHUP, signal.SIGUSR1))
    return bool(caught & usr1 and (caught | ignored) & hup)


def wait_for(happens: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not happens():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("sent", "arrives", "code"),
    [
        (signal.SIGTERM, signal.SIGTERM, 143),
        (signal.SIGINT, signal.SIGTERM, 130),
        (signal.SIGHUP, signal.SIGTERM, 143),
        (signal.SIGUSR1, signal.SIGUSR1, 143),
    ],
)
def test_signals_are_handed_on(sent: int, arrives: int, code: int, tmp_path: Path) -> None:
    does = READY.format(number=int(arrives), folder=tmp_path) + SLEEP
    process, pids = launched(tmp_path, does)
    process.send_signal(sent)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code
    assert err == ("moetrain: interrupted.\n" if sent == signal.SIGINT else "")
    assert all(ended(pid) for pid in pids)


def test_a_rank_that_still_saves_is_waited_for(tmp_path: Path) -> None:
    """Longer than a failed rank's peers are."""
    does = "def stop(*_):\n  if not rank: time.sleep(0.8); open('{folder}/saved', 'w')\n"
    does += "  os._exit(143)\nsignal.signal(15, stop)\n"
    does = does.format(folder=tmp_path) + READY.format(number=10, folder=tmp_path) + SLEEP
    code = (
        "from moetrain.cluster import launch; launch.GRACE_SECONDS = launch.OWN_END_SECONDS = .1;"
    )
    code += f"import sys; sys.exit(launch.run_local({rank(does)!r}, 2))"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    wait_for(lambda: all((tmp_path / n).exists() for n in "01"))
    wait_for(lambda: listens(process.pid))
    process.terminate()
    assert process.wait(60) == 143
    assert (tmp_path / "saved").exists()


def test_ctrl_c_twice_ends_what_does_not_listen(tmp_path: Path) -> None:
    heard = [tmp_path / "heard0", tmp_path / "heard1"]
    does = f"signal.signal(15, lambda *_: open(f'{tmp_path}/heard{{rank}}', 'w'))\n"
    does += READY.format(number=10, folder=tmp_path) + f"while True: {SLEEP}"
    process, pids = launched(tmp_path, does)
    process.send_signal(signal.SIGINT)
    wait_for(lambda: all(file.exists() for file in heard))  # equal signals that wait count as one
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, "moetrain: interrupted.\n")
    assert all(ended(pid) for pid in pids)


def test_ranks_die_with_a_killed_launcher(tmp_path: Path) -> None:
    process, pids = launched(tmp_path, READY.format(number=10, folder=tmp_path) + SLEEP)
    process.kill()
    assert process.wait(60) == -signal.SIGKILL
    left = [pid for pid in pids if not ended(pid)]
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert process.stderr is not None
    process.stderr.close()
    assert not left
