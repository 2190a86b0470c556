"""A reward model behind servers that speak vLLM's /classify: rows of token ids go there, and a
scalar comes back for each.
"""

import asyncio
import math
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx

from moetrain.config.rewards import RewardConfig, RewardModelOptions
from moetrain.data import tokenizer as tokenizers
from moetrain.data.chat import Chat
from moetrain.data.messages import FormatError
from moetrain.errors import ConfigError
from moetrain.rewards.base import Completion, Grade
from moetrain.rewards.conversations import tokens_of
from moetrain.rewards.remote import Remote, RemoteError, about_key, as_they_come, models_in

RETRIES = 5
DOWN_SECONDS = 60.0  # after it has failed, a server is asked last
NOTE = "reward_model_unanswered"
# Texts that tokenizers which are not the same cut differently, or end otherwise.
PROBES = ("Hello, world", "x = 12345", "  naïve\n\n\tKöln", "東京で会いましょう")
ALIKE = 0.05  # of a score, and beside it: more than bf16 makes of the same weights


class RewardServers:
    """As `RewardModel`, the forward being the servers'. Raises ConfigError where one of them does
    not answer, or serves what cannot be this recipe's reward.
    """

    def __init__(self, configs: Sequence[RewardConfig]):
        (config,) = configs
        self.label = config.label
        self.options = RewardModelOptions.model_validate(config.options)
        self.tokenizer = tokenizers.load(Path(self.options.path).expanduser())
        self.chat = Chat(self.tokenizer, self.options.chat_template)
        self._remotes = remotes_of(self.options)
        self._loop = asyncio.Runner()
        self._free = [asyncio.Semaphore(self.options.concurrency) for _ in self._remotes]
        self._failed = [-math.inf for _ in self._remotes]  # when, last
        self._all = asyncio.Semaphore(self.options.concurrency * len(self._remotes))
        limits = httpx.Limits(max_connections=None)
        self._client = httpx.AsyncClient(timeout=None, limits=limits)
        looked_at = remotes_of(self.options, retries=1)
        try:
            self._models = [self._loop.run(self._look(remote)) for remote in looked_at]
            self._compare(looked_at)
        except BaseException as error:
            self.close()
            if not isinstance(error, RemoteError):
                raise
            raise ConfigError(
                f"rewards: {self.label}: {error}. It has to be a server of a reward model: vllm"
                " serve FOLDER --runner pooling, or moetrain serve MODEL --reward-model. A"
                f" {about_key(self.options.key_env)}."
            ) from None

    def close(self) -> None:
        """Let the connections go."""
        self._loop.run(self._client.aclose())
        self._loop.close()

    def grade(self, completions: Sequence[Completion]) -> Iterator[tuple[int, Grade]]:
        return as_they_come(self._loop, map(self._graded, completions))

    async def _graded(self, completion: Completion) -> tuple[int, Grade]:
        try:
            async with self._all:  # tokenised as it is wanted, so that no server waits for the last
                row = tokens_of(completion, self.chat, self.options.max_tokens)
                score = await self.score(row, completion.number)
        except FormatError as error:
            return completion.number, self._fault("error", str(error))
        except RemoteError as error:
            return completion.number, self._fault(error.fault, str(error), NOTE)
        if math.isfinite(score):
            return completion.number, Grade({self.label: score})
        return completion.number, self._fault("error", f"the score is {score}")

    def _fault(self, fault: str, detail: str, *notes: str) -> Grade:
        return Grade({self.label: None}, fault, notes, f"{self.label}: {detail}")

    async def score(self, row: Sequence[int], turn: int) -> float:
        """The scalar at the last token of `row`, of server `turn`, or where that fails of the next.
        Raises RemoteError.
        """
        trouble = RemoteError("error", "")
        order = [(turn + i) % len(self._remotes) for i in range(len(self._remotes))]
        late = time.monotonic() - DOWN_SECONDS
        for number in sorted(order, key=lambda number: self._failed[number] > late):
            try:
                async with self._free[number]:
                    (score,) = await self._asked(
                        self._remotes[number], self._models[number], [row], raw=True
                    )
                return score
            except RemoteError as error:
                trouble = error
                self._failed[number] = time.monotonic()
        raise trouble

    async def _asked(
        self, remote: Remote, model: str, rows: Sequence[Sequence[int]], *, raw: bool
    ) -> list[float]:
        """The score of each row: as `method: reward` learned it, or as the server would have it."""
        body = {"model": model, "input": [list(row) for row in rows], "use_activation": not raw}
        return scores_of(await remote.post(self._client, "classify", body), len(rows), remote.url)

    # What is looked at before the first step

    async def _look(self, remote: Remote) -> str:
        """The name of the model there. Raises ConfigError, RemoteError."""
        listed = await remote.get(self._client, "v1/models")
        name, longest = self._named(listed, remote.url)
        if longest is not None and longest < self.options.max_tokens:
            raise ConfigError(
                f"rewards: {self.label}: {remote.url} takes {longest} tokens, and max_tokens asks"
                f" for {self.options.max_tokens}. Set max_tokens to {longest}, or start it with"
                f" --max-model-len {self.options.max_tokens}."
            )
        for text in PROBES:
            body = {"model": name, "prompt": text, "add_special_tokens": False}
            answer = await remote.post(self._client, "tokenize", body)
            theirs = answer.get("tokens") if isinstance(answer, dict) else None
            if theirs != self.tokenizer.encode(text, add_special_tokens=False):
                raise ConfigError(
                    f"rewards: {self.label}: {remote.url} cuts {text!r} into other tokens than"
                    f" {self.options.path} does. Set path to the folder of the model that is served"
                    " there."
                )
        return name

    def _named(self, listed: Any, where: str) -> tuple[str, int | None]:
        """(name, longest row) of the model that is asked."""
        models = models_in(listed, where)
        name = self.options.model or next(iter(models), "")
        if name not in models:
            raise ConfigError(
                f"rewards: {self.label}: model={name}: {where} serves"
                f" {', '.join(models) or 'nothing'}. Give one of them."
            )
        return name, models[name]

    def _compare(self, remotes: Sequence[Remote]) -> None:
        """Raises ConfigError where servers differ, or one gives no raw scores; RemoteError."""
        rows = [self.tokenizer.encode(text, add_special_tokens=False) for text in PROBES]
        first: list[float] = []
        for remote, model in zip(remotes, self._models, strict=True):
            raw = self._loop.run(self._asked(remote, model, rows, raw=True))
            other = self._loop.run(self._asked(remote, model, rows, raw=False))
            if raw == other and all(0 <= score <= 1 for score in raw):
                raise ConfigError(
                    f"rewards: {self.label}: {remote.url} brings its scores between 0 and 1,"
                    " whether asked to or not (use_activation of /classify). Take vLLM 0.32, or"
                    " moetrain serve MODEL --reward-model."
                )
            first = first or raw
            for ours, theirs in zip(first, raw, strict=True):
                if not abs(ours - theirs) <= ALIKE * (1 + abs(ours)):
                    raise ConfigError(
                        f"rewards: {self.label}: {self._remotes[0].url} scores a text {ours:.4g},"
                        f" and {remote.url} {theirs:.4g}: they serve different models. Give"
                        " addresses of one."
                    )


def remotes_of(options: RewardModelOptions, retries: int = RETRIES) -> list[Remote]:
    """Its servers."""
    key = os.environ.get(options.key_env)
    return [Remote(url, key, options.seconds, retries) for url in options.address]


def scores_of(answer: Any, num: int, where: str) -> list[float]:
    """The scores in an answer of /classify. Raises RemoteError where it has others."""
    try:
        scores = [one["probs"] for one in sorted(answer["data"], key=lambda one: one["index"])]
        wide = next((one for one in scores if len(one) != 1), None)
        if wide is not None:
            text = f"{where} serves a model with {len(wide)} labels, and a reward model has one"
            raise RemoteError("error", text)
        if len(scores) != num:
            raise ValueError(f"{len(scores)} scores for {num} rows")
        return [float(score) for (score,) in scores]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise RemoteError(
            "error", f"{where}: no answer of /classify ({type(error).__name__}: {error!s:.100})"
        ) from None
