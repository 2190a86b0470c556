"""The ranks of this node: start them, hand signals on, and let none outlive another.

Under torchrun the ranks are there already and nothing is started. Under srun they are too, unless
it has started one task a node and --nproc says how many ranks each of them is to start.
"""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, MutableMapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import IO

from moetrain import files, ports
from moetrain.cluster.watchdog import HUNG, Line, Watch, Watchdog
from moetrain.errors import ConfigError, DivergedError, MoetrainError
from moetrain.parent import die_with

GRACE_SECONDS = 10.0  # between SIGTERM and SIGKILL, once a rank has failed
OWN_END_SECONDS = 3.0  # for the other ranks to fail by themselves, before that
POLL_SECONDS = 0.05
_USER_ERRORS = (MoetrainError.exit_code, DivergedError.exit_code)
_STOPPED = 128 + signal.SIGTERM  # a rank that was told to stop, saved and left


def joined(num_procs: int | None, environ: MutableMapping[str, str] = os.environ) -> int | None:
    """The world's size when torchrun or srun has made this process a rank, else None.

    srun's variables are completed to torchrun's in `environ`. Raises ConfigError when `num_procs`
    (--nproc) says something else than the launcher.
    """
    if "RANK" not in environ or "WORLD_SIZE" not in environ:
        if num_nodes(num_procs, environ) > 1:
            return None
        _adopt_slurm(environ)
    if "RANK" not in environ or "WORLD_SIZE" not in environ:
        return None
    world_size = int(environ["WORLD_SIZE"])
    if num_procs not in (None, world_size, int(environ.get("LOCAL_WORLD_SIZE", world_size))):
        raise ConfigError(
            f"--nproc {num_procs}, but torchrun or srun has started {world_size} ranks already. "
            f"Leave --nproc out there."
        )
    return world_size


def _adopt_slurm(environ: MutableMapping[str, str]) -> None:
    # An sbatch script has SLURM_PROCID and SLURM_NTASKS too; only a step has a step's nodes.
    env = environ
    if "SLURM_PROCID" not in env or "SLURM_STEP_NODELIST" not in env:
        return
    num_tasks = _num_tasks(env)
    if num_tasks == 1:
        return
    env["RANK"], env["WORLD_SIZE"] = env["SLURM_PROCID"], str(num_tasks)
    env["LOCAL_RANK"] = env.get("SLURM_LOCALID", "0")
    if env.get("SLURM_STEP_NUM_NODES") == "1":
        env["LOCAL_WORLD_SIZE"] = str(num_tasks)
    _meet(env)


def as_ranks(argv: Sequence[str], num_procs: int | None, watch: Watch | None = None) -> int | None:
    """Run `moetrain *argv` as the ranks that --nproc asks for, and return the exit code; None when
    this process is a rank, or the only one, and is to do the work itself.
    """
    if joined(num_procs) is not None or (num_procs or 1) * num_nodes(num_procs) == 1:
        return None
    assert num_procs is not None, "several nodes are those of --nproc"
    return run_local([sys.executable, "-m", "moetrain", *argv], num_procs, watch)


def num_nodes(num_procs: int | None, environ: MutableMapping[str, str] = os.environ) -> int:
    """Nodes whose launchers start this job's ranks: several when srun has started one task on each
    and --nproc is given, else 1.
    """
    if num_procs is None or "SLURM_STEP_NODELIST" not in environ or "RANK" in environ:
        return 1
    nodes = int(environ.get("SLURM_STEP_NUM_NODES", "1"))
    return nodes if nodes == _num_tasks(environ) else 1


def _num_tasks(env: MutableMapping[str, str]) -> int:
    return int(env.get("SLURM_STEP_NUM_TASKS") or env.get("SLURM_NTASKS", "1"))


