"""Trajectories of agents: for each answer one is started, which speaks to the model through the
endpoint of `agent_server.py`, and its turns become the trajectory.
"""

import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from moetrain.config.recipe import Recipe
from moetrain.data.chat import Chat
from moetrain.data.messages import FormatError
from moetrain.data.samples import Prompt, Sample
from moetrain.data.trajectories import Trajectory
from moetrain.environments.agents import Access, reward_of
from moetrain.environments.base import Reply
from moetrain.environments.service import EnvironmentService
from moetrain.loops.agent_api import Refused, answer_of
from moetrain.loops.agent_server import MODEL, AgentServer, named_sessions
from moetrain.loops.agent_sessions import Limits, Session, Turn
from moetrain.rollout.base import RolloutEngine, Sampling
from moetrain.rollout.follow_ups import FollowUps

POLL_SECONDS = 0.5  # after which a draw that has ended is noticed


@dataclass(eq=False)
class _Drawn:
    """A turn that an agent waits for."""

    live: "_Live"
    turn: Turn
    answer: Mapping[str, Any] | None = None
    is_there: threading.Event = field(default_factory=threading.Event)


@dataclass(eq=False)
class _Live:
    """A session that goes on."""

    key: str
    session: Session
    waiting: set[_Drawn] = field(default_factory=set["_Drawn"])
    is_over: bool = False


class Board:
    """Sessions that go on, between the threads of agents and the engine that draws their turns.

    A session whose agent has the word is `asked` for in `follow_ups`: what comes may be a request.

    Args:
        has_word: (session, whether its agent has the word, and not the model): called at changes.
    """

    def __init__(
        self, follow_ups: FollowUps, has_word: Callable[[str, bool], None] = lambda key, it: None
    ):
        self.follow_ups, self._has_word = follow_ups, has_word
        self.lock = threading.RLock()
        self._live: dict[str, _Live] = {}
        self._drawn: dict[str, _Drawn] = {}  # by the name of its request

    def open(self, key: str, session: Session) -> None:
        """An agent has the word from now on."""
        with self.lock:
            self.follow_ups.ask()
            self._live[key] = _Live(key, session)

    def __contains__(self, key: str) -> bool:
        return key in self._live

    def keys(self) -> list[str]:
        """Of the sessions that go on."""
        return list(self._live)

    def prompt_of(self, key: str) -> Prompt | None:
        """What a session answers; None where nothing was asked in it yet."""
        return self._live[key].session.prompt

    @property
    def num_open(self) -> int:
        """Sessions that go on."""
        return len(self._live)

    def chat(self, key: str, body: Any) -> Mapping[str, Any]:
        """The answer to a request, when it is drawn. Raises Refused."""
        with self.lock:
            live = self._of(key)
            one = _Drawn(live, live.session.ask(body))
            self._drawn[one.turn.request.prompt.id] = one
            if live.waiting:  # an agent may ask for several turns at once
                self.follow_ups.ask()
            else:
                self._has_word(key, False)
            live.waiting.add(one)
            self.follow_ups.settle(one.turn.request)
        one.is_there.wait()
        if one.answer is None:
            raise _gone()
        return one.answer

    def reward(self, key: str, body: Any) -> None:
        """The reward that an agent gives its session. Raises Refused."""
        value = body.get("reward") if isinstance(body, Mapping) else body
        with self.lock:
            live = self._of(key)
            try:
                live.session.reward = None if value is None else reward_of(value)
            except FormatError as error:
                live.session.counts["agents/refused"] += 1
                raise Refused(400, str(error)) from None

    def _of(self, key: str) -> _Live:
        live = self._live.get(key)
        if live is None:
            raise _gone()
        return live

    def drawn(self, sample: Sample) -> None:
        """Take a turn of the model."""
        with self.lock:
            one = self._drawn.pop(sample.prompt_id)
            if one.live.is_over:
                return
            request = one.turn.request
            turn = one.live.session.take(one.turn, sample)
            seen, now = len(request.prompt.tokens), int(time.time())
            one.answer = answer_of(request.prompt.id, MODEL, now, turn, sample, seen)
            one.live.waiting.discard(one)
            if not one.live.waiting:
                self.follow_ups.ask()
                self._has_word(one.live.key, True)
        one.is_there.set()

    def close(self, key: str, reply: Reply, then: Callable[[Trajectory], None]) -> None:
        """A session has ended; `then` takes its trajectory before the engine hears of it."""
        with self.lock:
            live = self._live.pop(key)
            live.is_over = True
            for one in live.waiting:
                one.is_there.set()
            then(live.session.ended(reply))
            if not live.waiting:
                self.follow_ups.settle(None)

    def clear(self) -> None:
        """All that wait are told that there is nothing more."""
        with self.lock:
            for live in self._live.values():
                live.is_over = True
                for one in live.waiting:
                    one.is_there.set()
            self._live.clear()


