"""JSON as people's files have it: parsed into what can be worked with, or refused with a reason."""

import json
import re
from collections.abc import Iterator
from typing import Any

# An escape of half a character, which Python takes for a text and nothing can encode.
HALF = re.compile(r"\\u[dD][89a-fA-F]")
LONE = re.compile("[\ud800-\udfff]")
# Of lists and objects in each other: what goes through a record must come to its end.
MAX_DEPTH = 100
MAX_DIGITS = 4300  # Python's own limit
TOO_LONG = f"a number has more than {MAX_DIGITS} digits"
TOO_DEEP = f"nested too deeply (more than {MAX_DEPTH} levels)"


class MalformedError(ValueError):
    """A text that is no JSON."""


def parse_json(raw: bytes | str) -> Any:
    """A JSON text's value. ValueError with the reason where it has none that can be used: a
    MalformedError where the text is no JSON.
    """
    try:
        text = raw.decode("utf-8") if isinstance(raw, bytes) else raw
        value = json.loads(text)
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start}") from None
    except json.JSONDecodeError as error:
        if _is_cut(error):
            raise MalformedError(
                f"malformed JSON: cut short at its end, column {len(error.doc.rstrip()) + 1}"
            ) from None
        raise MalformedError(f"malformed JSON at column {error.colno}: {error.msg}") from None
    except RecursionError:
        raise ValueError(f"malformed JSON: {TOO_DEEP}") from None
    except ValueError:
        raise ValueError(TOO_LONG) from None
    # Looking for a text is many times as fast as a pattern.
    may_be_half = "\\ud" in text or "\\uD" in text
    if text.count("[") + text.count("{") > MAX_DEPTH or (may_be_half and HALF.search(text)):
        check(value)
    return value


def _is_cut(error: json.JSONDecodeError) -> bool:
    """Whether a text is the beginning of JSON; of a text in it Python names where that begins."""
    rest = error.doc[error.pos :].strip()
    if error.msg.startswith(("Unterminated string", "Invalid \\uXXXX")):
        return not re.search(r"(?<!\\)\"", rest[1:])
    return any(word.startswith(rest) for word in ("true", "false", "null")) or not rest


def parse_list(text: str) -> Iterator[Any]:
    """The items of a JSON list, with a ValueError in place of each that cannot be used.

    Raises ValueError or RecursionError where the text is not JSON.
    """
    long = LongNumber()

    def number(digits: str) -> Any:
        return int(digits) if len(digits) <= MAX_DIGITS else long

    for value in json.loads(text, parse_int=number):
        try:
            check(value)
        except ValueError as error:
            yield error
        else:
            yield value


class LongNumber:
    """Stands for a number that Python does not read, so that it costs one record and not all."""


def check(value: Any, most: int = MAX_DEPTH) -> None:
    """ValueError when a JSON value cannot be worked with: of more than `most` levels, too long a
    number, or half of a character in a text, which no encoding has.
    """
    level = [value]
    for _ in range(most + 1):
        below: list[Any] = []
        for one in level:
            if isinstance(one, str):
                if not one.isascii() and (lone := LONE.search(one)):
                    code = f"\\u{ord(lone[0]):04x}"
                    raise ValueError(f"a text holds half of a character ({code}, a lone surrogate)")
            elif isinstance(one, dict):
                below += [*one, *one.values()]
            elif isinstance(one, list):
                below += one
            elif isinstance(one, LongNumber):
                raise ValueError(TOO_LONG)
        if not below:
            return
        level = below
    raise ValueError(f"nested too deeply (more than {most} levels)")


# Where a record may have messages (or tools): alone there, or in place of a text.
LISTS = ("messages", "conversations", "rejected_messages", "tools")
ANSWERS = ("prompt", "completion", "chosen", "rejected", "rejected_response")
MESSAGES: tuple[set[str], ...] = ({"role", "content"}, {"role", "tool_calls"}, {"from", "value"})


def with_parsed_messages(record: dict[str, Any]) -> dict[str, Any]:
    """The record with its messages as objects where they are texts of JSON: `datasets` from 4.7 on
    writes them so, into JSONL and parquet alike, when their keys differ. ValueError as parse_json.
    """
    parsed_columns: dict[str, Any] = {}
    for key in LISTS + ANSWERS:
        value = record.get(key)
        if isinstance(value, str) and value.lstrip().startswith("["):
            parsed = _parsed(value)
            if key in LISTS or _are_messages(parsed):
                parsed_columns[key] = parsed
        elif key in ANSWERS and _is_object(value) and _are_messages([parsed := _parsed(value)]):
            parsed_columns[key] = parsed
        elif isinstance(value, list) and value and all(_is_object(item) for item in value):
            parsed_columns[key] = [_parsed(item) for item in value]
    tools = parsed_columns.get("tools", record.get("tools"))
    if isinstance(tools, list):
        parsed_columns["tools"] = with_parsed_schemas(tools)
    kwargs = record.get("chat_template_kwargs")
    if _is_object(kwargs) or kwargs == "null":
        parsed_columns["chat_template_kwargs"] = _parsed(kwargs)
    return record | parsed_columns if parsed_columns else record


# Keys of a tool and its JSON schema whose values are no text; that of `type` may be, but no JSON.
SCHEMAS = frozenset(
    "function parameters properties patternProperties additionalProperties $defs definitions items"
    " prefixItems anyOf oneOf allOf not".split()
)
VALUES = frozenset("required enum type".split())


def with_parsed_schemas(tools: list[Any]) -> list[Any]:
    """Tools whose schemas have texts of JSON in place of objects and lists, as `datasets` 4.8
    writes them into JSONL when they differ from tool to tool, as they were.
    """
    return [_schema(tool) for tool in tools]


def _schema(value: Any) -> Any:
    if isinstance(value, list):
        return [_schema(item) for item in value]
    if not isinstance(value, dict):
        return value
    return {key: _keyword(key, item) for key, item in value.items()}


def _keyword(key: str, item: Any) -> Any:
    if isinstance(item, str) and key in SCHEMAS | VALUES:
        item = _parsed(item)
    # of other keys objects alone can be schemas: those that `properties` and the like name
    walked = key in SCHEMAS or (isinstance(item, dict) and key not in ("default", "const"))
    return _schema(item) if walked else item


def _is_object(value: Any) -> bool:
    return isinstance(value, str) and value.lstrip().startswith("{")


def _parsed(text: Any) -> Any:
    """What a text says, or the text itself where it is not JSON."""
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return text
    return parse_json(text)


def _are_messages(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(
            isinstance(item, dict) and any(own <= item.keys() for own in MESSAGES) for item in value
        )
    )
