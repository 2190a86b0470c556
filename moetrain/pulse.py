"""A rank's pulse. Each piece of work done is one byte to the launcher, which ends a run in which
nothing moves any more, and first has every rank write where it stands.
"""

import contextlib
import faulthandler
import os
import signal

PULSE, STACKS = "MOETRAIN_PULSE_FD", "MOETRAIN_STACKS_FD"
ASKS_FOR_STACKS = signal.SIGUSR2
_pulse: int | None = None


def listen() -> None:
    """Take up the connection to the launcher, if it has made one. Call first of all in a rank."""
    global _pulse
    if PULSE not in os.environ or _pulse is not None:
        return
    _pulse, stacks = int(os.environ.pop(PULSE)), int(os.environ.pop(STACKS))
    os.set_blocking(_pulse, False)  # a launcher that is slow to read must not hold us up
    for fd in (_pulse, stacks):
        os.set_inheritable(fd, False)
    faulthandler.register(ASKS_FOR_STACKS, file=stacks, all_threads=True)


def beat() -> None:
    """Something is done: a micro-batch, a tensor, an answer."""
    if _pulse is not None:
        with contextlib.suppress(OSError):  # full, or the launcher is gone
            os.write(_pulse, b".")
