"""Processes that grade, and that reply: warm, watched, and replaced when one hangs or dies. What
happens to one thing that they work on costs no other.
"""

import multiprocessing
import os
import resource
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import batched, groupby
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

from moetrain.errors import ConfigError, MoetrainError
from moetrain.rewards.base import Shape
from moetrain.rewards.keeper import kept

LARGEST_FILE = 1 << 30  # bytes that a worker may write to one file


class Numbered(Protocol):
    """Something to work on."""

    @property
    def number(self) -> int: ...


@dataclass(frozen=True)
class Work[T: Numbered, A]:
    """What processes do. All of it is pickled."""

    name: str  # for messages: "rewards: accuracy"
    # Runs in a process, once: (number, answer) of each thing of a batch. MoetrainError where it
    # cannot be had.
    make: Callable[[], Callable[[Sequence[T]], Iterator[tuple[int, A]]]]
    failed: Callable[[str], A]  # the answer to what a process hung on ("timeout") or died of
    group: Callable[[T], Any] | None = None  # what things of one batch have in common
    more: Callable[[T], float] | None = None  # seconds that a thing may take beyond the shape's


class Pool[T: Numbered, A]:
    """The processes of one kind, and the things that wait for them."""

    def __init__(self, work: Work[T, A], shape: Shape):
        self.work, self.shape = work, shape
        self._queue: deque[tuple[T, ...]] = deque()
        self._workers = [self._started() for _ in range(shape.num_workers)]

    @property
    def pipes(self) -> list[Connection]:
        """Where something is expected."""
        return [worker.pipe for worker in self._workers if worker.is_busy]

    @property
    def deadline(self) -> float:
        """The next time at which a worker is late (time.monotonic)."""
        return min((w.deadline for w in self._workers if w.is_busy), default=float("inf"))

    def wait_ready(self) -> None:
        """Raises ConfigError when the work cannot be had."""
        for worker in self._workers:
            if not worker.pipe.poll(max(0.0, worker.deadline - time.monotonic())):
                raise ConfigError(
                    f"{self.work.name} was not ready after"
                    f" {self.shape.start_seconds:g} s. Look at what it does when it is loaded."
                )
            try:
                worker.receive()
            except EOFError:
                raise ConfigError(
                    f"{self.work.name}: its process ended as it was loaded."
                ) from None

    def ask(self, things: Sequence[T]) -> None:
        """Put things in the queue."""
        for _, alike in groupby(things, self.work.group or (lambda _: None)):
            self._queue.extend(batched(alike, self.shape.batch))

    def send(self) -> None:
        """Give waiting things to workers without any."""
        for worker in self._workers:
            if not worker.is_busy and self._queue:
                worker.send(self._queue.popleft())

    def pause(self, number: int, *, is_paused: bool) -> None:
        """Stop the clock of a thing in a worker's hands, or begin it anew."""
        for worker in self._workers:
            worker.pause(number, is_paused=is_paused)

    def answers(self) -> Iterator[tuple[int, A]]:
        """What is there by now; what is late or dead is replaced."""
        for place, worker in enumerate(self._workers):
            if not worker.is_busy:
                continue
            fault = None
            try:
                while worker.is_busy and worker.pipe.poll():
                    yield from worker.receive()
                if worker.is_busy and time.monotonic() >= worker.deadline:
                    fault = "timeout"
            except (EOFError, OSError):
                fault = "crash"
            if fault is not None:
                left = worker.left
                worker.close()
                self._workers[place] = self._started()
                yield from self._blamed(left, fault)

    def _blamed(self, things: tuple[T, ...], fault: str) -> Iterator[tuple[int, A]]:
        """One thing is to blame; of several, one: halves are tried again until it is alone."""
        if len(things) == 1:
            yield things[0].number, self.work.failed(fault)
        else:
            middle = len(things) // 2
            self._queue.extendleft((things[middle:], things[:middle]))

    def _started(self) -> "_Worker[T, A]":
        return _Worker(self.work, self.shape)

    def close(self) -> None:
        """End all workers, and what they have started."""
        for worker in self._workers:
            worker.let_go()
        for worker in self._workers:
            worker.close()
        self._workers = []
        self._queue.clear()