def _meet(env: MutableMapping[str, str]) -> None:
    """Where the ranks of a Slurm step meet, when nobody has said it."""
    env.setdefault("MASTER_ADDR", first_host(env["SLURM_STEP_NODELIST"]))
    # One port for every rank of a step without asking each other, below Linux's ephemeral ports.
    # A restarted job takes another one: what it was may still hold the old.
    step = int(env.get("SLURM_JOB_ID", "0")) * 31 + int(env.get("SLURM_STEP_ID", "0"))
    step += int(env.get("SLURM_RESTART_COUNT", "0")) * 7
    env.setdefault("MASTER_PORT", str(ports.FIRST + step % ports.NUM))


def first_host(nodes: str) -> str:
    """The first host of a Slurm node list, without scontrol, which containers lack: n[03-05,9],x is
    n03.
    """
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodes)
    assert first is not None, "the pattern matches the empty string"
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first.group())


@dataclass(eq=False)
class _Rank:
    number: int
    process: subprocess.Popen[bytes]
    log: IO[bytes] | None  # the stderr of all ranks but the first
    line: Line

    @property
    def code(self) -> int | None:
        return self.process.poll()


def run_local(command: Sequence[str], num_procs: int, watch: Watch | None = None) -> int:
    """Run `command` as `num_procs` ranks on this node; returns 0, or the exit code of the rank that
    failed, or HUNG when nothing has moved for as long as `watch` says.

    The job's first rank speaks. Of the others' stderr the failed one's is shown, when it is the
    cause and the first rank has not said as much. SIGTERM, SIGHUP and SIGUSR1 are handed on, and
    SIGINT as a SIGTERM, so that ranks finish the step, save and leave; a second SIGINT kills them.
    """
    shared, first = _world(num_procs, watch)
    die_with_parent = die_with(os.getpid())
    with ExitStack() as stack:
        ranks: list[_Rank] = []
        asked = stack.enter_context(_handing_on(ranks))
        for local in range(num_procs):
            number = first + local
            log = stack.enter_context(files.nameless()) if number else None
            line = Line.open()
            stack.callback(line.close)
            process = subprocess.Popen(
                command,
                env=shared | line.env | {"RANK": str(number), "LOCAL_RANK": str(local)},
                stdout=subprocess.DEVNULL if number else None,
                stderr=log,
                start_new_session=True,
                preexec_fn=die_with_parent,
                pass_fds=line.fds,
            )
            line.started()
            ranks.append(_Rank(number, process, log, line))
            if asked:  # while they were being started
                process.terminate()
        others = frozenset(range(int(shared["WORLD_SIZE"]))) - {rank.number for rank in ranks}
        return _wait(ranks, asked, Watchdog(watch, others) if watch is not None else None)


def _world(num_procs: int, watch: Watch | None) -> tuple[dict[str, str], int]:
    """(what the ranks of this node share of their environment, the number of the first)."""
    shared = dict(os.environ)
    nodes = num_nodes(num_procs)
    node = int(shared["SLURM_NODEID"]) if nodes > 1 else 0
    if nodes > 1:
        _meet(shared)
    else:
        shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(ports.free_port())}
    shared |= {"WORLD_SIZE": str(nodes * num_procs), "LOCAL_WORLD_SIZE": str(num_procs)}
    shared.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // num_procs)))
    if watch is not None:  # a collective that gives up first would leave no stacks
        shared.setdefault("MOETRAIN_TIMEOUT_MINUTES", str(max(10.0, watch.seconds / 60 + 5)))
    return shared, node * num_procs


