"""The same work on many things, in processes, with the results in order."""

import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from moetrain.errors import MoetrainError
from moetrain.parent import die_with

MOST, EACH = 8, 1 << 24  # processes that nobody asked for, and bytes that one is worth starting for
AHEAD = 2  # things that wait for each process, so that memory does not grow with the input
_work: Callable[[Any], Any] | None = None


def num_cores() -> int:
    """Of this process."""
    return len(os.sched_getaffinity(0))


def worth(num_bytes: int) -> int:
    """Processes for so many bytes of text."""
    return min(num_cores(), MOST, num_bytes // EACH)


def in_order[T, R](
    work: Callable[[T], R], items: Iterable[T], num_workers: int, option: str
) -> Iterator[R]:
    """`work` of each item: here with fewer than two workers, else in as many processes. Each gets
    its own copy of `work` once and keeps it, with what that has loaded or loads at its first call.

    `option` names what sets the number of workers. MoetrainError when one of them is killed.
    """
    if num_workers < 2:
        yield from map(work, items)
        return
    # Spawned: a fork after torch or tokenizers started threads can hang.
    pool = ProcessPoolExecutor(
        num_workers, multiprocessing.get_context("spawn"), _begin, (work, os.getpid())
    )
    running: deque[Future[R]] = deque()
    try:
        for item in items:
            running.append(pool.submit(_do, item))
            if len(running) >= AHEAD * num_workers:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()
    except BrokenProcessPool:
        raise MoetrainError(
            f"One of the {num_workers} processes was killed, most likely as memory ran out. Start"
            f" again with a smaller {option}."
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _begin(work: Callable[[Any], Any], parent: int) -> None:
    """In a new process. It would outlive a parent that is killed: Python's pools wait for ever."""
    global _work
    _work = work
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's to hear
    die_with(parent)()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the processes are that


def _do(item: Any) -> Any:
    assert _work is not None
    return _work(item)
