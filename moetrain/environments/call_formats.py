"""How models write tool calls in their text. Each reader takes what was said behind the thought,
and tells calls from content. What looks like a call and cannot be read stays in the content, with a
line that says what is wrong with it.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from typing import Any

from moetrain.data.messages import shown
from moetrain.data.parsing import check

Types = Mapping[str, Mapping[str, Any]]
"""Tool -> its parameters' JSON schemas, by name: formats that write a text and a number alike are
read by them.
"""


MOST_MALFORMED = 32  # calls of a turn: each may be looked for to the turn's end
MOST_DEPTH = 64  # of arguments, which stand in messages in a line of a file


class Malformed(ValueError):
    """What is wrong with a call, for the model."""


@dataclass
class Found:
    """What a turn says."""

    content: str = ""
    calls: list[tuple[str, dict[str, Any]]] = field(
        default_factory=list[tuple[str, dict[str, Any]]]
    )
    malformed: list[str] = field(default_factory=list[str])
    thought: str = ""


Reader = Callable[[str, Types], Found]


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _finite(digits: str) -> float:
    value = float(digits)
    if not isfinite(value):
        raise ValueError(f"{digits[:20]} is beyond all numbers")
    return value


# A model writes line breaks into texts as they are.
_DECODER = json.JSONDecoder(strict=False, parse_constant=_no_constant, parse_float=_finite)
_BLANKS, _BETWEEN = re.compile(r"\s*"), re.compile(r"[\s;]*")


def _behind(blanks: re.Pattern[str], text: str, place: int) -> int:
    """Where what is no such blank begins. Without a copy of the text: there may be many calls."""
    match = blanks.match(text, place)
    return place if match is None else match.end()


def _decoded(text: str, place: int) -> tuple[Any, int]:
    """(the JSON value at a place, where it ends). Raises ValueError also for one that no file of
    rollouts takes: half of a character, which nothing encodes, or endless nesting.
    """
    try:
        value, end = _DECODER.raw_decode(text, place)
        check(value, MOST_DEPTH)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    return value, end


def _object(text: str, place: int, what: str) -> tuple[dict[str, Any], int]:
    """(the JSON object at a place, where it ends)."""
    try:
        value, end = _decoded(text, _behind(_BLANKS, text, place))
    except ValueError as error:
        raise Malformed(f"{what} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise Malformed(f"{what} is {shown(value)}, not a JSON object")
    return value, end


def _named(value: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The name and arguments that a JSON object says."""
    name = value.get("name")
    if not isinstance(name, str) or not name:
        raise Malformed('a tool call has no "name"')
    given = value.get("arguments", value.get("parameters"))
    if isinstance(given, str):
        given, _ = _object(given, 0, f"the arguments of {name}")
    given = {} if given is None else given
    if not isinstance(given, dict):
        raise Malformed(f"the arguments of {name} are {shown(given)}, not a JSON object")
    return name, given


Parse = Callable[[str, int], tuple[list[tuple[str, dict[str, Any]]], int]]
"""(text, place) -> (the calls that begin there, where they end). Raises Malformed."""


def _scan(text: str, begin: re.Pattern[str], ends: Sequence[str], parse: Parse) -> Found:
    """Calls wherever `begin` is, the rest as content; a malformed one goes up to the next of `ends`
    or of `begin`.
    """
    reading, contents, place = Found(), list[str](), 0
    while match := begin.search(text, place):
        contents.append(text[place : match.start()])
        try:
            calls, place = parse(text, match.end())
            reading.calls += calls
        except Malformed as error:
            reading.malformed.append(str(error))
            is_last = len(reading.malformed) == MOST_MALFORMED
            place = len(text) if is_last else _end_of(text, match, begin, ends)
            contents.append(text[match.start() : place])
    if len(reading.malformed) == MOST_MALFORMED:
        reading.malformed.append(f"what follows {MOST_MALFORMED} malformed calls is not read")
    reading.content = "".join([*contents, text[place:]]).strip()
    return reading


def _end_of(text: str, match: re.Match[str], begin: re.Pattern[str], ends: Sequence[str]) -> int:
    place = len(text)
    for end in ends:
        if (at := text.find(end, match.end())) >= 0:
            place = min(place, at + len(end))
    following = begin.search(text, match.end())
    return min(place, following.start()) if following else place


