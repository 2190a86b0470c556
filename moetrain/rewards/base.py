"""What a reward is."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from moetrain.config.rewards import RewardConfig
from moetrain.data.thoughts import after_thought

Scores = list[float | None]
"""One for each completion; None where the reward does not apply."""

RewardFunction = Callable[..., Scores]
"""f(completions: list, **columns: list) -> Scores. Options of the recipe come as keyword arguments
beside the columns; how a user's own function is called stands in user_functions.py.
"""


@dataclass(frozen=True)
class Completion:
    """A completion to grade."""

    number: int
    text: str
    columns: Mapping[str, Any]  # of its record; `prompt` has the messages that it answers
    opened: str = ""  # the thought that the prompt has begun, such as "<think>\n"
    is_text: bool = False  # the record's prompt is text
    tokens: tuple[int, ...] | None = None  # where it was sampled
    # All that came after the prompt, where an environment replied; `text` is the last of it.
    messages: tuple[Mapping[str, Any], ...] = ()
    group_lengths: tuple[int, int] = (0, 0)  # of the prompt's answers, in characters: least, most
    step: int = 0  # of the run, and its last one
    last: int = 0

    @property
    def said(self) -> str:
        """Without its thought; nothing where that was cut."""
        return after_thought(self.text, self.opened) or ""


@dataclass(frozen=True)
class Grade:
    """What rewards say of one completion."""

    values: Mapping[str, float | None] = field(default_factory=dict[str, float | None])  # by label
    fault: str | None = None  # "timeout", "crash" or "error": then the completion is left out
    notes: tuple[str, ...] = ()  # what the ledger counts: "code_timeout", ...
    detail: str = ""  # of a fault, for people
    extra: Mapping[str, Any] = field(default_factory=dict[str, Any])  # beside it in the rollouts
    metrics: Mapping[str, float] = field(default_factory=dict[str, float])  # of a whole batch


@dataclass(frozen=True)
class Shape:
    """The processes that serve a reward."""

    num_workers: int
    batch: int  # completions that a worker is handed at a time
    seconds: float  # without any answer after which a worker is ended
    start_seconds: float = 60.0  # to be ready
    is_grouped: bool = False  # no batch has answers to two prompts


class Service(Protocol):
    """A reward, or several, in processes of their own. Made there, by its configs and the shape."""

    def grade(self, completions: Sequence[Completion]) -> Iterator[tuple[int, Grade]]:
        """(number, answer) of each completion, in any order, each as soon as there is one."""
        ...


@dataclass(frozen=True)
class RewardKind:
    """How rewards of one kind are served."""

    make: Callable[[Sequence[RewardConfig]], Service]  # runs in the worker; MoetrainError
    shape: Callable[[Mapping[str, Any], Shape], Shape]  # (options, the recipe's) -> its own


@dataclass(frozen=True)
class Verdict:
    """The verdict on one completion."""

    reward: float | None  # the weighted sum of the parts; None: leave the completion out
    parts: Mapping[str, float | None]  # by name
    fault: str | None = None  # "timeout", "crash" or "error": then the reward is None
    extra: Mapping[str, Any] = field(default_factory=dict[str, Any])  # what functions have logged


def text_of(message: Any) -> str:
    """The text of a prompt or completion, given as text or as messages."""
    if isinstance(message, str):
        return message
    return "\n".join(str(part.get("content") or "") for part in message)


def is_absent(value: Any) -> bool:
    """Whether a column has nothing to grade by."""
    return value is None or value == [] or (isinstance(value, str) and not value.strip())
