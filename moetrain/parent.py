"""A child process does not outlive its parent. No torch."""

import ctypes
import os
import signal
from collections.abc import Callable

_PR_SET_PDEATHSIG = 1


def die_with(parent: int) -> Callable[[], None]:
    """What a child of process `parent` calls first (as `preexec_fn`, or by itself): a killed parent
    must not leave children that hold GPUs or wait for ever.
    """
    libc = ctypes.CDLL(None)  # loaded before the fork, where it is safe

    def die_with_parent() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before the line above
            os._exit(1)

    return die_with_parent
