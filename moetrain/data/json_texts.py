"""Columns of a JSONL file whose values are texts of JSON.

`datasets` from 4.7 on gives a column of uneven values (a text here, a list of parts there) a type
of its own, and its `to_json` writes every value of it as a text of JSON: a text `a` becomes
`"\\"a\\""`. One value alone does not tell that from a text in quotation marks, a whole column does.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from moetrain.data.parsing import MalformedError, parse_json

COLUMNS = frozenset(
    "messages conversations prompt completion chosen rejected rejected_messages rejected_response"
    " question answer solution instruction input output query response system".split()
)
INNER = ("content", "value")  # of messages
ANSWERS = frozenset(("answer", "solution"))  # which need not be text
# A text that `datasets` (pandas' ujson) takes for a number.
NUMBER = re.compile(r"-?\d*(\.\d*)?([eE][+-]?\d*)?")
type Place = tuple[str, ...]  # a column, or a column and a field of its messages


def json_places(records: Iterable[Any]) -> frozenset[Place]:
    """Where every value is a text of JSON, of several kinds, and texts are among them; of messages
    also where a content is a list of parts.

    Reads no further than to the first record that shows that there is no such place.
    """
    kinds: dict[Place, set[str]] = {}
    plain: set[Place] = set()
    for record in records:
        if not isinstance(record, dict):
            continue
        for place, value in _values(record):
            kind = _kind(value)
            if kind is None:
                plain.add(place)
            else:
                kinds.setdefault(place, set()).add(kind)
        if all(place in plain for place, _ in _values(record)):
            break
    return frozenset(
        place
        for place, seen in kinds.items()
        if place not in plain
        and (("text" in seen and seen != {"text"}) or ("parts" in seen and len(place) > 1))
    )


def decoded(record: dict[str, Any], places: frozenset[Place]) -> dict[str, Any]:
    """The record with what its texts of JSON say. Raises ValueError as parse_json."""
    parsed = dict(record)
    for column, *inner in places:
        value = parsed.get(column)
        if value is None:
            continue
        parsed[column] = _parse_field(value, inner[0]) if inner else text_of_json(value)
    return parsed


def _parse_field(value: Any, field: str) -> Any:
    """A message, or a list of them, with one field parsed."""
    if isinstance(value, list):
        return [_parse_field(item, field) for item in value]
    if isinstance(value, Mapping) and value.get(field) is not None:
        return {**value, field: text_of_json(value[field])}
    return value


def value_of_json(text: str) -> Any:
    """What a text says; the text itself where it is JSON to `datasets` alone (`007`, `1.`). Raises
    ValueError as parse_json.
    """
    try:
        return parse_json(text)
    except MalformedError:
        return text


def text_of_json(value: Any) -> Any:
    """What a text says, where that is a text, a message, or a list of messages or parts; None where
    it says null, which `datasets` 4.8 writes for what is missing. Any other JSON was a text
    before, which `datasets` left as it was.
    """
    if not isinstance(value, str):
        return value
    parsed = value_of_json(value)
    if parsed is None:
        return None
    items = parsed if isinstance(parsed, list) else [parsed]
    known = all(isinstance(item, dict) and {"role", "from", "type"} & item.keys() for item in items)
    return parsed if isinstance(parsed, str) or (items and known) else value


def _values(record: Mapping[str, Any]) -> Iterator[tuple[Place, Any]]:
    for column in COLUMNS & record.keys():
        value = record[column]
        messages = value if isinstance(value, list) else [value]
        for message in messages:
            if isinstance(message, Mapping):
                fields = (((column, name), message.get(name)) for name in INNER)
                yield from (pair for pair in fields if pair[1] is not None)
            elif message is not None:
                yield (column,), value


def _kind(value: Any) -> str | None:
    """What a text of JSON is of: a text, parts of a content or something else; None where it is no
    JSON.
    """
    if not isinstance(value, str):
        return None
    first = value.lstrip()[:1]
    if not first or first not in '"[{-0123456789tfn':
        return None
    try:
        parsed = json.loads(value)
    except (ValueError, RecursionError):
        return "other" if NUMBER.fullmatch(value) else None
    if isinstance(parsed, str):
        return "text"
    return (
        "parts" if isinstance(parsed, list) and parsed and all(map(_is_part, parsed)) else "other"
    )


def _is_part(value: Any) -> bool:
    return isinstance(value, dict) and value.get("type") == "text" and len(value) == 2
