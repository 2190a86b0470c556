"""Messages as people store them, to one form: a role, a content, and what else a turn says.

The one form: `role`, `content` (text; None for a turn that only calls tools), `reasoning_content`,
`tool_calls` in OpenAI's nested form with `arguments` as the record has them (a mapping or a text),
`name`, `tool_call_id`, and `weight` (bool) where the record says whether the turn is learned.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from moetrain.data.parsing import parse_json

ROLES = ("system", "developer", "user", "assistant", "tool")
SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function_call": "tool_call",
}
# A call that is a turn of its own: ms-swift's name, LLaMA-Factory's.
CALL_ROLES = ("tool_call", "function_call")
ROLE_ALIASES = {"tool_response": "tool", "observation": "tool", "function": "tool"}
# Names that data has for what the model thought before it answered.
REASONING_FIELDS = ("reasoning_content", "reasoning", "thinking")
# Names for "learn this turn": OpenAI's, ms-swift's two, axolotl's.
WEIGHT_FIELDS = ("weight", "loss", "loss_scale", "train")
MAX_MESSAGES = 1000  # each turn is rendered with all before it
COPIED_FIELDS = ("name", "tool_call_id")
READ_FIELDS = frozenset(
    {
        *("role", "content", "from", "value", "tool_calls", "function_call"),
        *(*REASONING_FIELDS, *WEIGHT_FIELDS, *COPIED_FIELDS),
    }
)
# A thought that stands in the content before the answer.
INLINE = re.compile(r"\s*<think>(?P<thought>.*?)</think>(?P<answer>.*)", re.DOTALL)

Message = dict[str, Any]


class FormatError(ValueError):
    """The record is not usable; the message is the reason that goes into rejected.jsonl."""


class MissingError(FormatError):
    """The record is of another kind: it lacks what this method learns from."""

    def __init__(self, reason: str, keys: Iterable[str]) -> None:
        super().__init__(reason)
        self.keys = tuple(keys)


def shown(value: Any) -> str:
    """A value for an error message: short, in ASCII, on one line."""
    try:
        text = repr(value)
    except ValueError:  # an integer of thousands of digits, endless nesting
        return type(value).__name__
    text = text.encode("ascii", "backslashreplace").decode()
    return text if len(text) <= 60 else f"{text[:40]}...{text[-10:]}"


def text_of(value: Any, where: str) -> str:
    """A text content: a string, or OpenAI's list of parts when all of them are text."""
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        parts = [
            p["text"] for p in value if isinstance(p, Mapping) and isinstance(p.get("text"), str)
        ]
        if parts and len(parts) == len(value):
            return "".join(parts)
    raise FormatError(f"{where} must be text, not {type(value).__name__}")


def parsed(value: Any, where: str) -> Any:
    """What a text of JSON says; another value as it is."""
    if not isinstance(value, str):
        return value
    try:
        return parse_json(value)
    except ValueError as error:
        raise FormatError(f"{where} is text and not JSON") from error


def list_of(value: Any, where: str) -> list[Any]:
    """A list of messages; `datasets` stores messages with different keys as texts of JSON."""
    value = parsed(value, where) if isinstance(value, str) and value.lstrip()[:1] == "[" else value
    if not isinstance(value, list) or not value:
        raise FormatError(f"{where} must be a list with at least one message")
    refuse_many(value, where)
    return [_object(item, f"{where}[{i}]") for i, item in enumerate(value)]


def refuse_many(messages: list[Any], where: str) -> None:
    """FormatError when there are more messages than are read."""
    if len(messages) > MAX_MESSAGES:
        raise FormatError(f"{where} has {len(messages):,} messages; at most {MAX_MESSAGES:,}")


def _object(value: Any, where: str) -> Any:
    """What a text of a JSON object says; another value as it is."""
    return parsed(value, where) if isinstance(value, str) and value[:1] == "{" else value


def listed(value: Any) -> Any:
    """The list that a text of JSON objects says, as `datasets` writes messages whose keys differ;
    another value as it is.
    """
    if not isinstance(value, str) or not value.lstrip().startswith("[{"):
        return value
    try:
        parsed = parse_json(value)
    except ValueError:
        return value
    known = all(isinstance(turn, dict) and {"role", "from"} & turn.keys() for turn in parsed)
    return parsed if known else value


def read_message(value: Any, where: str) -> Message:
    """One message of OpenAI's form, checked, in the one form of this module."""
    if not isinstance(value, Mapping):
        raise FormatError(f"{where} must be an object with role and content")
    role = value.get("role")
    role = ROLE_ALIASES.get(role, role) if isinstance(role, str) else role
    if not isinstance(role, str) or role not in (*ROLES, *CALL_ROLES):
        raise FormatError(f"{where}.role is {shown(role)}; allowed: {', '.join(ROLES)}")
    if role in CALL_ROLES:
        calls = [_call(value.get("content"), f"{where}.content")]
        return {"role": "assistant", "content": None, "tool_calls": calls} | _weight(value, where)
    calls = _calls(value.get("tool_calls"), f"{where}.tool_calls")
    if not calls and value.get("function_call") is not None:  # OpenAI's before tool_calls
        calls = [_call(value["function_call"], f"{where}.function_call")]
    if calls and role != "assistant":
        raise FormatError(f"{where} is a {role} turn with tool_calls")
    reasoning = _reasoning(value, where) if role == "assistant" else None
    content = value.get("content")
    if content is None and reasoning is not None and not calls:
        content = ""
    if content is not None or not calls:
        content = text_of(content, f"{where}.content")
    message: Message = {"role": role, "content": content}
    if reasoning is not None:
        message["reasoning_content"] = reasoning
    if calls:
        message["tool_calls"] = calls
    message |= {name: value[name] for name in COPIED_FIELDS if value.get(name) is not None}
    return message | _weight(value, where)


