"""From a record as people store it to a conversation. One small function a format, in one table."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

ROLES = ("system", "developer", "user", "assistant", "tool")
SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "tool": "tool",
    "observation": "tool",
}
# What of a message beyond role and content a chat template may read.
TEMPLATE_FIELDS = ("name", "tool_calls", "tool_call_id", "reasoning_content", "thinking")

Message = dict[str, Any]
Record = Mapping[str, Any]


class FormatError(ValueError):
    """The record is not usable; the message is the reason that goes into rejected.jsonl."""


@dataclass(frozen=True)
class Conversation:
    """Messages as chat templates take them, and which assistant turns are learned."""

    messages: list[Message]
    trained: list[
        bool
    ]  # one per message; False for other roles and for turns the record switches off
    template_kwargs: dict[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True)
class Format:
    """A record is in this format when it has all of `keys`."""

    name: str
    keys: tuple[str, ...]
    read: Callable[[Record], list[Message]]


def _text(value: Any, where: str) -> str:
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


def _filled(record: Record, key: str) -> str:
    text = _text(record[key], key)
    if not text.strip():
        raise FormatError(f"{key} is empty")
    return text


def _list(value: Any, where: str) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise FormatError(f"{where} must be a list with at least one message")
    return value


def _message(value: Any, where: str) -> Message:
    """Check one message of the OpenAI form and keep what a template can use."""
    if not isinstance(value, Mapping):
        raise FormatError(f"{where} must be an object with role and content")
    role = value.get("role")
    if role not in ROLES:
        raise FormatError(f"{where}.role is {role!r}; allowed: {', '.join(ROLES)}")
    content = value.get("content")
    bare = content is None and role == "assistant" and value.get("tool_calls")
    message: Message = {"role": role, "content": "" if bare else _text(content, f"{where}.content")}
    # A parquet or Arrow table fills the fields that a message lacks with null.
    message |= {name: value[name] for name in TEMPLATE_FIELDS if value.get(name) is not None}
    for switch in ("weight", "loss"):  # OpenAI's and ms-swift's names for "train on this turn"
        if value.get(switch) is not None:
            message["weight"] = bool(value[switch])
    return message


def _messages(record: Record) -> list[Message]:
    messages = _list(record["messages"], "messages")
    return [_message(value, f"messages[{i}]") for i, value in enumerate(messages)]


def _sharegpt(record: Record) -> list[Message]:
    turns = _list(record["conversations"], "conversations")
    messages: list[Message] = []
    if record.get("system"):
        messages.append({"role": "system", "content": _text(record["system"], "system")})
    for i, turn in enumerate(turns):
        where = f"conversations[{i}]"
        if not isinstance(turn, Mapping):
            raise FormatError(f"{where} must be an object with from and value")
        if "from" not in turn and "role" in turn:  # the OpenAI form under ShareGPT's key
            messages.append(_message(turn, where))
            continue
        sender = turn.get("from")
        if sender not in SHAREGPT_ROLES:
            raise FormatError(f"{where}.from is {sender!r}; allowed: {', '.join(SHAREGPT_ROLES)}")
        messages.append(
            {"role": SHAREGPT_ROLES[sender], "content": _text(turn.get("value"), f"{where}.value")}
        )
    return messages


def _prompt_completion(record: Record) -> list[Message]:
    """TRL's: two strings (a user turn and its answer) or two lists of messages."""
    prompt, completion = record["prompt"], record["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):
        before = [
            _message(value, f"prompt[{i}]") for i, value in enumerate(_list(prompt, "prompt"))
        ]
        after = [
            _message(value, f"completion[{i}]")
            for i, value in enumerate(_list(completion, "completion"))
        ]
        return [message | {"weight": False} for message in before] + after
    return [
        {"role": "user", "content": _filled(record, "prompt")},
        {"role": "assistant", "content": _filled(record, "completion")},
    ]


def _question_answer(record: Record) -> list[Message]:
    return [
        {"role": "user", "content": _filled(record, "question")},
        {"role": "assistant", "content": _filled(record, "answer")},
    ]


def _alpaca(record: Record) -> list[Message]:
    messages: list[Message] = []
    if record.get("system"):
        messages.append({"role": "system", "content": _text(record["system"], "system")})
    for i, pair in enumerate(record.get("history") or []):  # LLaMA-Factory's earlier rounds
        if not isinstance(pair, list) or len(pair) != 2:
            raise FormatError(f"history[{i}] must be a pair [instruction, output]")
        messages.append({"role": "user", "content": _text(pair[0], f"history[{i}][0]")})
        messages.append({"role": "assistant", "content": _text(pair[1], f"history[{i}][1]")})
    question = _filled(record, "instruction")
    if record.get("input"):
        question += "\n\n" + _text(record["input"], "input")
    messages.append({"role": "user", "content": question})
    messages.append({"role": "assistant", "content": _filled(record, "output")})
    return messages


# The first whose keys are all there is taken.
FORMATS: tuple[Format, ...] = (
    Format("messages", ("messages",), _messages),
    Format("sharegpt", ("conversations",), _sharegpt),
    Format("prompt-completion", ("prompt", "completion"), _prompt_completion),
    Format("alpaca", ("instruction", "output"), _alpaca),
    Format("question-answer", ("question", "answer"), _question_answer),
)


def detect(record: Record) -> Format:
    """The format of a record; FormatError lists the known ones."""
    for form in FORMATS:
        if all(record.get(key) is not None for key in form.keys):
            return form
    known = "; ".join(f"{form.name} ({', '.join(form.keys)})" for form in FORMATS)
    raise FormatError(f"no known format with the keys {sorted(map(str, record))}; known: {known}")


def to_conversation(record: Record) -> Conversation:
    """Read a record in any known format.

    FormatError gives the reason when it cannot be trained on.
    """
    messages = detect(record).read(record)
    trained = [m["role"] == "assistant" and m.pop("weight", True) for m in messages]
    messages = [{k: v for k, v in m.items() if k != "weight"} for m in messages]
    if not any(m["role"] == "assistant" for m in messages):
        raise FormatError("there is no assistant turn to learn from")
    if not any(trained):
        raise FormatError("every assistant turn is switched off by its weight")
    for i, (message, wanted) in enumerate(zip(messages, trained, strict=True)):
        spoken = (
            message["content"].strip()
            or message.get("tool_calls")
            or message.get("reasoning_content")
        )
        if wanted and not spoken:
            raise FormatError(f"the assistant turn {i} is empty")
    return Conversation(messages, trained, _template_kwargs(record))


def _template_kwargs(record: Record) -> dict[str, Any]:
    kwargs = record.get("chat_template_kwargs") or {}
    if not isinstance(kwargs, Mapping):
        raise FormatError("chat_template_kwargs must be an object")
    tools = record.get("tools")
    if isinstance(tools, str):  # ms-swift and LLaMA-Factory store the list as JSON text
        try:
            tools = json.loads(tools)
        except json.JSONDecodeError as error:
            raise FormatError("tools is neither a list nor JSON") from error
    if tools and not (isinstance(tools, list) and all(isinstance(tool, Mapping) for tool in tools)):
        raise FormatError("tools must be a list of objects")
    return {**kwargs, **({"tools": tools} if tools else {})}
