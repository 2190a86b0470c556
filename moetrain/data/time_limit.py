"""A limit on the processor time that somebody else's program takes in this thread."""

import ctypes
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

POLL_SECONDS = 0.25


class OverTime(Exception):
    """The limit is passed."""


class _Watch:
    """Looks at the threads that have a limit, from a thread of its own. Processor time and not the
    clock's, since a slow machine must not decide which records are used.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._ends: dict[int, float] = {}  # thread -> processor time at which it is over
        self._told: set[int] = set()
        self._thread: threading.Thread | None = None

    def begin(self, seconds: float) -> None:
        own = threading.get_ident()
        with self._lock:
            self._told.discard(own)
            self._ends[own] = time.thread_time() + seconds
            if self._thread is None:
                self._thread = threading.Thread(target=self._look, daemon=True)
                self._thread.start()

    def end(self) -> None:
        own = threading.get_ident()
        with self._lock:
            self._ends.pop(own, None)
            if own in self._told:  # and it may not have come through yet
                self._told.discard(own)
                _raise_in(own, None)

    def _look(self) -> None:
        while True:
            time.sleep(POLL_SECONDS)
            with self._lock:
                for thread, end in list(self._ends.items()):
                    if time.clock_gettime(time.pthread_getcpuclockid(thread)) > end:
                        del self._ends[thread]
                        self._told.add(thread)
                        _raise_in(thread, OverTime)


def _raise_in(thread: int, kind: type[Exception] | None) -> None:
    """Let a thread meet an exception at its next step; None takes one back that it has not met."""
    what = None if kind is None else ctypes.py_object(kind)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), what)


_watch = _Watch()
os.register_at_fork(after_in_child=_watch.__init__)  # its lock may be held at a fork


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises OverTime within the block once this thread has worked for `seconds` in it: between two
    steps of Python, so that no single call of C is cut short. Not within another limit.
    """
    _watch.begin(seconds)
    try:
        yield
    finally:
        _watch.end()
