"""Environments in processes of their own: a tool that hangs, dies or lies in its output costs the
trajectory that called it, and no other.
"""

import os
import threading
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from multiprocessing.connection import Connection, wait
from typing import Any, Literal

from moetrain.config.rollout import RolloutConfig
from moetrain.data.messages import FormatError, Message
from moetrain.data.scene import Scene
from moetrain.environments.agents import Access, Agents
from moetrain.environments.base import Environment, Fault, Reply, Silent, Tool
from moetrain.environments.find import check_names, open_environment
from moetrain.environments.replies import read_replies
from moetrain.errors import ConfigError, MoetrainError
from moetrain.rewards.base import Shape
from moetrain.rewards.pool import Pool, Work

START_SECONDS = 120.0  # to load a user's file, or to index a folder


@dataclass(frozen=True)
class Question:
    """What a process is asked."""

    number: int
    what: Literal["tools", "reset", "reply", "run"]
    record: Mapping[str, Any]
    messages: tuple[Message, ...] = ()
    access: Access | None = None  # of an agent that is to run


@dataclass(frozen=True)
class Told:
    """What a process said: of its tools, else a reply."""

    reply: Reply
    tools: tuple[Tool, ...] = ()
    is_silent: bool = False  # it says nothing at a reset


class EnvironmentService:
    """The recipe's environment in `rollout.environment_workers` processes.

    May be used by several threads. What is late is noticed by who waits in `answers`.

    Raises ConfigError where the environment cannot be had.
    """

    def __init__(self, rollout: RolloutConfig):
        check_names(rollout)
        self._numbers = count()
        self._keys: dict[int, Hashable] = {}
        self._lock = threading.Lock()  # of all that follows
        self._turn = threading.Lock()  # one thread waits at a time
        self._wake_read, self._wake_write = os.pipe()
        self._is_closed = False
        work = Work[Question, Told](
            f"rollout.environment={rollout.environment}",
            partial(_serving, rollout),
            _failed,
            more=_more,
        )
        shape = Shape(rollout.environment_workers, 1, rollout.environment_seconds, START_SECONDS)
        self._pool = Pool(work, shape)
        try:
            self._pool.wait_ready()
            told = self._only(Question(-1, "tools", {}))
            if told.reply.fault:
                raise ConfigError(f"{work.name}: {told.reply.detail or told.reply.fault}")
        except BaseException:
            self.close()
            raise
        self.tools, self._is_silent = told.tools, told.is_silent
        # What prompts have of it, for `data/prompts.py`.
        opening = None if told.is_silent else self.reset
        has_turns = rollout.environment not in ("single", "agents")
        self.scene = Scene(told.tools, opening, has_turns)

    def ask(self, key: Hashable, record: Mapping[str, Any], messages: Sequence[Message]) -> None:
        """Ask for the reply to the last of `messages`, the model's turn; `key` is told with it."""
        self._ask(key, lambda number: Question(number, "reply", record, tuple(messages)))

    def run(self, key: Hashable, record: Mapping[str, Any], access: Access) -> None:
        """Run an agent; the reply is its end, with the reward that it gave."""
        self._ask(key, lambda number: Question(number, "run", record, access=access))

    def pause(self, key: Hashable, *, is_paused: bool) -> None:
        """Stop the clock of what `key` was given for, or begin it anew."""
        with self._lock:
            for number in [number for number, own in self._keys.items() if own == key]:
                self._pool.pause(number, is_paused=is_paused)
        os.write(self._wake_write, b"!")  # the next deadline is another

    def _ask(self, key: Hashable, question: Callable[[int], Question]) -> None:
        with self._lock:
            number = next(self._numbers)
            self._keys[number] = key
            self._pool.ask([question(number)])
            self._pool.send()
        os.write(self._wake_write, b"!")

    def reset(self, record: Mapping[str, Any]) -> list[Message]:
        """What is said behind a record's own messages; while no reply is waited for. Raises
        FormatError with the reason where there is none.
        """
        if self._is_silent:
            return []
        reply = self._only(Question(-1, "reset", record)).reply
        if reply.fault:
            raise FormatError(f"the environment cannot begin: {reply.detail or reply.fault}")
        return list(reply.messages or ())

    @property
    def num_waiting(self) -> int:
        """Questions without an answer."""
        with self._lock:
            return len(self._keys)

    def answers(self, timeout: float | None) -> list[tuple[Hashable, Reply]]:
        """All that is answered by now, or what is first within `timeout` seconds (None: without
        end, but for the deadlines; nothing where nothing is asked). Each answer is told once.
        Raises ConfigError where a process that is started anew cannot load the environment.
        """
        end = float("inf") if timeout is None else time.monotonic() + timeout
        if not self._turn.acquire(timeout=-1 if timeout is None else timeout):
            return []
        try:
            while True:
                found, pipes, deadline = self._look()
                if found or self._is_closed or (timeout is None and not self.num_waiting):
                    return found
                if (now := time.monotonic()) >= end:
                    return []
                ready = wait([*pipes, self._wake_read], _seconds(min(end, deadline) - now))
                if self._wake_read in ready:
                    os.read(self._wake_read, 4096)
        finally:
            self._turn.release()

    def _look(self) -> tuple[list[tuple[Hashable, Reply]], list[Connection], float]:
        """(what is answered, where more is expected, until when)."""
        with self._lock:
            replies = [(self._keys.pop(n), answer.reply) for n, answer in self._pool.answers()]
            self._pool.send()
            return replies, self._pool.pipes, self._pool.deadline

    def _only(self, question: Question) -> Told:
        """What a process says where nothing else is asked."""
        assert not self._keys
        self._pool.ask([question])
        while True:
            self._pool.send()
            for _, answer in self._pool.answers():
                return answer
            wait(self._pool.pipes, _seconds(self._pool.deadline - time.monotonic()))

    def close(self) -> None:
        """End all processes, and what they have started. What is not answered is forgotten."""
        if self._is_closed:
            return
        self._is_closed = True
        os.write(self._wake_write, b"!")
        with self._turn, self._lock:
            self._pool.close()
            self._keys.clear()
            os.close(self._wake_read)
            os.close(self._wake_write)


