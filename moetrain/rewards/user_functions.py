"""Rewards that are functions of a user's own file, called as TRL 1.16 calls them: by keyword, with
lists over a batch.
"""

import asyncio
import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import repeat
from typing import Any, Self

from moetrain.config.rewards import RewardConfig
from moetrain.rewards.base import Completion, Grade, RewardKind, Shape, text_of
from moetrain.rewards.find import find_reward

LARGEST = 64  # answers to one prompt in a batch, where the recipe names no batch_size
# Columns that are told otherwise; "prompt" alone is given to who asks for it by name.
RESERVED = ("prompt", "prompts", "completion", "completions", "completion_ids")


class Each:
    """Something that is the same for each completion: functions that zip all that they are given
    into rows (open-r1's do) find it in each.
    """

    def __iter__(self) -> Iterator[Self]:
        return repeat(self)


@dataclass(frozen=True)
class TrainerState(Each):
    """What there is here of transformers' TrainerState."""

    global_step: int
    max_steps: int


class Logger(Each):
    """TRL's log_extra or log_metric."""

    def __init__(self, log: Callable[..., None]):
        self.log = log

    def __call__(self, *args: Any, **named: Any) -> None:
        self.log(*args, **named)


@dataclass
class Logged:
    """What a function logs beside its rewards."""

    num: int
    metrics: dict[str, float] = field(default_factory=dict[str, float])
    extra: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])

    def __post_init__(self) -> None:
        self.extra = [{} for _ in range(self.num)]

    def metric(self, name: str, value: float) -> None:
        self.metrics[name] = float(value)

    def column(self, column: str, values: Sequence[Any]) -> None:
        for own, value in zip(self.extra, values, strict=True):
            own[column] = value if isinstance(value, str | float | None) else _plain(value)


def _plain(value: Any) -> int | str:
    """What can be written down: Python writes no number of thousands of digits."""
    try:
        text = str(value)
    except ValueError as error:
        return str(error)
    return value if isinstance(value, int) else text


class Own:
    """A function of a file, and the batches that it is called with."""

    def __init__(self, configs: Sequence[RewardConfig]):
        (config,) = configs
        self.label, self.options = config.label, config.options
        self.function: Callable[..., Any] = find_reward(config.name)
        self.is_async = inspect.iscoroutinefunction(self.function) or inspect.iscoroutinefunction(
            getattr(self.function, "__call__", None)  # noqa: B004  # an object's may be async
        )
        self.takes = _names(self.function)

    def grade(self, completions: Sequence[Completion]) -> Iterator[tuple[int, Grade]]:
        """Where a batch raises, its halves are tried, until those to blame are alone."""
        try:
            scores, logged = self._scores(completions)
        except Exception as error:  # a user's own code, which may fail in any way
            if len(completions) > 1:
                middle = len(completions) // 2
                yield from self.grade(completions[:middle])
                yield from self.grade(completions[middle:])
                return
            yield completions[0].number, self._fault(f"{type(error).__name__}: {error}")
            return
        for place, (completion, score) in enumerate(zip(completions, scores, strict=True)):
            if score is not None and not math.isfinite(score):
                yield completion.number, self._fault(f"ValueError: the reward is {score}")
                continue
            yield (
                completion.number,
                Grade(
                    {self.label: score},
                    extra=logged.extra[place],
                    metrics=logged.metrics if place == 0 else {},
                ),
            )

    def _fault(self, detail: str) -> Grade:
        return Grade({self.label: None}, "error", detail=f"{self.label}: {detail}")

    def _scores(self, completions: Sequence[Completion]) -> tuple[list[float | None], Logged]:
        logged = Logged(len(completions))
        returned = self.function(**self._arguments(completions, logged))
        if self.is_async:
            returned = asyncio.run(returned)
        if isinstance(returned, str | Mapping) or not hasattr(returned, "__iter__"):
            raise TypeError(f"it returned {returned!r:.80}, not a list with a reward for each")
        scores = [None if score is None else float(score) for score in returned]
        if len(scores) != len(completions):
            raise ValueError(
                f"it returned {len(scores)} rewards for {len(completions)} completions"
            )
        return scores, logged

    def _arguments(self, completions: Sequence[Completion], logged: Logged) -> dict[str, Any]:
        """TRL's, and those of the recipe; a function without **kwargs gets what it names."""
        names = dict.fromkeys(name for completion in completions for name in completion.columns)
        given: dict[str, Any] = {
            name: [completion.columns.get(name) for completion in completions]
            for name in names
            if name not in RESERVED
        }
        given["prompts"] = [prompt_of(completion) for completion in completions]
        given["completions"] = [completion_of(completion) for completion in completions]
        if all(completion.tokens is not None for completion in completions):
            given["completion_ids"] = [list(completion.tokens or ()) for completion in completions]
        given["trainer_state"] = TrainerState(completions[0].step, completions[0].last)
        given["log_extra"], given["log_metric"] = Logger(logged.column), Logger(logged.metric)
        given |= self.options
        if self.takes is None:
            return given
        if "prompt" in self.takes:
            given["prompt"] = given["prompts"]
        return {name: value for name, value in given.items() if name in self.takes}


def prompt_of(completion: Completion) -> Any:
    """Messages, or text where the record has text: without the system's, which is beside it."""
    prompt = completion.columns.get("prompt", "")
    if not completion.is_text or isinstance(prompt, str):
        return prompt
    return text_of([message for message in prompt if message.get("role") != "system"])


def completion_of(completion: Completion) -> Any:
    """An assistant's message in a list, where the prompt is messages, and with those before it
    where an environment replied; else text.
    """
    if completion.messages:
        return [dict(message) for message in completion.messages]
    if completion.is_text or isinstance(completion.columns.get("prompt", ""), str):
        return completion.text
    return [{"role": "assistant", "content": completion.text}]


def _names(function: Callable[..., Any]) -> frozenset[str] | None:
    """Those of its arguments; None where it takes any."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # builtins may have none
        return None
    if any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters):
        return None
    return frozenset(one.name for one in parameters)


def user_function_kind(batch_size: int | None) -> RewardKind:
    """Of a function that sees so many completions at a time; None: the answers to one prompt."""
    return RewardKind(Own, partial(_shape, batch_size))


def _shape(batch_size: int | None, options: Mapping[str, Any], recipe: Shape) -> Shape:
    return replace(recipe, batch=batch_size or LARGEST, is_grouped=batch_size is None)
