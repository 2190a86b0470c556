"""What an environment is."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from moetrain.data.messages import Message

Fault = Literal["", "timeout", "crash", "error"]
Tool = dict[str, Any]
"""What a chat template is told of a tool: {"type": "function", "function": {"name", ...}}."""


class Environment(Protocol):
    """What answers a model's turns.

    It keeps nothing from one call to the next: what there is to know stands in the record and in
    the messages so far, so that a run that was killed goes on, and any process can reply.

    Messages are in the form of `data/messages.py`. An assistant's has what was read in its tokens
    (`environments/calls.py`): `content`, `reasoning_content`, `tool_calls` and `malformed`, what is
    wrong with calls that could not be read. A reply is messages of the roles user, tool and system.
    One with `is_error: True` is counted as a failure of a tool; the model sees its content.

    A record is its columns, as rewards have them: `prompt` holds the messages before the model's
    first turn (at a reset, those of the record alone).
    """

    @property
    def tools(self) -> Sequence[Tool]:
        """Those that the chat template tells the model of; the same for every record."""
        ...

    def reset(self, record: Mapping[str, Any]) -> list[Message]:
        """What to say behind the record's own messages, before the model's first turn."""
        ...

    def reply(
        self, record: Mapping[str, Any], messages: Sequence[Message]
    ) -> Sequence[Message] | None:
        """What to say to the last of the messages, which is the model's. None: it is done."""
        ...


class Silent:
    """An environment that says nothing before the model's first turn."""

    def reset(self, record: Mapping[str, Any]) -> list[Message]:
        return []


class Unable(Exception):
    """The environment itself cannot, whatever was called: a fault, of which no model is told."""


@dataclass(frozen=True)
class Reply:
    """What an environment said to a turn, or what became of it."""

    messages: tuple[Message, ...] | None = None  # None: it is done, or there is a fault
    # timeout and crash are of the process; error is of the environment's own code. A tool that
    # raises is no fault: the model is told.
    fault: Fault = ""
    detail: str = ""  # of a fault, for people
    counts: Mapping[str, int] = field(default_factory=dict[str, int])  # tools/calls, tools/errors
    reward: float | None = None  # that an agent gave its session
