"""`moetrain serve --agents`: a model behind the endpoint in OpenAI's form, whose sessions become
trajectories in a file.
"""

import hmac
import json
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any, TextIO

from moetrain import files
from moetrain.answers.sample import (
    answering_recipe,
    rollout_of,
    stopping_on_signals,
    weights_of,
)
from moetrain.config.answering import AGENTS, keys_given
from moetrain.config.recipe import Recipe
from moetrain.data.run_tokenizer import chat_of, tokenizer_of
from moetrain.data.samples import Prompt
from moetrain.data.trajectories import Trajectory, to_json
from moetrain.data.turns import stop_ids
from moetrain.engine.source import find_source
from moetrain.environments.base import Reply
from moetrain.errors import ConfigError, plural
from moetrain.loops.agent_api import Refused
from moetrain.loops.agent_server import HEADER, AgentServer, named_sessions
from moetrain.loops.agent_sessions import REWARD, Limits, Session
from moetrain.loops.agents import Board, limits_of
from moetrain.loops.rollouts import seed_of
from moetrain.loops.store import row_of
from moetrain.rewards import Verdict
from moetrain.rollout import open_engine
from moetrain.rollout.base import Request, Sampling
from moetrain.rollout.follow_ups import FollowUps
from moetrain.rollout.opening import token_of

MOST_SESSIONS = 4096  # that go on
LONGEST_NAME = 200  # characters
LOOK_SECONDS = 1.0  # between two looks for sessions that say nothing any more


def serve_agents(model: str, out: Path, port: int, overrides: Sequence[str] = ()) -> int:
    """Serve `model` until Ctrl-C or SIGTERM; each session that has ended is a line of `out`, behind
    what is there. Returns the exit code. Raises MoetrainError.
    """
    sections: dict[str, Any] = {"method": "grpo", "data": {"train": ["-"]}, "rollout": {},
                                "rewards": ["agent"]}  # fmt: skip
    AGENTS.check(keys_given(overrides))
    recipe = answering_recipe(model, out, overrides, sections)
    rollout = rollout_of(recipe)
    token = token_of(rollout.token_file, make=True) if rollout.token_file else ""
    source, chat = find_source(recipe.model), chat_of(recipe)
    stops = stop_ids(chat, source.hf)
    sampling = Sampling.of(rollout, rollout.temperature, stops)
    with ExitStack() as stack:
        stack.enter_context(files.named(out))
        engine = open_engine(recipe, source.hf, tokenizer_of(recipe))
        stack.callback(engine.close)
        engine.push(weights_of(recipe, source), 0)
        file = stack.enter_context(out.open("a", encoding="utf-8"))
        served = Served()
        desk = Desk(limits_of(recipe, chat, stops), sampling, recipe, file, served, token)
        try:
            with stopping_on_signals():
                server = _server(desk, port)
                stack.callback(server.close)
                stack.callback(desk.close)
                key = "X-Session-Id" if token else "API key or X-Session-Id"
                print(f"ready at {server.base_url}, {key}: your session's name", flush=True)
                engine.generate([], desk.board.drawn, served)
        except KeyboardInterrupt:
            desk.close()
            print(f"{out}: {plural(desk.num_ended, 'session')}")
    return 0


def _server(desk: "Desk", port: int) -> AgentServer:
    try:
        return AgentServer(desk, port)
    except OSError as error:
        raise ConfigError(f"--port {port}: {error.strerror}. Give another, or none.") from None


class Served(FollowUps):
    """Requests that may come at any time, until `stop`."""

    def __init__(self) -> None:
        super().__init__()
        self._is_stopped = False

    @property
    def is_open(self) -> bool:
        return not self._is_stopped

    def stop(self) -> None:
        """Nothing more comes."""
        with self._changed:
            self._is_stopped = True
            self._changed.notify_all()
        self.listener()

    def take_round(self) -> list[Request]:
        """The requests that have come, at least one."""
        with self._changed:
            self._changed.wait_for(lambda: bool(self._requests) or self._is_stopped)
        return self.take()