@contextmanager
def _handing_on(ranks: list[_Rank]) -> Iterator[list[int]]:
    """Hand signals on to `ranks` meanwhile; yields the list of what has come."""
    asked: list[int] = []

    def forward(number: int, frame: FrameType | None) -> None:
        asked.append(number)
        gentle = signal.SIGTERM if number in (signal.SIGINT, signal.SIGHUP) else number
        for rank in ranks:
            if rank.code is None:
                insists = asked.count(signal.SIGINT) > 1
                rank.process.send_signal(signal.SIGKILL if insists else gentle)

    handed_on = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup
        handed_on.append(signal.SIGHUP)
    previous = {number: signal.signal(number, forward) for number in handed_on}
    try:
        yield asked
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _wait(ranks: list[_Rank], asked: list[int], watchdog: Watchdog | None) -> int:
    ended: list[_Rank] = []
    while len(ended) < len(ranks):
        _collect(ranks, ended)
        # A rank that was told to stop and left is no failure: the others may still be saving.
        if any(rank.code not in (0, _STOPPED) for rank in ended):
            break
        moved = [rank.line.moved() for rank in ranks]
        if watchdog is not None and watchdog.hangs(any(moved)):
            watchdog.write_stacks([(rank.number, rank.process, rank.line) for rank in ranks])
            _end(ranks, ended, gently=False)
            return HUNG
        time.sleep(POLL_SECONDS)
    else:
        return _told_to_stop(asked) if any(rank.code for rank in ended) else 0
    _collect_until(ranks, ended, OWN_END_SECONDS)
    causes = [rank for rank in ended if rank.code not in (0, _STOPPED)]
    _end(ranks, ended)
    # A slow first rank may have said meanwhile what the cause is.
    causes += [rank for rank in ranks if rank not in causes and rank.code in _USER_ERRORS]
    if asked and all((rank.code or 0) < 0 for rank in causes):
        return _told_to_stop(asked)
    return _report(causes)


def _collect(ranks: list[_Rank], ended: list[_Rank]) -> None:
    """Add to `ended` the ranks that have ended since: it is in the order of their deaths."""
    ended += [rank for rank in ranks if rank not in ended and rank.code is not None]


def _collect_until(ranks: list[_Rank], ended: list[_Rank], seconds: float) -> None:
    end = time.monotonic() + seconds
    while len(ended) < len(ranks) and time.monotonic() < end:
        time.sleep(POLL_SECONDS)
        _collect(ranks, ended)


def _end(ranks: list[_Rank], ended: list[_Rank], *, gently: bool = True) -> None:
    """End what still runs, and then what the ranks have started."""
    for rank in ranks:
        if gently and rank.code is None:
            rank.process.terminate()
    _collect_until(ranks, ended, GRACE_SECONDS if gently else 0.0)
    for rank in ranks:
        try:
            os.killpg(rank.process.pid, signal.SIGKILL)  # a rank leads its own group
        except ProcessLookupError:
            pass  # nothing is left of it
        rank.process.wait()


def _told_to_stop(asked: list[int]) -> int:
    """The exit code of a run that a signal ended; ranks stopped by a signal of their own count as
    SIGTERM.
    """
    if signal.SIGINT in asked:
        sys.stderr.write("moetrain: interrupted.\n")
        return 128 + signal.SIGINT
    return _STOPPED


def _report(causes: list[_Rank]) -> int:
    """Show why the run failed, unless the first rank has, and return that rank's exit code.

    A rank's death breaks the others' connections, so the cause is a user's error if there is one,
    else a signal, else the first to die.
    """

    def rate(rank: _Rank) -> tuple[int, bool]:
        code = rank.code or 0
        is_user_error = code in _USER_ERRORS
        return 0 if is_user_error else 1 if code < 0 else 2, is_user_error and rank.number > 0

    cause = min(causes, key=rate)
    code = cause.code or 0
    if cause.log is not None:
        cause.log.seek(0)
        text = cause.log.read().decode(errors="replace").strip()
        errors = [line for line in text.splitlines() if line.startswith("moetrain: error:")]
        if code in _USER_ERRORS and errors:
            text = errors[-1]
        elif text:
            text = f"moetrain: rank {cause.number} failed:\n{text[-4000:]}"
        sys.stderr.write(text + "\n" if text else "")
    if code < 0:
        hint = " The host's memory may have run out: see dmesg." if code == -signal.SIGKILL else ""
        name = signal.Signals(-code).name
        sys.stderr.write(f"moetrain: rank {cause.number} was ended by {name}.{hint}\n")
        return 128 - code
    return code
