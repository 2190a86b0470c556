"""Guess the number: a game to try turns on."""

import re
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

from moetrain.data.messages import Message
from moetrain.environments.base import Tool

_NUMBER = re.compile(r"-?\d+")


class Game:
    """A number of [low, high] is to be guessed: the record's `number`, or one that its first
    message decides. Each turn's last number is the guess; the reply is "higher" or "lower", and the
    game ends when it is right.
    """

    tools: Sequence[Tool] = ()

    def __init__(self, low: int = 1, high: int = 100):
        if low > high:
            raise ValueError(f"low={low} is over high={high}")
        self.low, self.high = int(low), int(high)

    def reset(self, record: Mapping[str, Any]) -> list[Message]:
        asked = f"Guess my number. It is between {self.low} and {self.high}."
        return [{"role": "user", "content": asked}]

    def reply(
        self, record: Mapping[str, Any], messages: Sequence[Message]
    ) -> Sequence[Message] | None:
        numbers = _NUMBER.findall(messages[-1].get("content") or "")
        if not numbers:
            return [{"role": "user", "content": "say a number"}]
        guess, number = int(numbers[-1][:18]), self.number(record)
        if guess == number:
            return None
        return [{"role": "user", "content": "higher" if guess < number else "lower"}]

    def number(self, record: Mapping[str, Any]) -> int:
        """The record's number."""
        given = record.get("number")
        if isinstance(given, int):
            return given
        first = repr(list(record.get("prompt") or "")[:1])
        return self.low + zlib.crc32(first.encode()) % (self.high - self.low + 1)
