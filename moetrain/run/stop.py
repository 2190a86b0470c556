"""Being told to stop: a signal to any rank ends the run on all of them, after the step in hand."""

import signal
from types import FrameType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moetrain.engine.world import World

# SIGTERM comes from Slurm, torchrun and `kill`; SIGUSR1 from `sbatch --signal=USR1@300`, ahead of
# the time limit; SIGINT from Ctrl-C, once to save and leave, twice to leave.
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
EXIT_STOPPED = 128 + signal.SIGTERM


class StopSignal:
    """Catches the signals while it is entered; `agreed` says whether any rank has had one."""

    def __init__(self, world: "World"):
        self.world = world
        self._caught = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopSignal":
        for number in SIGNALS:
            self._before[number] = signal.signal(number, self._catch)
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _catch(self, number: int, frame: FrameType | None) -> None:
        if self._caught and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._caught = True

    def agreed(self) -> bool:
        """Collective: True on every rank when one of them was told to stop."""
        return self.world.any(self._caught)
