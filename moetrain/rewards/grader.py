"""Processes that grade: warm, with a deadline for each completion, and replaced when one hangs or
dies. What happens to one completion costs no other.
"""

import multiprocessing
import os
import signal
import time
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

from moetrain.config.rewards import RewardConfig
from moetrain.errors import ConfigError
from moetrain.rewards.base import Graded
from moetrain.rewards.find import find_reward

START_SECONDS = 60.0  # for a worker to import what the rewards need
Item = tuple[int, str, dict[str, Any]]  # number, completion, its columns


class Grader:
    """Grades completions by the weighted sum of rewards.

    Args:
        configs: the recipe's rewards. Raises ConfigError when one cannot be found.
        num_workers: processes.
        deadline_s: seconds that one completion may take.
    """

    def __init__(self, configs: Sequence[RewardConfig], num_workers: int, deadline_s: float):
        if not configs:
            raise ConfigError("rewards is empty: name at least one, such as `rewards: [accuracy]`.")
        for config in configs:
            find_reward(config.name)
        self.configs, self.deadline_s = list(configs), deadline_s
        self.counts: Counter[str] = Counter()
        self._workers = [_Worker(self.configs) for _ in range(num_workers)]

    def grade(
        self, completions: Sequence[str], columns: Mapping[str, Sequence[Any]]
    ) -> list[Graded]:
        """One verdict for each completion, in order; `columns` have a value for each."""
        queue: deque[Item] = deque(
            (i, text, {name: values[i] for name, values in columns.items()})
            for i, text in enumerate(completions)
        )
        found: dict[int, Graded] = {}
        while len(found) < len(completions):
            for worker in self._workers:
                if worker.item is None and queue:
                    worker.send(queue.popleft())
            self._collect(found)
        return [found[i] for i in range(len(completions))]

    def _collect(self, found: dict[int, Graded]) -> None:
        """Take what is ready, and end what is past its deadline."""
        busy = [worker for worker in self._workers if worker.item is not None]
        now = time.monotonic()
        patience = max(0.0, min(worker.deadline(self.deadline_s) for worker in busy) - now)
        wait([worker.pipe for worker in busy], patience)
        for place, worker in enumerate(self._workers):
            if worker.item is None:
                continue
            number = worker.item[0]
            fault: str | None = None
            try:
                if worker.pipe.poll():
                    answer = worker.pipe.recv()
                    if answer == "ready":
                        worker.begin()
                        continue
                    found[number] = self._verdict(answer)
                    worker.item = None
                    continue
                if time.monotonic() >= worker.deadline(self.deadline_s):
                    fault = "timeout"
            except (EOFError, OSError):
                fault = "crash"
            if fault is not None:
                worker.close()
                self._workers[place] = _Worker(self.configs)
                self.counts[fault] += 1
                found[number] = Graded(None, {}, fault)

    def _verdict(self, answer: dict[str, float | None] | str) -> Graded:
        if isinstance(answer, str):  # what the reward raised
            self.counts["error"] += 1
            return Graded(None, {}, "error")
        applies = [c for c in self.configs if answer[c.label] is not None]
        if not applies:
            return Graded(None, answer)
        return Graded(sum(c.weight * (answer[c.label] or 0.0) for c in applies), answer)

    def close(self) -> None:
        """End all workers, and what they have started."""
        for worker in self._workers:
            worker.close()
        self._workers = []


class _Worker:
    """One process and the completion in its hands."""

    def __init__(self, configs: Sequence[RewardConfig]):
        context = multiprocessing.get_context("forkserver")
        self.pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, list(configs)), daemon=True)
        self._process.start()
        theirs.close()
        self.item: Item | None = None
        self._since = time.monotonic()
        self._is_ready = False

    def send(self, item: Item) -> None:
        self.item = item
        if self._is_ready:
            self.begin()

    def begin(self) -> None:
        """Hand it over: the clock runs from here."""
        self._is_ready = True
        self._since = time.monotonic()
        try:
            self.pipe.send(self.item)
        except OSError:
            pass  # it has died: the next look at the pipe says so

    def deadline(self, seconds: float) -> float:
        return self._since + (seconds if self._is_ready else START_SECONDS)

    def close(self) -> None:
        try:
            os.killpg(self._process.pid or 0, signal.SIGKILL)  # it leads a group of its own
        except (ProcessLookupError, PermissionError):
            self._process.kill()
        self._process.join()
        self.pipe.close()


def _serve(pipe: Connection, configs: Sequence[RewardConfig]) -> None:
    """In a worker: one completion after the other, in the main thread, since math-verify and many
    own rewards use signals.
    """
    os.setsid()
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 1)
    os.dup2(silent, 2)
    functions = [(config, find_reward(config.name)) for config in configs]
    for config, _ in functions:
        if config.name == "accuracy":
            import math_verify  # noqa: F401  # seconds, which no completion should pay
    pipe.send("ready")
    while True:
        try:
            _, text, columns = pipe.recv()
        except EOFError:
            return
        lists = {name: [value] for name, value in columns.items()}
        try:
            answer: Any = {}
            for config, function in functions:
                scores = function([text], **{**lists, **config.options})
                answer[config.label] = None if scores[0] is None else float(scores[0])
        except Exception as error:  # a user's own code, which may fail in any way
            answer = f"{type(error).__name__}: {error}"
        pipe.send(answer)