def _seconds(left: float) -> float | None:
    return None if left == float("inf") else max(0.0, left)


def _failed(fault: str) -> Told:
    known: dict[str, Fault] = {"timeout": "timeout", "crash": "crash"}
    return Told(Reply(fault=known[fault]))


def _more(question: Question) -> float:
    return START_SECONDS if question.what == "tools" else 0.0


def _serving(
    rollout: RolloutConfig,
) -> Callable[[Sequence[Question]], Iterator[tuple[int, Told]]]:
    environment = open_environment(rollout)

    def serve(questions: Sequence[Question]) -> Iterator[tuple[int, Told]]:
        for question in questions:
            yield question.number, _told(environment, question, rollout.reply_chars)

    return serve


def _told(environment: Environment, question: Question, most: int) -> Told:
    """A user's own code may fail in any way, and return anything."""
    try:
        if question.what == "tools":
            return Told(Reply(), tuple(environment.tools), isinstance(environment, Silent))
        if isinstance(environment, Agents) and question.access is not None:
            return Told(Reply(reward=environment.run(question.record, question.access)))
        if question.what == "reset":
            said = environment.reset(question.record)
        else:
            said = environment.reply(question.record, question.messages)
        called = question.messages[-1] if question.messages else {}
        return Told(read_replies(said, called, most))
    except (FormatError, MoetrainError) as error:
        return Told(Reply(fault="error", detail=str(error)))
    except Exception as error:
        return Told(Reply(fault="error", detail=f"{type(error).__name__}: {error}"[:300]))