def read_turn(turn: Any, where: str) -> Message:
    """One turn of ShareGPT's form, or of OpenAI's under ShareGPT's key."""
    turn = _object(turn, where)
    if not isinstance(turn, Mapping):
        raise FormatError(f"{where} must be an object with from and value")
    if "from" not in turn and "role" in turn:
        return read_message(turn, where)
    sender = turn.get("from")
    if not isinstance(sender, str) or sender not in SHAREGPT_ROLES:
        raise FormatError(f"{where}.from is {shown(sender)}; allowed: {', '.join(SHAREGPT_ROLES)}")
    if "value" not in turn:
        raise FormatError(f"{where}.value is missing")
    rest = {k: v for k, v in turn.items() if k not in ("from", "value")}
    named = {"role": SHAREGPT_ROLES[sender], "content": turn["value"]}
    return read_message(rest | named, where)


def read_messages(value: Any, where: str) -> list[Message]:
    """A list of messages of OpenAI's form; calls that are turns join the one before."""
    read = [read_message(item, f"{where}[{i}]") for i, item in enumerate(list_of(value, where))]
    return joined_calls(read)


def joined_calls(messages: list[Message]) -> list[Message]:
    """The messages with calls that follow an assistant's turn as calls of that turn."""
    merged: list[Message] = []
    for message in messages:
        before = merged[-1] if merged else None
        bare = message["content"] is None and message.get("tool_calls")
        if bare and before is not None and before["role"] == "assistant":
            merged[-1] = before | {
                "tool_calls": [*before.get("tool_calls", []), *message["tool_calls"]]
            }
        else:
            merged.append(message)
    return merged


def _weight(value: Mapping[str, Any], where: str) -> Message:
    """{"weight": whether the turn is learned}, where the record says so."""
    given = [(name, value[name]) for name in WEIGHT_FIELDS if value.get(name) is not None]
    for name, weight in given:
        if not isinstance(weight, bool | int | float) or weight not in (0, 1):
            raise FormatError(
                f"{where}.{name} is {shown(weight)}: a turn is learned (1, true) or not (0, false);"
                " nothing between"
            )
    if len({bool(weight) for _, weight in given}) > 1:
        names = " and ".join(name for name, _ in given)
        raise FormatError(f"{where}: {names} contradict each other")
    return {"weight": bool(given[0][1])} if given else {}


def _reasoning(value: Mapping[str, Any], where: str) -> str | None:
    """What the turn thought, under whichever name."""
    given = {
        name: text_of(value[name], f"{where}.{name}")
        for name in REASONING_FIELDS
        if value.get(name) is not None
    }
    texts = {text for text in given.values() if text.strip()}
    if len(texts) > 1:
        raise FormatError(f"{where}: {' and '.join(given)} say different things")
    return next(iter(texts), None)


def _calls(value: Any, where: str) -> list[Message]:
    if value is None:
        return []
    value = parsed(value, where)
    if not isinstance(value, list):
        raise FormatError(f"{where} must be a list, not {type(value).__name__}")
    return [_call(call, f"{where}[{i}]") for i, call in enumerate(value)]


def _call(value: Any, where: str) -> Message:
    """A tool call in OpenAI's nested form; a flat {"name", "arguments"} is nested."""
    value = parsed(value, where)
    function = value.get("function", value) if isinstance(value, Mapping) else None
    function = parsed(function, f"{where}.function")
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise FormatError(f"{where} must be an object with a function's name and arguments")
    arguments = function.get("arguments")
    arguments = {} if arguments is None or arguments == "" else arguments  # of a call without any
    if not isinstance(parsed(arguments, f"{where}.arguments"), Mapping):
        raise FormatError(f"{where}.arguments must be an object, or an object as JSON text")
    outer = {k: v for k, v in value.items() if k in ("id", "type") and v is not None}
    call = {"name": function["name"], "arguments": arguments}
    return {"type": "function"} | outer | {"function": call}


def split_thought(content: str) -> tuple[str | None, str]:
    """(the thought in front of an answer, the answer); (None, content) where there is none."""
    match = INLINE.fullmatch(content)
    if match is None:
        return None, content
    return match["thought"].strip("\n"), match["answer"].lstrip("\n")


def arguments_of(call: Message) -> Any:
    """The arguments of a call as values, however they are stored."""
    return parsed(call["function"]["arguments"], "arguments")


def leaves(value: Any) -> list[Any]:
    """Every text, number and truth value in nested lists and mappings, keys too."""
    if isinstance(value, Mapping):
        return [leaf for key, item in value.items() for leaf in (str(key), *leaves(item))]
    if isinstance(value, list):
        return [leaf for item in value for leaf in leaves(item)]
    return [] if value is None else [value]
