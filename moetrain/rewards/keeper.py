"""A process that ends with everything it has started."""

import ctypes
import os
import select
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType

PR_SET_CHILD_SUBREAPER = 36


def kept(work: Callable[[], None], leash: int) -> None:
    """Run `work` in a child; end when it ends, or when the other side of the pipe `leash` closes.

    Orphans of the child, daemons too, become children of this process, and it ends them. So nothing
    stays behind but what root rights have taken out of reach. Does not return.
    """
    os.setsid()  # a terminal's ctrl-C is for the trainer, which ends this in its own way
    signal.signal(signal.SIGTERM, _leave)
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.close(leash)
            work()
            code = 0
        finally:
            os._exit(code)
    try:
        os.closerange(0, leash)
        os.closerange(leash + 1, 1 << 16)
        poll = select.poll()
        poll.register(leash, select.POLLIN | select.POLLHUP)
        poll.register(os.pidfd_open(pid), select.POLLIN)
        poll.poll()
    finally:
        end_children()
        os._exit(0)


def end_children() -> None:
    """Kill this process's children until there are none; theirs become its own as they die."""
    children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children")
    if not children.exists():  # a kernel without CONFIG_PROC_CHILDREN
        os.killpg(0, signal.SIGKILL)
    while True:
        for pid in children.read_text().split():
            os.kill(int(pid), signal.SIGKILL)
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


def _leave(number: int, frame: FrameType | None) -> None:
    sys.exit(0)
