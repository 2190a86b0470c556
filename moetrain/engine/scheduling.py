"""How Linux schedules the threads that receive for gloo.

Such a thread that finds the lock of its connection taken asks epoll again at once, and again until
it is free (torch 2.13). Linux lets a thread that is woken take the processor from the one that
runs: where cores are few that is the one that sends, with the lock, and the receiver goes round
until its time is over. A thread of SCHED_BATCH waits for its turn instead. On two cores 3,000 sums
of two ranks take 0.5 s in place of 2.6 (findings/gloo_receivers_spin.sh, without moetrain).
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def patient_threads() -> Iterator[None]:
    """Threads that are started here, by this thread, are SCHED_BATCH; it is as before afterwards.
    Nothing changes where a policy has been chosen for it or none may be, or without Linux.
    """
    changed = _become_patient()
    try:
        yield
    finally:
        if changed:
            os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_getparam(0))


def _become_patient() -> bool:
    """Whether this thread, which was scheduled as usual, is SCHED_BATCH now."""
    if not hasattr(os, "SCHED_BATCH"):
        return False
    try:
        if os.sched_getscheduler(0) != os.SCHED_OTHER:
            return False
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_getparam(0))
    except OSError:  # a sandbox that refuses it
        return False
    return True
