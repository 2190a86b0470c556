"""From a record as people store it to a conversation. One small function a format, in one table."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from moetrain.config.data import TEMPLATE_CALL
from moetrain.data.messages import (
    READ_FIELDS,
    FormatError,
    Message,
    MissingError,
    joined_calls,
    list_of,
    parsed,
    read_message,
    read_messages,
    read_turn,
    refuse_many,
    shown,
    text_of,
)
from moetrain.data.parsing import parse_json

__all__ = ["FormatError", "Message", "MissingError", "read_message", "read_messages", "read_turn"]

SYSTEM_KEYS = ("system", "system_prompt")
# `templated: true` says that texts are rendered already: `prompt` and what follows it, as they are.
TEMPLATED = "templated"
TEMPLATE_KEYS = ("tools", "chat_template_kwargs")
SWITCHES = ("enable_thinking",)  # of templates, which read them in chat_template_kwargs
MASKS = ("mask", "loss_mask")  # numbers that other trainers have, each for another thing
Record = Mapping[str, Any]


@dataclass(frozen=True)
class Conversation:
    """Messages as chat templates take them, and which assistant turns are learned.

    `rendered` (context, learned text) stands in place of messages that are templated already.
    """

    messages: list[Message]
    trained: list[
        bool
    ]  # one per message; False for other roles and for turns the record switches off
    template_kwargs: dict[str, Any] = field(default_factory=dict[str, Any])
    rendered: tuple[str, str] | None = None


@dataclass(frozen=True)
class Format:
    """A record is in this format when it has all of `keys`; it may have `others`, too."""

    name: str
    keys: tuple[str, ...]
    read: Callable[[Record], list[Message]]
    others: tuple[str, ...] = ()


def filled(record: Record, key: str) -> str:
    """A text that must not be empty."""
    text = text_of(record[key], key)
    if not text.strip():
        raise FormatError(f"{key} is empty")
    return text


def _messages(record: Record) -> list[Message]:
    return read_messages(record["messages"], "messages")


def sharegpt(record: Record) -> list[Message]:
    """The turns of `conversations`."""
    turns = list_of(record["conversations"], "conversations")
    return joined_calls([read_turn(turn, f"conversations[{i}]") for i, turn in enumerate(turns)])


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


def _history(record: Record) -> list[Message]:
    """Earlier rounds, as LLaMA-Factory and ms-swift have them."""
    messages: list[Message] = []
    history = record.get("history")
    if history is not None and not isinstance(history, list):
        raise FormatError("history must be a list of pairs [question, answer]")
    refuse_many(history or [], "history")
    for i, pair in enumerate(history or []):
        if not isinstance(pair, list) or len(pair) != 2:
            raise FormatError(f"history[{i}] must be a pair [question, answer]")
        messages.append({"role": "user", "content": text_of(pair[0], f"history[{i}][0]")})
        messages.append({"role": "assistant", "content": text_of(pair[1], f"history[{i}][1]")})
    return messages


def alpaca_prompt(record: Record) -> list[Message]:
    """All but the answer of an alpaca record."""
    question = filled(record, "instruction")
    if record.get("input"):
        question += "\n\n" + text_of(record["input"], "input")
    return [*_history(record), {"role": "user", "content": question}]


def _alpaca(record: Record) -> list[Message]:
    return [*alpaca_prompt(record), {"role": "assistant", "content": filled(record, "output")}]


def query_prompt(record: Record) -> list[Message]:
    """All but the answer of a record with a query, as ms-swift's first form of records is."""
    return [*_history(record), {"role": "user", "content": filled(record, "query")}]


def query_response(record: Record) -> list[Message]:
    """The messages of such a record."""
    answer = filled(record, "response")
    return [*query_prompt(record), {"role": "assistant", "content": answer}]


# The first whose keys are all there is taken.
FORMATS: tuple[Format, ...] = (
    Format("messages", ("messages",), _messages),
    Format("sharegpt", ("conversations",), sharegpt),
    Format("prompt-completion", ("prompt", "completion"), _prompt_completion),
    Format("alpaca", ("instruction", "output"), _alpaca, ("input", "history")),
    Format("query-response", ("query", "response"), query_response, ("history",)),
    Format("question-answer", ("question", "answer"), _question_answer),
)


def detect(record: Record) -> Format:
    """The format of a record; FormatError lists the known ones."""
    for form in FORMATS:
        if all(record.get(key) is not None for key in form.keys):
            return form
    known = "; ".join(f"{form.name} ({', '.join(form.keys)})" for form in FORMATS)
    keys = sorted(map(str, record))
    raise FormatError(f"no known format with the keys {keys}; known: {known}")


def columns(record: Record) -> tuple[str, ...]:
    """The columns that are read of a record of instruction data."""
    if record.get(TEMPLATED):
        return ("prompt", "completion")
    form = detect(record)
    return form.keys + form.others