def _gone() -> Refused:
    return Refused(410, "there is no such session, or it has ended", "no_session")


class Agents:
    """The agents of a recipe, and the endpoint that they speak to; both end with `stack`. Raises
    ConfigError.
    """

    def __init__(self, recipe: Recipe, chat: Chat, stop_ids: tuple[int, ...], stack: ExitStack):
        _, rollout = recipe.sampling
        self.limits = limits_of(recipe, chat, stop_ids)
        self._most = rollout.environment_workers
        self.service = EnvironmentService(rollout)
        stack.callback(self.service.close)
        self._board = Board(FollowUps())
        self.server = AgentServer(self)
        stack.callback(self.server.close)

    def begin(self, prompt: Prompt) -> Prompt:
        """The record as it is: its agent says what the model is asked."""
        return prompt

    def draw(
        self,
        engine: RolloutEngine,
        sampling: Sampling,
        wanted: Sequence[tuple[Prompt, int]],
        seed_of: Callable[[str, int, int], int],
        keep: Callable[[Trajectory], None],
    ) -> None:
        """Run an agent for each prompt and index; `keep` takes its trajectory, one at a time.

        Args:
            seed_of: (prompt, index, turn) -> the seed of a turn.
        """
        pause = self.service.pause
        board = Board(FollowUps(), lambda key, has_word: pause(key, is_paused=not has_word))
        self._board = board
        left = deque(wanted)

        def begin() -> None:
            """As many as there are processes for: what has not begun holds no engine up."""
            while left and board.num_open < self._most:
                prompt, index = left.popleft()
                key = secrets.token_hex(16)
                name = f"{prompt.id}/{index:05d}"
                seeds = partial(seed_of, prompt.id, index)
                board.open(key, Session(self.limits, prompt, index, name, sampling, seeds))
                self.service.run(key, prompt.columns, Access(self.server.base_url, key))

        def kept(one: Trajectory) -> None:
            keep(one)
            begin()

        def listen() -> None:
            try:
                while not is_over.is_set():
                    for key, reply in self.service.answers(POLL_SECONDS):
                        if str(key) in board:  # not of an earlier draw
                            board.close(str(key), reply, kept)
            except BaseException as error:  # raised again by the engine's draw
                board.follow_ups.fail(error)

        is_over = threading.Event()
        thread = threading.Thread(target=listen, daemon=True, name="agents' ends")
        with board.lock:
            begin()
        thread.start()
        try:
            engine.generate([], board.drawn, board.follow_ups)
        finally:
            is_over.set()
            board.clear()
            thread.join()

    # What the endpoint asks

    def session_of(self, given: Mapping[str, str]) -> str:
        # A client may have names of its own for the header: one that is none of ours says nothing.
        named = named_sessions(given)
        return next((name for name in named if name in self._board), named[0])

    def chat(self, session: str, body: Any) -> Mapping[str, Any]:
        return self._board.chat(session, body)

    def reward(self, session: str, body: Any, *, ends: bool) -> None:
        if ends:
            raise Refused(404, "a session ends with its agent", "not_found")
        self._board.reward(session, body)


def limits_of(recipe: Recipe, chat: Chat, stop_ids: tuple[int, ...]) -> Limits:
    """What a recipe says of an agent's turns."""
    _, rollout = recipe.sampling
    return Limits(chat, stop_ids, rollout.call_format, rollout.max_turns, recipe.data.seq_len)