class Desk:
    """Sessions of whoever asks, each begun by its first request, and written when it has ended: by
    its agent's word, or after rollout.environment_seconds without one.
    """

    def __init__(
        self,
        limits: Limits,
        sampling: Sampling,
        recipe: Recipe,
        file: TextIO,
        served: Served,
        token: str,
    ):
        self.limits, self.sampling, self.token = limits, sampling, token
        self.board = Board(served, self._has_word)
        self.num_ended = 0
        self._recipe, self._file, self._numbers = recipe, file, count()
        self._since: dict[str, float] = {}  # sessions whose agent has the word -> time.monotonic
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="idle sessions")
        self._thread.start()

    def session_of(self, given: Mapping[str, str]) -> str:
        lower = {name.lower(): value for name, value in given.items()}
        if self.token:
            wanted = f"Bearer {self.token}"
            if not hmac.compare_digest(lower.get("authorization", "").encode(), wanted.encode()):
                raise Refused(401, "the API key is not this server's token", "no_token")
            lower.pop("authorization")
        session = named_sessions(lower)[0]
        if len(session) > LONGEST_NAME or not session.isprintable():
            raise Refused(400, f"{HEADER}: at most {LONGEST_NAME} printable characters")
        return session

    def chat(self, session: str, body: Any) -> Mapping[str, Any]:
        with self.board.lock:
            if session not in self.board:
                self._begin(session)
        return self.board.chat(session, body)

    def _begin(self, session: str) -> None:
        if self._is_over.is_set():
            raise Refused(503, "the server is being stopped", "stopped")
        if self.board.num_open >= MOST_SESSIONS:
            raise Refused(429, f"{MOST_SESSIONS} sessions go on", "too_many")
        # A name may come again, when its session has ended.
        name = f"{next(self._numbers):06d}"
        seed = self._recipe.seed
        seeds = lambda turn: seed_of(seed, f"{session}/{turn}", 0)  # noqa: E731
        self.board.open(session, Session(self.limits, None, 0, name, self.sampling, seeds))
        self._since[session] = time.monotonic()

    def reward(self, session: str, body: Any, *, ends: bool) -> None:
        if not ends or (isinstance(body, Mapping) and "reward" in body):
            self.board.reward(session, body)
        if ends:
            self._end(session, Reply())

    def _has_word(self, session: str, it_has: bool) -> None:
        self._since.pop(session, None)
        if it_has:
            self._since[session] = time.monotonic()

    def _end(self, session: str, reply: Reply) -> None:
        with self.board.lock:
            if session not in self.board:
                raise Refused(410, "there is no such session, or it has ended", "no_session")
            prompt = self.board.prompt_of(session)
            self._since.pop(session, None)
            self.board.close(session, reply, lambda one: self._write(session, prompt, one))

    def _write(self, session: str, prompt: Prompt | None, one: Trajectory) -> None:
        """A line in the form of a rollout's."""
        prompt = prompt or Prompt(one.prompt_id, (), {"prompt": ""})
        prompt = replace(prompt, columns=prompt.columns | {"session": session})
        reward = None if one.is_lost else (one.counts or {}).get(REWARD)
        verdict = Verdict(reward, {"agent": reward}, one.finish if one.is_lost else None)
        row = row_of(prompt, [to_json(one, readable=True)], [verdict])
        self._file.write(json.dumps(row, ensure_ascii=False) + "\n")
        self._file.flush()
        self.num_ended += 1

    def _watch(self) -> None:
        """End what says nothing any more."""
        most = rollout_of(self._recipe).environment_seconds
        while not self._is_over.wait(LOOK_SECONDS):
            with self.board.lock:
                late = time.monotonic() - most
                for session in [name for name, since in self._since.items() if since < late]:
                    self._end(session, Reply(fault="timeout"))

    def close(self) -> None:
        """End all sessions; those that go on are written as failed."""
        self._is_over.set()
        with self.board.lock:
            for session in self.board.keys():
                self._end(session, Reply(fault="error", detail="the server was stopped"))