def with_system(messages: list[Message], record: Record) -> list[Message]:
    """The messages after what a column beside them says as the system. FormatError when that makes
    two of it, or when there are too many messages.
    """
    given = {key: record[key] for key in SYSTEM_KEYS if record.get(key) is not None}
    texts = {text for key, value in given.items() if (text := text_of(value, key)).strip()}
    first = messages[0]["content"] if messages and messages[0]["role"] == "system" else None
    if texts and len(texts | ({first} if first is not None else set())) > 1:
        both = " and ".join([*given, *(["the first message"] if first is not None else [])])
        raise FormatError(f"{both} give different system messages: keep one")
    if texts and first is None:
        messages = [{"role": "system", "content": texts.pop()}, *messages]
    refuse_many(messages, "the record")
    return messages


def is_spoken(message: Message) -> bool:
    """Whether an assistant turn has anything to learn."""
    parts = (message.get("content"), message.get("reasoning_content"))
    return bool(message.get("tool_calls")) or any(part and part.strip() for part in parts)


def templated(record: Record, *parts: str) -> tuple[str, ...] | None:
    """The texts under `parts` where the record says that they are rendered already."""
    flag = record.get(TEMPLATED)
    if flag in (None, False):
        return None
    if flag is not True:
        raise FormatError(f"{TEMPLATED} must be true or false, not {shown(flag)}")
    for part in parts:
        if not isinstance(record.get(part), str):
            raise FormatError(f"{TEMPLATED} needs {' and '.join(parts)} as texts")
    return tuple(filled(record, part) for part in parts)


def to_conversation(record: Record) -> Conversation:
    """Read a record in any known format.

    FormatError gives the reason when it cannot be trained on.
    """
    if (texts := templated(record, "prompt", "completion")) is not None:
        return Conversation([], [], rendered=(texts[0], texts[1]))
    messages = with_system(detect(record).read(record), record)
    trained = [m["role"] == "assistant" and m.get("weight", True) for m in messages]
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
    kwargs = record.get("chat_template_kwargs")
    kwargs = {} if kwargs is None else parsed(kwargs, "chat_template_kwargs")
    if not isinstance(kwargs, Mapping):
        raise FormatError("chat_template_kwargs must be an object")
    taken = sorted(set(map(str, kwargs)) & set(TEMPLATE_CALL))
    if taken:
        raise FormatError(f"chat_template_kwargs must not name {', '.join(taken)}")
    tools = record.get("tools")
    if isinstance(tools, str):  # ms-swift and LLaMA-Factory store the list as JSON text
        try:
            tools = parse_json(tools) if tools.strip() else None
        except ValueError as error:
            raise FormatError("tools is neither a list nor JSON") from error
    if isinstance(tools, list):
        tools = [_tool(tool, f"tools[{i}]") for i, tool in enumerate(tools)]
    if tools and not (isinstance(tools, list) and all(isinstance(tool, Mapping) for tool in tools)):
        raise FormatError("tools must be a list of objects")
    return {**kwargs, **({"tools": tools} if tools else {})}


def name_of(tool: Any) -> Any:
    """Of a tool on offer, in OpenAI's form or bare; a template may have been given anything."""
    function = tool.get("function", tool) if isinstance(tool, Mapping) else None
    return function.get("name") if isinstance(function, Mapping) else None


def _tool(value: Any, where: str) -> Any:
    """A tool with its function and that one's parameters as objects: `datasets` writes those of
    uneven keys as texts of JSON.
    """
    is_text = isinstance(value, str) and value.lstrip().startswith("{")
    tool = parsed(value, where) if is_text else value
    for name in ("function", "parameters"):
        if isinstance(tool, Mapping) and isinstance(tool.get(name), str | Mapping):
            tool = {**tool, name: _tool(tool[name], f"{where}.{name}")}
    return tool


def unread(record: Record, read: tuple[str, ...]) -> tuple[str, ...]:
    """A note for each column that says something and is not read."""
    known = {*read, *SYSTEM_KEYS, *TEMPLATE_KEYS, TEMPLATED}
    if record.get(TEMPLATED):  # what is rendered already has room for nothing else
        known -= {*SYSTEM_KEYS, *TEMPLATE_KEYS}
    return (
        *(
            f"the column {shown(key)[1:-1]} is not read"
            for key, value in record.items()
            if key not in known and (_says_something(value) or key in SWITCHES)
        ),
        *unread_fields(record[key] for key in read if key in record),
    )


def unread_fields(columns: Iterable[Any]) -> Iterator[str]:
    """A note for each field of a message that says something and is not read."""
    fields: set[str] = set()
    for value in columns:
        for message in value if isinstance(value, list) else [value]:
            if isinstance(message, Mapping):
                unread_keys = message.keys() - READ_FIELDS
                fields |= {
                    str(key) for key in unread_keys if key in MASKS or _switches(message[key])
                }
    yield from (f"the field {shown(f)[1:-1]} of a message is not read" for f in sorted(fields))


def _switches(value: Any) -> bool:
    """Whether a field of a message says something, if only whether the turn is to be learned."""
    return isinstance(value, bool) or _says_something(value)


def _says_something(value: Any) -> bool:
    return isinstance(value, str | list | dict) and bool(value)
