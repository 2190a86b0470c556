"""Limits on the processor time and the memory that somebody else's program takes in this thread."""

import ctypes
import os
import resource
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

POLL_SECONDS = 0.25
PAGE = os.sysconf("SC_PAGE_SIZE")


class OverTime(Exception):
    """The limit of time is passed."""


class OverMemory(Exception):
    """The limit of memory is passed."""


@dataclass(frozen=True)
class _Limit:
    processor_time: float  # of the thread, at which it is over
    memory: int  # of the process, in bytes


class _Watch:
    """Looks at the threads that have a limit, from a thread of its own. Processor time and not the
    clock's, since a slow machine must not decide which records are used.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._limits: dict[int, _Limit] = {}  # by thread
        self._notified: set[int] = set()
        self.thread: threading.Thread | None = None
        # Stays open: it is read at every text, and opening it takes eight times as long.
        self._statm = open("/proc/self/statm", "rb", buffering=0)

    def writable_memory(self) -> int:
        """What RLIMIT_DATA counts: bytes of this process that it may write to, used or not."""
        return int(os.pread(self._statm.fileno(), 200, 0).split()[5]) * PAGE

    def begin(self, seconds: float, memory: int) -> None:
        thread = threading.get_ident()
        with self._lock:
            self._notified.discard(thread)
            self._limits[thread] = _Limit(time.thread_time() + seconds, memory)
            if self.thread is None:
                self.thread = threading.Thread(target=self._look, daemon=True)
                self.thread.start()

    def end(self) -> None:
        thread = threading.get_ident()
        with self._lock:
            self._limits.pop(thread, None)
            if thread in self._notified:  # and it may not have come through yet
                self._notified.discard(thread)
                _raise_in(thread, None)

    def _look(self) -> None:
        while True:
            time.sleep(POLL_SECONDS)
            with self._lock:
                for thread, limit in list(self._limits.items()):
                    clock = time.pthread_getcpuclockid(thread)
                    is_late = time.clock_gettime(clock) > limit.processor_time
                    if is_late or self._is_full(limit):
                        del self._limits[thread]
                        self._notified.add(thread)
                        _raise_in(thread, OverTime if is_late else OverMemory)

    def _is_full(self, limit: _Limit) -> bool:
        try:
            return self.writable_memory() > limit.memory
        except MemoryError:  # the kernel's limit is for this thread too
            return True


def _raise_in(thread: int, kind: type[Exception] | None) -> None:
    """Let a thread meet an exception at its next step; None takes one back that it has not met."""
    what = None if kind is None else ctypes.py_object(kind)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), what)


_watch = _Watch()
# Its lock may be held at a fork, and its file is about the parent.
os.register_at_fork(after_in_child=_watch.__init__)


@contextmanager
def limited(seconds: float, room: int) -> Iterator[None]:
    """Raises OverTime within the block once this thread has worked for `seconds` in it: between two
    steps of Python, so that no single call of C is cut short. Not within another limit.

    Raises OverMemory once the process has taken `room` bytes more. Where this is its only thread,
    the kernel gives no more, a single call of C included; others could be starting processes, which
    would keep such a limit, so that beside them it is looked at now and then.
    """
    most = _watch.writable_memory() + room
    alone = all(one in (threading.current_thread(), _watch.thread) for one in threading.enumerate())
    before = resource.getrlimit(resource.RLIMIT_DATA)
    _watch.begin(seconds, most)
    try:
        try:
            if alone:
                soft = most if before[0] == resource.RLIM_INFINITY else min(most, before[0])
                resource.setrlimit(resource.RLIMIT_DATA, (soft, before[1]))
            yield
        except MemoryError as error:
            raise OverMemory from error
        finally:
            _watch.end()  # until it returns, the exception may come
    finally:
        if alone:
            resource.setrlimit(resource.RLIMIT_DATA, before)
