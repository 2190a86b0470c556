"""How Linux schedules gloo's receiver threads.

In torch 2.13 a receiver that finds its connection's lock taken spins on epoll_wait until the lock
is free. On few cores the woken receiver preempts the sender of its own process, which holds the
lock, and spins until its time slice is over. A SCHED_BATCH thread does not preempt others when it
wakes: on two cores 3,000 sums of two ranks take 0.5 s in place of 2.6
(findings/gloo_receivers_spin.sh, without moetrain).
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def non_preempting_threads() -> Iterator[None]:
    """Threads that this thread starts meanwhile are SCHED_BATCH; its own policy is restored.
    Nothing changes where a user has chosen a policy, or a sandbox refuses to change it.
    """
    changed = _set_batch()
    try:
        yield
    finally:
        if changed:
            os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_getparam(0))


def _set_batch() -> bool:
    """Whether this thread had the usual policy and is SCHED_BATCH now."""
    try:
        if os.sched_getscheduler(0) != os.SCHED_OTHER:
            return False
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_getparam(0))
    except OSError:
        return False
    return True