# Hermes, Qwen 2.5 and 3: <tool_call>{"name": …, "arguments": {…}}</tool_call>


def read_json(text: str, types: Types) -> Found:
    return _scan(text, re.compile("<tool_call>"), ["</tool_call>"], _json_call)


def _json_call(text: str, place: int) -> tuple[list[tuple[str, dict[str, Any]]], int]:
    value, end = _object(text, place, "a tool call")
    closed = re.compile(r"\s*</tool_call>").match(text, end)
    if closed is None and _behind(_BLANKS, text, end) < len(text):
        raise Malformed("a tool call has more than one JSON object, or no </tool_call>")
    return [_named(value)], closed.end() if closed else len(text)


# Qwen3-Coder, Qwen 3.5, Nemotron 3: <tool_call><function=f><parameter=a>…</parameter></function>

_XML_PARAMETER = re.compile(
    r"\s*<parameter=([^>\n]+)>\n?(.*?)\n?</parameter>(?=\s*(?:<parameter=|</function>))", re.DOTALL
)


def read_xml(text: str, types: Types) -> Found:
    # The outer mark is left out by models at times.
    begin = re.compile(r"<tool_call>\s*<function=|<tool_call>|<function=")

    def parse(text: str, place: int) -> tuple[list[tuple[str, dict[str, Any]]], int]:
        name = re.compile(r"([^>\n<]+)>").match(text, place)
        if name is None or not text.endswith("<function=", 0, place):
            raise Malformed("a tool call is not <function=NAME> … </function>")
        arguments: dict[str, Any] = {}
        place = name.end()
        parameter_types = types.get(name[1].strip(), {})
        while match := _XML_PARAMETER.match(text, place):
            key = match[1].strip()
            arguments[key], place = _value(match[2], parameter_types.get(key)), match.end()
        end = re.compile(r"\s*</function>(?:\s*</tool_call>)?").match(text, place)
        if end is None:
            raise Malformed(f"the call of {name[1]} is not closed by </parameter> and </function>")
        return [(name[1].strip(), arguments)], end.end()

    return _scan(text, begin, ["</tool_call>", "</function>"], parse)


# GLM 4.5: <tool_call>f <arg_key>a</arg_key> <arg_value>…</arg_value> </tool_call>

# The key is up to the first mark behind it, whatever follows: else each mark is tried with each.
_GLM_ARGUMENT = re.compile(
    r"\s*<arg_key>((?>.*?</arg_key>))\s*<arg_value>(.*?)</arg_value>(?=\s*(?:<arg_key>|</tool_call>))",
    re.DOTALL,
)


def read_glm(text: str, types: Types) -> Found:
    def parse(text: str, place: int) -> tuple[list[tuple[str, dict[str, Any]]], int]:
        name = re.compile(r"\s*([^\s<]+)").match(text, place)
        if name is None:
            raise Malformed("a tool call does not begin with the name of a tool")
        arguments: dict[str, Any] = {}
        place = name.end()
        parameter_types = types.get(name[1], {})
        while match := _GLM_ARGUMENT.match(text, place):
            key = match[1].removesuffix("</arg_key>").strip()
            arguments[key], place = _value(match[2], parameter_types.get(key)), match.end()
        end = re.compile(r"\s*</tool_call>").match(text, place)
        if end is None:
            raise Malformed(
                f"the call of {name[1]} is not pairs of <arg_key> and <arg_value> and </tool_call>"
            )
        return [(name[1], arguments)], end.end()

    return _scan(text, re.compile("<tool_call>"), ["</tool_call>"], parse)


# Llama 3: {"name": …, "parameters": {…}}, and nothing else

PYTHON_TAG = "<|python_tag|>"


def read_llama(text: str, types: Types) -> Found:
    marked = text.lstrip().startswith(PYTHON_TAG)
    own = text.strip().removeprefix(PYTHON_TAG)
    if not marked and not re.match(r'\s*\{\s*"(?:name|type|parameters|arguments)"', own):
        return Found(text.strip())
    reading, place = Found(), 0
    try:
        while _behind(_BLANKS, own, place) < len(own):
            value, place = _object(own, place, "a tool call")
            if not marked and not value.keys() & {"parameters", "arguments"}:
                return Found(text.strip())  # JSON that is an answer
            reading.calls.append(_named(value))
            place = _behind(_BETWEEN, own, place)
    except Malformed as error:
        return Found(text.strip(), malformed=[str(error)])
    return reading


