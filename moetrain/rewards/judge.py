"""A judge model behind an OpenAI-compatible server: its words, and the number in them."""

import asyncio
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import httpx

from moetrain.config.rewards import JudgeOptions, RewardConfig
from moetrain.errors import ConfigError
from moetrain.rewards.base import Completion, Grade, RewardKind, Shape, text_of
from moetrain.rewards.remote import Remote, RemoteError, about_key, as_they_come

_FIELD = re.compile(r"\{(\w+)\}")


class Judge:
    """Answers as a judge sees them, from 0 to 1; many requests at a time."""

    def __init__(self, configs: Sequence[RewardConfig]):
        (config,) = configs
        self.label = config.label
        self.options = JudgeOptions.model_validate(config.options)
        self.remote = _remote(self.options)
        self._loop = asyncio.Runner()
        self._free = asyncio.Semaphore(self.options.concurrency)
        self._client = httpx.AsyncClient(timeout=None)
        try:
            self._loop.run(self._words("Say: Score: 0"))
        except RemoteError as error:
            raise ConfigError(
                f"rewards: {self.label}: {error}. Look at url and model; the"
                f" {about_key(self.options.key_env)}."
            ) from None

    def grade(self, completions: Sequence[Completion]) -> Iterator[tuple[int, Grade]]:
        return as_they_come(self._loop, map(self._answer, completions))

    async def _answer(self, completion: Completion) -> tuple[int, Grade]:
        nothing = {self.label: None}
        if (
            not completion.said.strip()
        ):  # a thought that was cut, or no word: there is nothing to judge
            return completion.number, Grade({self.label: 0.0})
        try:
            words, is_cut = await self._words(fill(self.options.prompt, completion))
        except RemoteError as error:
            detail = f"{self.label}: {error}"
            return completion.number, Grade(nothing, error.fault, ("judge_unanswered",), detail)
        value = self._value(words, is_cut)
        if value is None:
            cut = f", which was cut at max_tokens={self.options.max_tokens}" if is_cut else ""
            detail = f"{self.label}: no number in {words[-200:]!r}{cut}"
            return completion.number, Grade(nothing, "error", ("judge_unreadable",), detail)
        return completion.number, Grade({self.label: value})

    async def _words(self, prompt: str) -> tuple[str, bool]:
        """What the judge says, and whether max_tokens, or the server's own limit, has cut it."""
        body = {
            "model": self.options.model,
            "messages": [{"role": "user", "content": prompt}],
            "max_tokens": self.options.max_tokens,
            "temperature": self.options.temperature,
        }
        async with self._free:
            message = await self.remote.post(self._client, "chat/completions", body)
        try:
            choice = message["choices"][0]
            return str(choice["message"]["content"] or ""), choice.get("finish_reason") == "length"
        except (KeyError, IndexError, TypeError, AttributeError):
            raise RemoteError(
                "error", f"{self.remote.url}: {str(message)[:200]} is not a chat completion"
            ) from None

    def _value(self, words: str, is_cut: bool) -> float | None:
        """None where there is no number, or one off the scale, or one that may have gone on: the 1
        of a 10.
        """
        matches = list(re.finditer(self.options.pattern, words))
        if not matches or (is_cut and matches[-1].end(1) == len(words)):
            return None
        low, high = self.options.low, self.options.high
        try:
            value = (float(matches[-1][1].replace("\u2212", "-")) - low) / (high - low)
        except (ValueError, AttributeError):  # the group took no part in the match
            return None
        return value if 0 <= value <= 1 else None


def fill(prompt: str, completion: Completion) -> str:
    """`prompt` with {completion} and {COLUMN} replaced, and other braces as they are."""
    words = {**completion.columns, "completion": completion.said}

    def put(match: re.Match[str]) -> str:
        if match[1] not in words:
            return match[0]
        value = words[match[1]]
        return text_of(value) if match[1] == "prompt" else str(value)

    return _FIELD.sub(put, prompt)


def _remote(options: JudgeOptions) -> Remote:
    key = os.environ.get(options.key_env)
    return Remote(options.url, key, options.seconds, options.retries)


def _shape(options: Mapping[str, Any], recipe: Shape) -> Shape:
    longest = _remote(JudgeOptions.model_validate(options)).longest
    return replace(
        recipe, num_workers=1, batch=4096, seconds=longest + 10.0, start_seconds=longest + 60.0
    )


JUDGE = RewardKind(Judge, _shape)
