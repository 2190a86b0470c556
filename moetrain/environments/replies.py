"""What an environment returned, made plain: texts that any tokenizer takes, cut to a limit."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from moetrain.data.messages import FormatError, Message, shown
from moetrain.environments.base import Reply

ROLES = ("user", "tool", "system")
CUT = "\n[cut here, of {:,} characters]"


def read_replies(said: Any, turn: Mapping[str, Any], most: int) -> Reply:
    """The reply of an environment to a turn, each message of at most `most` characters. Raises
    FormatError for what are no messages.
    """
    counts: dict[str, int] = {}
    num_calls = len(turn.get("tool_calls") or ()) + len(turn.get("malformed") or ())
    if said is None:
        return Reply(counts={"tools/calls": num_calls} if num_calls else {})
    if isinstance(said, str | Mapping) or not isinstance(said, Sequence):
        raise FormatError(f"it returned {shown(said)}, not a list of messages")
    messages = tuple(_message(one, most) for one in said)
    num_errors = sum(bool(one.get("is_error")) for one in said)
    if num_calls:
        counts["tools/calls"] = num_calls
    if num_errors:
        counts["tools/errors"] = num_errors
    return Reply(messages, counts=counts)


def _message(value: Any, most: int) -> Message:
    role = value.get("role") if isinstance(value, Mapping) else None
    if role not in ROLES:
        raise FormatError(
            f"it returned the message {shown(value)}: a reply's has a role, {' or '.join(ROLES)},"
            " and a content"
        )
    made: Message = {"role": role, "content": cut(text_of_value(value.get("content")), most)}
    for name in ("name", "tool_call_id"):
        if value.get(name) is not None:
            made[name] = cut(text_of_value(value[name]), 200)
    return made


def text_of_value(value: Any) -> str:
    """What a tool returned, as text that can be encoded: JSON for what is no text."""
    if isinstance(value, bytes | bytearray):
        return bytes(value).decode("utf-8", "replace")
    if not isinstance(value, str):
        try:
            value = json.dumps(value, ensure_ascii=False)
        except (TypeError, ValueError, RecursionError):  # of no JSON type; with itself inside
            value = str(value)
    return value.encode("utf-8", "replace").decode("utf-8")  # half a surrogate pair is no text


def cut(text: str, most: int) -> str:
    """The text, or as much of its beginning as makes `most` characters with a word on the cut."""
    if len(text) <= most:
        return text
    note = CUT.format(len(text))
    return text[: max(0, most - len(note))] + note