# DeepSeek V3 (a kind, and arguments in a block of code) and V3.1 (neither)

_D = {
    name: f"<\uff5c{name}\uff5c>".replace(" ", "\u2581")
    for name in (
        "tool calls begin",
        "tool calls end",
        "tool call begin",
        "tool call end",
        "tool sep",
    )
}
_FENCED = re.compile(r"([^\n]{1,200})\n```json\n")


def read_deepseek(text: str, types: Types) -> Found:
    def parse(text: str, place: int) -> tuple[list[tuple[str, dict[str, Any]]], int]:
        at = text.find(_D["tool sep"], place)
        if at < 0:
            raise Malformed(f"a tool call has no {_D['tool sep']}")
        name, place = text[place:at].strip(), at + len(_D["tool sep"])
        if fenced := _FENCED.match(text, place):
            name, place = fenced[1].strip(), fenced.end()
        arguments, place = _object(text, place, f"the arguments of {name}")
        end = re.compile(rf"\s*(?:```)?\s*{re.escape(_D['tool call end'])}").match(text, place)
        if end is None:
            raise Malformed(f"the call of {name} has no {_D['tool call end']} behind its arguments")
        return [(name, arguments)], end.end()

    begin, end = re.escape(_D["tool call begin"]), _D["tool call end"]
    reading = _scan(text, re.compile(begin), [end], parse)
    for mark in ("tool calls begin", "tool calls end"):
        reading.content = reading.content.replace(_D[mark], "").strip()
    return reading


# gpt-oss: messages in channels

_HEADER = re.compile(
    r"(?:<\|start\|>assistant)?((?:(?!<\|start\|>|<\|message\|>).)*)<\|message\|>", re.S
)
_BODY = re.compile(r"(.*?)(?:<\|(?:end|call|return)\|>|\Z)", re.DOTALL)
_TO = re.compile(r"to=([^\s<]+)")
_CHANNEL = re.compile(r"<\|channel\|>(\w+)")


def read_harmony(text: str, types: Types) -> Found:
    reading, contents, thoughts, place = Found(), list[str](), list[str](), 0
    while header := _HEADER.match(text, place):
        body = _BODY.match(text, header.end())
        assert body is not None
        place = body.end()
        to, channel = _TO.search(header[1]), _CHANNEL.search(header[1])
        if to is None:
            is_thought = channel is not None and channel[1] == "analysis"
            (thoughts if is_thought else contents).append(body[1])
            continue
        name = to[1].removeprefix("functions.")
        try:
            arguments, end = _object(body[1], 0, f"the arguments of {name}")
            if _behind(_BLANKS, body[1], end) < len(body[1]):
                raise Malformed(f"the arguments of {name} are more than one JSON object")
            reading.calls.append((name, arguments))
        except Malformed as error:
            reading.malformed.append(str(error))
            contents.append(body[1])
    contents.append(text[place:])
    reading.content = "\n".join(own for own in contents if own.strip()).strip()
    reading.thought = "\n".join(thoughts).strip()
    return reading


def _value(text: str, schema: Mapping[str, Any] | None) -> Any:
    """What a parameter's text says, by its type; without one, JSON where it is some."""
    kinds = _kinds(schema or {})
    if kinds == {"string"}:
        return text
    if "string" in kinds:
        return None if kinds & {"null"} and text.strip() in ("null", "None") else text
    own = text.strip()
    try:
        value, end = _decoded(own, 0)
        if end == len(own):
            return value
        raise ValueError("there is more behind it")
    except ValueError:
        # Templates write Python's names for them.
        return {"True": True, "False": False, "None": None}.get(own, text)


def _kinds(schema: Mapping[str, Any]) -> set[str]:
    declared = schema.get("type")
    kinds = (
        {declared}
        if isinstance(declared, str)
        else set(declared)
        if isinstance(declared, list)
        else set[str]()
    )
    for other in schema.get("anyOf") or ():
        kinds |= _kinds(other)
    if schema.get("nullable"):
        kinds.add("null")
    if all(isinstance(one, str) for one in schema.get("enum") or [0]):
        kinds.add("string")
    return kinds


READERS: dict[str, Reader] = {
    "xml": read_xml,
    "glm": read_glm,
    "json": read_json,
    "deepseek": read_deepseek,
    "harmony": read_harmony,
    "llama": read_llama,
}