class _Worker[T: Numbered, A]:
    """One process and the things in its hands."""

    def __init__(self, work: Work[T, A], shape: Shape):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["__main__", __name__])  # imported once for all of them
        self.pipe, theirs = context.Pipe()
        self._leash, tied = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(theirs, tied, work, dict(os.environ)), daemon=True
        )
        self._process.start()
        theirs.close()
        tied.close()
        self._work, self._shape, self._more = work, shape, 0.0
        self._left: dict[int, T] = {}
        self._is_ready = self._is_paused = False
        self._since = time.monotonic()

    @property
    def is_busy(self) -> bool:
        return bool(self._left)

    @property
    def left(self) -> tuple[T, ...]:
        """What it has not answered."""
        return tuple(self._left.values())

    @property
    def deadline(self) -> float:
        if not self._is_ready:
            return self._since + self._shape.start_seconds
        if self._is_paused:
            return float("inf")
        return self._since + self._shape.seconds + self._more

    def send(self, things: tuple[T, ...]) -> None:
        self._left = {thing.number: thing for thing in things}
        self._more = max(map(self._work.more, things)) if self._work.more else 0.0
        if self._is_ready:
            self._begin()

    def pause(self, number: int, *, is_paused: bool) -> None:
        if number in self._left:
            self._is_paused, self._since = is_paused, time.monotonic()

    def _begin(self) -> None:
        """Hand them over: the clock runs from here."""
        self._is_paused, self._since = False, time.monotonic()
        try:
            self.pipe.send(self.left)
        except OSError:
            pass  # it has died: the next look at the pipe says so

    def receive(self) -> Iterator[tuple[int, A]]:
        """The next message. ConfigError when it says that the work cannot be had."""
        message: Any = self.pipe.recv()
        self._since = time.monotonic()
        if isinstance(message, MoetrainError):
            raise message
        if self._is_ready:
            number, answer = message
            del self._left[number]
            return iter([(number, answer)])
        self._is_ready = True
        if self._left:
            self._begin()
        return iter(())

    def let_go(self) -> None:
        """Begin to end it."""
        self._leash.close()

    def close(self) -> None:
        """End it, and what it has started."""
        self._leash.close()
        self._process.join(5.0)
        if self._process.exitcode is None:
            assert self._process.pid  # killpg(0) would end the trainer
            try:
                os.killpg(self._process.pid, signal.SIGKILL)  # it leads a group of its own
            except (ProcessLookupError, PermissionError):
                self._process.kill()
            self._process.join()
        self.pipe.close()


def _serve(
    pipe: Connection,
    leash: Connection,
    work: Work[Any, Any],
    environment: Mapping[str, str],
) -> None:
    """In a worker: what it is handed, batch after batch, in the main thread, since math-verify and
    many own rewards use signals.
    """
    os.environ.clear()  # the fork server's, as it was when it was started
    os.environ.update(environment)

    def run() -> None:
        _restrict()
        try:
            answers = work.make()
        except Exception as error:  # a user's own code, models and drivers: told to the trainer
            if not isinstance(error, MoetrainError):
                message = str(error).partition("\n")[0]
                error = ConfigError(f"{work.name}: {type(error).__name__}: {message}")
            pipe.send(error)
            return
        pipe.send("ready")
        while True:
            try:
                things = pipe.recv()
            except EOFError:
                return
            for answer in answers(things):
                pipe.send(answer)

    kept(run, leash.fileno())


def _restrict() -> None:
    """Silent, bounded in what it writes, and the first to go where memory ends."""
    silent = os.open(os.devnull, os.O_RDWR)
    for stream in range(3):
        os.dup2(silent, stream)
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    largest = LARGEST_FILE if hard == resource.RLIM_INFINITY else min(LARGEST_FILE, hard)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest, hard))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    Path("/proc/self/oom_score_adj").write_text("1000")
