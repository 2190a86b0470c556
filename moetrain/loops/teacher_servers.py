"""A teacher behind OpenAI-compatible servers of vLLM: log-probs of an answer's tokens, by ids.

Legend: t tokens of a branch, k likeliest tokens.
"""

import asyncio
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import cycle
from typing import Any

import httpx
import numpy as np

from moetrain.config.distill import TeacherConfig
from moetrain.config.recipe import Recipe
from moetrain.data import tokenizer as tokenizers
from moetrain.data.groups import GradedAnswer, Group
from moetrain.data.run_tokenizer import model_vocab, tokenizer_of
from moetrain.data.same_vocabulary import REFUSED
from moetrain.data.samples import Prompt
from moetrain.data.teacher_prompts import TeacherPrompts
from moetrain.data.trajectories import Branch, Word
from moetrain.errors import DataError, RolloutError
from moetrain.loops.teacher import teacher_prompts
from moetrain.rewards.remote import Remote, RemoteError, models_in

RETRIES = 5
MOST_BYTES = 1 << 30  # of an answer: 20 tokens at each of 100,000 places
# Texts that tokenizers which are not the same cut differently, or end otherwise.
PROBES = (
    "Hello, world",
    "x = 12345",
    "  naïve\n\n\tKöln",
    "東京で会いましょう",
    "def f(x):\n    return x",
)


class TeacherServers:
    """The recipe's teacher.address; `close` when it is done with. One process asks.

    Raises RolloutError where a server does not answer, and DataError where what it serves cannot
    teach this student.
    """

    def __init__(self, recipe: Recipe):
        assert recipe.teacher is not None
        self.config: TeacherConfig = recipe.teacher
        self.k = recipe.method.teacher_tokens
        self.concurrency = self.config.concurrency * len(self.config.address)
        self._vocab = model_vocab(recipe)
        self.prompts: TeacherPrompts | None = (
            None if not recipe.method.samples else teacher_prompts(recipe)
        )
        key = os.environ.get(self.config.key_env)
        self._remotes = [
            Remote(url, key, self.config.seconds, RETRIES, MOST_BYTES)
            for url in self.config.address
        ]
        self._loop = asyncio.Runner()
        self._client = httpx.AsyncClient(timeout=None, limits=httpx.Limits(max_connections=None))
        try:
            self.models = [self._look(remote, recipe) for remote in self._remotes]
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Let the connections go."""
        self._loop.run(self._client.aclose())
        self._loop.close()

    def taught(self, groups: Sequence[Group]) -> list[Group]:
        """The groups, each of whose branches has the teacher's word."""
        asked: list[tuple[Prompt, Branch]] = []
        for group in groups:
            prompt = group.prompt if self.prompts is None else self.prompts.of(group.prompt)
            for answer in group.answers:
                asked += [(prompt, branch) for branch in answer.trajectory.branches]
        contexts = [
            prompt.tokens if branch.context is None else branch.context.tolist()
            for prompt, branch in asked
        ]
        sequences = [
            (list(c), one.tokens.tolist()) for c, (_, one) in zip(contexts, asked, strict=True)
        ]
        words = iter(self.words(sequences))
        return [
            replace(group, answers=tuple(_with(answer, words) for answer in group.answers))
            for group in groups
        ]

    def words(self, sequences: Sequence[tuple[list[int], list[int]]]) -> list[Word]:
        """Of what stands behind each (context, tokens). Raises RolloutError."""
        return self._loop.run(self._all(sequences))

    async def _all(self, sequences: Sequence[tuple[list[int], list[int]]]) -> list[Word]:
        free = [asyncio.Semaphore(self.config.concurrency) for _ in self._remotes]
        dealt = zip(sequences, cycle(range(len(free))), strict=False)
        made = [
            asyncio.ensure_future(self._word(*one, number, free[number])) for one, number in dealt
        ]
        try:
            return await asyncio.gather(*made)
        finally:
            for one in made:
                one.cancel()

    async def _word(
        self, context: list[int], tokens: list[int], number: int, free: asyncio.Semaphore
    ) -> Word:
        remote = self._remotes[number]
        body = _asking(self.models[number], [*context, *tokens], self.k)
        try:
            async with free:
                answer = await remote.post(self._client, "completions", body)
        except RemoteError as error:
            raise RolloutError(
                f"teacher.address: {error}. Is the server alive? The same command goes on."
            ) from None
        word = word_of(answer, tokens, len(context), self.k, remote.url)
        largest = int(word.ids.max(initial=0))
        if self._vocab is not None and largest >= self._vocab:
            raise RolloutError(
                f"teacher.address: {remote.url} finds token {largest} likely, and the student has"
                f" {self._vocab}. Lower method.top_k, or take teacher.path, which leaves it out"
            )
        return word

    def _look(self, remote: Remote, recipe: Recipe) -> str:
        """The name of the model there, which is tried with two tokens."""
        try:
            listed = self._loop.run(remote.get(self._client, "models"))
            name, longest = _named(listed, self.config.model, remote.url)
            needed = recipe.data.seq_len + 1
            if longest is not None and longest < needed:
                raise DataError(
                    f"teacher.address: {remote.url} takes {longest} tokens, and data.seq_len asks"
                    f" for {needed}, one of them drawn. Start it with --max-model-len {needed}"
                )
            self._compare(remote, name, recipe)
            answer = self._loop.run(
                remote.post(self._client, "completions", _asking(name, [1, 1], self.k))
            )
        except RemoteError as error:
            raise RolloutError(
                f"teacher.address: {error}. It has to be an OpenAI-compatible server of vLLM that"
                f" gives prompt_logprobs={self.k} (vllm serve --max-logprobs {max(20, self.k)}); a"
                f" key is read from the environment variable {self.config.key_env}"
            ) from None
        word_of(answer, [1], 1, self.k, remote.url)
        return name

    def _compare(self, remote: Remote, name: str, recipe: Recipe) -> None:
        """Raise DataError where the server's tokenizer is another."""
        tokenizer = tokenizers.load(tokenizer_of(recipe))
        root = Remote(remote.url.removesuffix("/v1"), None, self.config.seconds, RETRIES)
        root.headers = remote.headers
        for text in PROBES:
            body = {"model": name, "prompt": text, "add_special_tokens": False}
            answer = self._loop.run(root.post(self._client, "tokenize", body))
            theirs = answer.get("tokens") if isinstance(answer, dict) else None
            if theirs != tokenizer.encode(text, add_special_tokens=False):
                raise DataError(
                    f"teacher.address: {remote.url} cuts {text!r} into other tokens than the"
                    f" student does. {REFUSED}"
                )


