"""A run that hangs: nothing moves on any rank of a node. The ranks write their stacks, and are
ended.
"""

import contextlib
import os
import signal
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from subprocess import Popen
from typing import IO

from moetrain import files, pulse

HUNG = 75  # exit code: sysexits' EX_TEMPFAIL, "try again"
MAX_PASSED = 1.0  # seconds that one look may count: a launcher that was itself stopped saw nothing
STARTING = 4  # times as long may pass before the first progress: a hundred nodes import torch
WRITE_SECONDS = 3.0  # for the ranks to write their stacks
READ_SECONDS = 3.0  # between looks for another node's announcement, on the shared file system
OTHERS_SECONDS = 60.0  # at most, for other nodes to write theirs: srun ends all with us
LOOK_SECONDS = 0.5  # between looks at their files


@dataclass(frozen=True)
class Watch:
    """What to watch for: `seconds` without progress; the stacks go to the folder `stacks`."""

    seconds: float
    stacks: Path


@dataclass
class Line:
    """The connection to one rank: `fds` are its ends, which it inherits."""

    pulse: int
    stacks: IO[bytes]
    fds: tuple[int, int]

    @classmethod
    def open(cls) -> "Line":
        mine, its = os.pipe()
        os.set_blocking(mine, False)
        stacks = files.nameless()
        return cls(mine, stacks, (its, stacks.fileno()))

    @property
    def env(self) -> dict[str, str]:
        return {pulse.PULSE: str(self.fds[0]), pulse.STACKS: str(self.fds[1])}

    def started(self) -> None:
        """The rank has its end; ours is closed, so that its death shows."""
        os.close(self.fds[0])

    def moved(self) -> bool:
        """Whether the rank has done something since the last look."""
        with contextlib.suppress(BlockingIOError):
            return bool(os.read(self.pulse, 1 << 16))
        return False

    def close(self) -> None:
        os.close(self.pulse)
        self.stacks.close()


@dataclass
class Watchdog:
    """Counts the seconds in which no rank of this node has moved. `others` are the ranks of other
    nodes.

    The seconds are counted look by look on a clock that only goes forward: neither a jump of the
    wall clock nor a launcher that was stopped itself makes a run look hung. The launcher that sees
    it first announces it, so that the ranks of all nodes write their stacks at the same time.
    """

    watch: Watch
    others: frozenset[int] = frozenset()
    quiet: float = 0.0
    has_begun: bool = False
    _looked: float = field(default_factory=time.monotonic)
    _read: float = field(default_factory=time.monotonic)

    def hangs(self, moved: bool) -> bool:
        """Take one look at the ranks; whether they have been quiet for too long, here or on the
        node that has announced it.
        """
        now = time.monotonic()
        passed, self._looked = min(now - self._looked, MAX_PASSED), now
        self.quiet = 0.0 if moved else self.quiet + passed
        self.has_begun |= moved
        if self.quiet > self.watch.seconds * (1 if self.has_begun else STARTING):
            return True
        if not self.others or now - self._read < READ_SECONDS:
            return False
        self._read = now
        return _is_of_this_start(self._announcement)

    def write_stacks(self, ranks: list[tuple[int, "Popen[bytes]", Line]]) -> None:
        """Have every rank (number, process, line) write its stacks, and say where they are; return
        when other nodes have done the same.
        """
        states = {number: _state(process.pid) for number, process, _ in ranks}
        stopped = [rank for rank in ranks if "(stopped)" in states[rank[0]]]
        running = [rank for rank in ranks if rank not in stopped]
        where = f" Their stacks are in {self.watch.stacks}."
        try:
            self.watch.stacks.mkdir(parents=True, exist_ok=True)
            _append(self._announcement, _this_start())
            for number, _, _ in ranks:
                _append(self._path(number), f"== {states[number]}; ".encode() + _this_start())
            self._collect(running)
            self._wait_for_others()
            self._collect(stopped)  # last, since it moves others on
        except OSError as error:
            where = f" Their stacks could not be written: {error.strerror}."
        numbers = ", ".join(str(number) for number, _, _ in ranks)
        sys.stderr.write(
            f"moetrain: ranks {numbers} have not moved for {self.quiet:.0f} s"
            f" (cluster.hang_seconds); ended.{where}\n"
        )

    def _collect(self, ranks: list[tuple[int, "Popen[bytes]", Line]]) -> None:
        for _, process, _ in ranks:
            if process.poll() is None:
                process.send_signal(pulse.ASKS_FOR_STACKS)
                process.send_signal(signal.SIGCONT)  # a stopped one can write nothing
        time.sleep(WRITE_SECONDS if ranks else 0)
        for number, _, line in ranks:
            line.stacks.seek(0)
            _append(self._path(number), line.stacks.read())

    def _wait_for_others(self) -> None:
        missing, end = self.others, time.monotonic() + OTHERS_SECONDS
        while missing and time.monotonic() < end:
            time.sleep(LOOK_SECONDS)
            missing = frozenset(i for i in missing if not _is_of_this_start(self._path(i)))
        time.sleep(2 * WRITE_SECONDS if self.others else 0)  # they write below that first line

    @property
    def _announcement(self) -> Path:
        return self.watch.stacks / "hangs.txt"

    def _path(self, number: int) -> Path:
        return self.watch.stacks / f"rank_{number:05d}.txt"


def _append(path: Path, data: bytes) -> None:
    with path.open("ab") as file:
        file.write(data)


def _this_start() -> bytes:
    job, step, restart = (
        os.environ.get(f"SLURM_{k}", "0") for k in ("JOB_ID", "STEP_ID", "RESTART_COUNT")
    )
    return f"Slurm job {job}, step {step}, restart {restart}\n".encode()


def _is_of_this_start(path: Path) -> bool:
    try:
        return _this_start() in path.read_bytes()
    except OSError:
        return False


def _state(pid: int) -> str:
    """What the kernel says of a process: running, sleeping, stopped."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return f"process {pid} is gone"
    state = next((line.split(None, 1)[1] for line in lines if line.startswith("State:")), "?")
    return f"process {pid} was {state}"
