"""Functions that a model calls: what they are called with, and what became of it."""

import asyncio
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from typing import Any

from pydantic import ValidationError, validate_call

from moetrain.data.messages import Message, shown
from moetrain.environments.base import Silent, Tool, Unable
from moetrain.errors import nearest

LONGEST = 2000  # characters of an error


class Toolbox(Silent):
    """An environment of functions. A turn without a call ends the trajectory; to one with calls
    each function's value is a tool's message. What a function raises, and what is wrong with a
    call, is told to the model.

    Args:
        functions: tool -> function. It is called with the arguments that the model gave, as its
            annotations have them ("3" for an int is 3).
        describe: makes what the chat template says of them, for who asks for it.
    """

    def __init__(
        self,
        functions: Mapping[str, Callable[..., Any]],
        describe: Callable[[], Iterable[Tool]],
    ):
        self._describe = cache(lambda: tuple(describe()))
        self._functions = {name: _checked(function) for name, function in functions.items()}

    @property
    def tools(self) -> Sequence[Tool]:
        return self._describe()

    def reply(
        self, record: Mapping[str, Any], messages: Sequence[Message]
    ) -> Sequence[Message] | None:
        turn = messages[-1]
        calls, malformed = turn.get("tool_calls") or (), turn.get("malformed") or ()
        if not calls and not malformed:
            return None
        return [*map(self._called, calls), *(failure(f"Error: {wrong}") for wrong in malformed)]

    def _called(self, call: Message) -> Message:
        name, arguments = call["function"]["name"], call["function"]["arguments"]
        about = {"name": name, "tool_call_id": call.get("id")}
        function = self._functions.get(name)
        if function is None:
            known = ", ".join(self._functions)
            message = f"Error: there is no tool {shown(name)}; there are {known}."
            return failure(message + nearest(name, self._functions)) | about
        try:
            value = function(**arguments)
            if inspect.iscoroutine(value):
                value = asyncio.run(value)
        except ValidationError as error:
            wrong = "; ".join(
                f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors()
            )
            return failure(f"Error: the arguments of {name}: {wrong}") | about
        except Unable:
            raise
        except Exception as error:  # a user's own code, which may fail in any way
            return failure(f"Error: {type(error).__name__}: {error}") | about
        return {"role": "tool", "content": value} | about


def failure(text: str) -> Message:
    """A tool's message that says what went wrong, and is counted."""
    return {"role": "tool", "content": text[:LONGEST], "is_error": True}


def _checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with its arguments checked and converted, where its annotations say how."""
    try:
        return validate_call(config={"arbitrary_types_allowed": True})(function)
    except Exception:  # annotations of no known kind, builtins without any
        return function