def check_servers(recipe: Recipe) -> None:
    """Look once, before a model is loaded, whether teacher.address can teach this student. Raises
    as `TeacherServers`.
    """
    replays = recipe.rollout is not None and recipe.rollout.replay is not None
    if recipe.teacher is not None and recipe.teacher.address and not replays:
        TeacherServers(recipe).close()


def _asking(model: str, tokens: list[int], k: int) -> dict[str, Any]:
    """What a server of vLLM 0.32 is asked: it draws one token, which nobody needs."""
    return {
        "model": model,
        "prompt": tokens,
        "max_tokens": 1,
        "temperature": 0,
        "prompt_logprobs": k,
    }


def word_of(answer: Any, tokens: Sequence[int], start: int, k: int, where: str) -> Word:
    """What a completion says of its prompt's tokens from `start` on. Raises RolloutError."""
    try:
        places = answer["choices"][0]["prompt_logprobs"][start:]
        if len(places) != len(tokens):
            raise ValueError(f"{len(places)} places for {len(tokens)} tokens")
        logps = [place[str(token)]["logprob"] for place, token in zip(places, tokens, strict=True)]
        best = [_best(place, k) for place in places]
        top = [
            [place[token]["logprob"] for token in ids]
            for place, ids in zip(places, best, strict=True)
        ]
        return Word(
            np.array(logps, np.float32),
            np.array(best, np.int32).reshape(len(tokens), k),
            np.array(top, np.float32).reshape(len(tokens), k),
        )
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise RolloutError(
            f"teacher.address: {where} gave no prompt_logprobs of {k} tokens a place"
            f" ({type(error).__name__}: {error!s:.100}). Is it a server of vLLM?"
        ) from None


def _best(place: Mapping[str, Mapping[str, Any]], k: int) -> list[str]:
    """The k likeliest; the token that stands there is among what is given, too."""
    ranked = sorted(place, key=lambda token: place[token]["rank"])[:k]
    if len(ranked) != k:
        raise ValueError(f"{len(ranked)} tokens")
    return ranked


def _with(answer: GradedAnswer, words: Any) -> GradedAnswer:
    """The answer with the words of its branches, which come next."""
    made = answer.trajectory
    branches = tuple(_branch(branch, next(words)) for branch in made.branches)
    return replace(answer, trajectory=replace(made, branches=branches))


def _branch(branch: Branch, word: Word) -> Branch:
    """With the teacher's word, which is of the model's tokens alone."""
    return replace(
        branch, word=word._replace(logp=np.where(branch.written, word.logp, 0.0).astype(np.float32))
    )


def _named(listed: Any, wanted: str | None, where: str) -> tuple[str, int | None]:
    """(name, longest prompt) of the model that is asked. Raises DataError, RemoteError."""
    served = models_in(listed, where)
    name = wanted or next(iter(served), "")
    if name not in served:
        raise DataError(
            f"teacher.model={name}: {where} serves {', '.join(served) or 'nothing'}. Give one of"
            " them"
        )
    return name, served[name]
