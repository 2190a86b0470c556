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
OTHERS_SECONDS = 5.0  # for the launchers of other nodes to do the same, before srun ends them


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
    """Counts the seconds in which no rank of this node has moved.

    They are counted look by look on a clock that only goes forward: neither a jump of the wall
    clock nor a launcher that was stopped itself makes a run look hung.
    """

    watch: Watch
    quiet: float = 0.0
    has_begun: bool = False
    _looked: float = field(default_factory=time.monotonic)

    def hangs(self, moved: bool) -> bool:
        """Take one look at the ranks; whether they have been quiet for too long."""
        now = time.monotonic()
        passed, self._looked = min(now - self._looked, MAX_PASSED), now
        self.quiet = 0.0 if moved else self.quiet + passed
        self.has_begun |= moved
        return self.quiet > self.watch.seconds * (1 if self.has_begun else STARTING)

    def write_stacks(self, ranks: list[tuple[int, "Popen[bytes]", Line]]) -> None:
        """Have every rank (number, process, line) write its stacks, and say where they are."""
        states = {number: _state(process.pid) for number, process, _ in ranks}
        for _, process, _ in ranks:
            if process.poll() is None:
                process.send_signal(pulse.ASKS_FOR_STACKS)
                process.send_signal(signal.SIGCONT)  # a stopped one can write nothing
        time.sleep(WRITE_SECONDS)
        numbers = ", ".join(str(number) for number, _, _ in ranks)
        where = ""
        try:
            self.watch.stacks.mkdir(parents=True, exist_ok=True)
            for number, _, line in ranks:
                _append(self.watch.stacks / f"rank_{number:05d}.txt", states[number], line.stacks)
            where = f" Their stacks are in {self.watch.stacks}."
        except OSError as error:
            where = f" Their stacks could not be written: {error.strerror}."
        sys.stderr.write(
            f"moetrain: ranks {numbers} have not moved for {self.quiet:.0f} s"
            f" (cluster.hang_seconds); ended.{where}\n"
        )
        time.sleep(OTHERS_SECONDS)


def _append(path: Path, state: str, stacks: IO[bytes]) -> None:
    job, restart = (os.environ.get(f"SLURM_{k}", "0") for k in ("JOB_ID", "RESTART_COUNT"))
    stacks.seek(0)
    with path.open("ab") as file:
        file.write(f"== {state}; Slurm job {job}, restart {restart}\n".encode())
        file.write(stacks.read())


def _state(pid: int) -> str:
    """What the kernel says of a process: running, sleeping, stopped."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return f"process {pid} is gone"
    found = next((line.split(None, 1)[1] for line in lines if line.startswith("State:")), "?")
    return f"process {pid} was {found}"
