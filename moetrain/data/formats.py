"""From a record as people store it to a conversation. One small function a format, in one table."""

import json
from collections.abc import Callable, Iterable, Mapping
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


class MissingError(FormatError):
    """The record is of another kind: it lacks what this method learns from."""

    def __init__(self, reason: str, keys: Iterable[str]) -> None:
        super().__init__(reason)
        self.keys = tuple(keys)


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


def filled(record: Record, key: str) -> str:
    """A text that must not be empty."""
    text = _text(record[key], key)
    if not text.strip():
        raise FormatError(f"{key} is empty")
    return text


def _list(value: Any, where: str) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise FormatError(f"{where} must be a list with at least one message")
    return value


def read_message(value: Any, where: str) -> Message:
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


def read_messages(value: Any, where: str) -> list[Message]:
    """Check a list of messages of the OpenAI form."""
    return [read_message(item, f"{where}[{i}]") for i, item in enumerate(_list(value, where))]


def _messages(record: Record) -> list[Message]:
    return read_messages(record["messages"], "messages")


def read_turn(turn: Any, where: str) -> Message:
    """Check one turn of ShareGPT's form, or of OpenAI's under ShareGPT's key."""
    if not isinstance(turn, Mapping):
        raise FormatError(f"{where} must be an object with from and value")
    if "from" not in turn and "role" in turn:
        return read_message(turn, where)
    sender = turn.get("from")
    if not isinstance(sender, str) or sender not in SHAREGPT_ROLES:
        raise FormatError(f"{where}.from is {sender!r}; allowed: {', '.join(SHAREGPT_ROLES)}")
    return {"role": SHAREGPT_ROLES[sender], "content": _text(turn.get("value"), f"{where}.value")}


def _system(record: Record) -> list[Message]:
    """What a format with a `system` key begins with."""
    if not record.get("system"):
        return []
    return [{"role": "system", "content": _text(record["system"], "system")}]


def sharegpt(record: Record) -> list[Message]:
    """The turns of `conversations`."""
    turns = _list(record["conversations"], "conversations")
    read = [read_turn(turn, f"conversations[{i}]") for i, turn in enumerate(turns)]
    return _system(record) + read


def _prompt_completion(record: Record) -> list[Message]:
    """TRL's: two strings (a user turn and its answer) or two lists of messages."""
    prompt, completion = record["prompt"], record["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):
        before = read_messages(prompt, "prompt")
        after = read_messages(completion, "completion")
        return [message | {"weight": False} for message in before] + after
    return [
        {"role": "user", "content": filled(record, "prompt")},
        {"role": "assistant", "content": filled(record, "completion")},
    ]


def _question_answer(record: Record) -> list[Message]:
    return [
        {"role": "user", "content": filled(record, "question")},
        {"role": "assistant", "content": filled(record, "answer")},
    ]


def alpaca_prompt(record: Record) -> list[Message]:
    """All but the answer of an alpaca record."""
    messages = _system(record)
    for i, pair in enumerate(record.get("history") or []):  # LLaMA-Factory's earlier rounds
        if not isinstance(pair, list) or len(pair) != 2:
            raise FormatError(f"history[{i}] must be a pair [instruction, output]")
        messages.append({"role": "user", "content": _text(pair[0], f"history[{i}][0]")})
        messages.append({"role": "assistant", "content": _text(pair[1], f"history[{i}][1]")})
    question = filled(record, "instruction")
    if record.get("input"):
        question += "\n\n" + _text(record["input"], "input")
    return [*messages, {"role": "user", "content": question}]


def _alpaca(record: Record) -> list[Message]:
    return [*alpaca_prompt(record), {"role": "assistant", "content": filled(record, "output")}]


# The first whose keys are all there is taken.
FORMATS: tuple[Format, ...] = (
    Format("messages", ("messages",), _messages),
    Format("sharegpt", ("conversations",), sharegpt),
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


def is_spoken(message: Message) -> bool:
    """Whether an assistant turn has anything to learn."""
    return bool(
        message["content"].strip() or message.get("tool_calls") or message.get("reasoning_content")
    )


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
        if wanted and not is_spoken(message):
            raise FormatError(f"the assistant turn {i} is empty")
    return Conversation(messages, trained, template_kwargs_of(record))


def template_kwargs_of(record: Record) -> dict[str, Any]:
    """What a record gives its chat template: `chat_template_kwargs` and `tools`."""
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
