"""Tool calls in a model's text: read as the templates write them, and never a crash."""

import json
from functools import cache
from typing import Any

import pytest
from chat_templates import DEEPSEEK, IM, KNOWN, THINK, Known, chat_of, folder
from hypothesis import given, settings
from hypothesis import strategies as st

from moetrain.data import tokenizer
from moetrain.data.chat import Chat
from moetrain.data.messages import Message
from moetrain.data.parsing import parse_json
from moetrain.data.template import ARGUMENT, Template
from moetrain.data.thoughts import opened_by
from moetrain.environments.call_formats import MOST_MALFORMED, READERS
from moetrain.environments.calls import TurnReader, check_format, format_of
from moetrain.errors import ConfigError

CALLS, CALL, SEP = DEEPSEEK[4], DEEPSEEK[6], DEEPSEEK[12]
# Families that write calls as Qwen3-Coder does, from TRL's files too.
XML = {
    name: Known(f"{name}.jinja", (*IM, *THINK), "<|im_end|>", reasoning=thinks, calls=True)
    for name, thinks in (
        ("qwen3_5_think", True), ("qwen3_5_nothink", False), ("nemotron_3_nano", True)
    )
}  # fmt: skip
ALL = {name: known for name, known in {**KNOWN, **XML}.items() if known.calls}
FORMATS = {
    **dict.fromkeys(("qwen3", "qwen3-thinking-2507", "qwen3-instruct-2507", "qwen2.5"), "json"),
    **dict.fromkeys(XML, "xml"),
    **dict.fromkeys(("llama-3.1", "llama-3.3"), "llama"),
    **dict.fromkeys(("deepseek-v3", "deepseek-v3.1"), "deepseek"),
    "glm-4.5": "glm", "gpt-oss": "harmony",
}  # fmt: skip


@cache
def chat(name: str) -> Chat:
    if name in KNOWN:
        return chat_of(name)
    return Chat(tokenizer.load(folder("qwen3")), XML[name].text)


def test_a_format_is_found_by_what_a_template_writes() -> None:
    assert {name: format_of(chat(name).template) for name in ALL} == FORMATS
    assert format_of(chat("r1-distill").template) == "deepseek"
    for name in ("mixtral", "chatml-base"):
        assert format_of(chat(name).template) is None
        with pytest.raises(ConfigError, match=r"renders no tool calls.*rollout\.call_format"):
            check_format(chat(name).template, "auto", [{"name": "f"}])
        check_format(chat(name).template, "json", [{"name": "f"}])


# Texts with what JSON, XML and templates have a meaning for; none that ends a parameter.
WORDS = st.text(
    st.one_of(
        st.sampled_from(list("\"'\\\n\t {}[]<>&:,;é漢🙂\u2028")), st.characters(codec="utf-8")
    ),
    max_size=20,
).filter(lambda text: "\U0010fffd" not in text)
LEAVES: dict[str, Any] = {
    "string": WORDS,
    "integer": st.integers(-(2**70), 2**70),
    "number": st.floats(allow_nan=False, allow_infinity=False),
    "boolean": st.booleans(),
}
NESTED = st.recursive(
    st.one_of(st.none(), *LEAVES.values()),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3),
    max_leaves=6,
)
KINDS: dict[str, Any] = {
    **LEAVES,
    "array": st.lists(NESTED, max_size=3),
    "object": st.dictionaries(WORDS, NESTED, max_size=3),
}
NAMES = st.from_regex(r"[a-z_][a-z0-9_]{0,8}", fullmatch=True)


@st.composite
def calls(draw: Any) -> tuple[list[tuple[str, dict[str, Any]]], list[dict[str, Any]]]:
    """(calls, the tools that they call)."""
    made: list[tuple[str, dict[str, Any]]] = []
    tools: dict[str, dict[str, Any]] = {}
    for name in draw(st.lists(NAMES, min_size=1, max_size=3, unique=True)):
        kinds = draw(st.dictionaries(NAMES, st.sampled_from(sorted(KINDS)), max_size=3))
        made.append((name, {key: draw(KINDS[kind]) for key, kind in kinds.items()}))
        properties = {key: {"type": kind} for key, kind in kinds.items()}
        tools[name] = {"name": name, "parameters": {"type": "object", "properties": properties}}
    return made, [{"type": "function", "function": tool} for tool in tools.values()]


def message(made: list[tuple[str, dict[str, Any]]], **more: Any) -> Message:
    return {
        "role": "assistant", "content": "", **more,
        "tool_calls": [
            {"type": "function", "id": f"call{i:05d}", "function": {"name": n, "arguments": a}}
            for i, (n, a) in enumerate(made)
        ],
    }  # fmt: skip


def written(name: str, turn: Message) -> tuple[str, str]:
    """(the turn as the template has it, what its prompt has begun of it)."""
    own = chat(name)
    before = [{"role": "user", "content": "go"}]
    prompt = own.template.text_of(before, add_generation_prompt=True)
    text = own.template.text_of(own.spoken([*before, turn]))
    if not text.startswith(prompt):  # a thought is prefilled for answers alone
        prompt = prompt.removesuffix("<think>\n").removesuffix("</think>").removesuffix("<think>")
    assert text.startswith(prompt)
    said = text[len(prompt) :]
    end = own.template.end_of(said)
    said = said[:end]
    ending = next((t for t in own.template.ends.tokens if said.endswith(t)), "")
    return said.removesuffix(ending), opened_by(prompt)


@pytest.mark.parametrize("name", ALL)
@given(own=calls())
@settings(max_examples=25, deadline=None)
def test_what_a_template_writes_is_read(name: str, own: Any) -> None:
    made, tools = own
    if FORMATS[name] in ("llama", "harmony"):  # they take one call a turn
        made = made[:1]
    text, opened = written(name, message(made))
    found = TurnReader.of(chat(name).template, tools).read(text, opened)
    assert [
        (call["function"]["name"], call["function"]["arguments"])
        for call in found.get("tool_calls", [])
    ] == made
    assert not found["content"] and "malformed" not in found


@pytest.mark.parametrize("name", [n for n, known in ALL.items() if known.reasoning])
def test_a_thought_is_apart_and_calls_in_it_are_none(name: str) -> None:
    thought = "perhaps <tool_call>\n{}\n</tool_call> or <function=g>"
    text, opened = written(name, message([("f", {"k": "v"})], reasoning_content=thought))
    found = TurnReader.of(chat(name).template, []).read(text, opened)
    assert found["reasoning_content"] == thought
    assert [call["function"]["name"] for call in found["tool_calls"]] == ["f"]
    assert "malformed" not in found


CUT = {
    "json": ['<tool_call>{"name": "f", "arguments": {"k": </tool_call>', "<tool_call>",
             '<tool_call>{"arguments": {}}</tool_call>', "<tool_call>[1]</tool_call>",
             '<tool_call>{"name": "f", "arguments": [1]}</tool_call>',
             '<tool_call>{"name": "f", "arguments": NaN}</tool_call>',
             '<tool_call>' + '{"name": ' * 5000, '<tool_call>{"name": "f", "arguments": {"k": '
             + "9" * 5000 + "}}</tool_call>",
             # What no file of rollouts takes, and no template.
             '<tool_call>{"name": "f", "arguments": {"k": "\\ud800"}}</tool_call>',
             '<tool_call>{"name": "f", "arguments": "{\\"\\\\ud800\\": 1}"}</tool_call>',
             '<tool_call>{"name": "\\udc00", "arguments": {}}</tool_call>',
             '<tool_call>{"name": "f", "arguments": {"k": 1e999}}</tool_call>',
             '<tool_call>{"name": "f", "arguments": {"k": ' + "[" * 80 + "]" * 80 + "}}"],
    "xml": ["<tool_call>f</tool_call>", "<function=f>\n<parameter=k>\n1\n</function>"],
    "glm": ["<tool_call></tool_call>", "<tool_call>f<arg_key>k</arg_key></tool_call>"],
    "llama": ['{"name": "f", "parameters": {"k"', "<|python_tag|>print(1)",
              '{"name": 3, "parameters": {}}'],
    "deepseek": [f"{CALLS}{CALL}f", f"{CALL}f{SEP}x"],
    "harmony": ["<|channel|>commentary to=functions.f <|constrain|>json<|message|>{k"],
}  # fmt: skip


@pytest.mark.parametrize(("kind", "text"), [(k, t) for k, texts in CUT.items() for t in texts])
def test_a_call_that_cannot_be_read_is_told(kind: str, text: str) -> None:
    found = TurnReader(kind, []).read(text)
    assert len(found["malformed"]) == 1 and "tool_calls" not in found
    assert all("\n" not in line for line in found["malformed"])
    last = text.rpartition("<|message|>")[2].removeprefix(CALLS)
    assert last.strip() in found["content"]  # it stays what the model said


def test_a_bad_call_between_good_ones_is_alone() -> None:
    good = '<tool_call>\n{"name": "f", "arguments": {"k": %d}}\n</tool_call>'
    text = f"So: {good % 1}\n<tool_call>\n{{oops\n</tool_call>\n{good % 2}"
    found = TurnReader("json", []).read(text, num_calls=3)
    assert [c["function"]["arguments"]["k"] for c in found["tool_calls"]] == [1, 2]
    assert [c["id"] for c in found["tool_calls"]] == ["call00003", "call00004"]
    assert len(found["malformed"]) == 1 and "oops" in found["content"]
    assert found["content"].startswith("So:")


MARKS = st.sampled_from(
    [
        *("<tool_call>", "</tool_call>", "<function=", "f>", "</function>", "<parameter=k>"),
        *("</parameter>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>", "{", "}"),
        *('{"name": "f"', ', "arguments": {', '"k": 1', "<|python_tag|>", "<think>", "</think>"),
        *(CALLS, CALL, SEP, DEEPSEEK[7], "```json\n", "\n"),
        *("<|channel|>", "analysis", "commentary to=functions.f", "<|message|>", "<|end|>"),
        *('"\\ud800"', "-1e999", "[" * 70 + "]" * 70, "9" * 5000),
    ]
)


@pytest.mark.parametrize("kind", READERS)
@given(text=st.lists(MARKS | st.text(max_size=5), max_size=14).map("".join))
@settings(max_examples=100, deadline=None)
def test_any_text_is_read(kind: str, text: str) -> None:
    found = TurnReader(kind, [{"name": "f", "parameters": {}}]).read(text)
    assert isinstance(found["content"], str)
    for call in found.get("tool_calls", []):
        assert call["function"]["name"] and isinstance(call["function"]["arguments"], dict)
    # A run keeps it in a file, in messages of a line.
    assert parse_json(json.dumps([[[found]]], ensure_ascii=False).encode()) == [[[found]]]


def test_malformed_calls_are_read_up_to_a_limit() -> None:
    """Each may be looked for to the end of the text."""
    good = '<tool_call>{"name": "f"}</tool_call>'
    found = TurnReader("json", []).read(good + "<tool_call>" * 5000 + good)
    assert len(found["tool_calls"]) == 1 and len(found["malformed"]) == MOST_MALFORMED + 1
    assert "is not read" in found["malformed"][-1] and found["content"].endswith(good)


def test_json_that_is_an_answer_is_no_call() -> None:
    found = TurnReader("llama", []).read('{"name": "Bob", "age": 3}')
    assert found == {"role": "assistant", "content": '{"name": "Bob", "age": 3}'}


def test_values_without_a_type_are_json_where_they_are_some() -> None:
    text = "<function=f><parameter=a>\n[1]\n</parameter><parameter=b>\nTrue\n</parameter>"
    text += "<parameter=c>\nso\n</parameter></function>"
    (call,) = TurnReader("xml", []).read(text)["tool_calls"]
    assert call["function"]["arguments"] == {"a": [1], "b": True, "c": "so"}


def test_a_template_without_a_place_for_thoughts_keeps_them_in_the_content() -> None:
    found = TurnReader.of(chat("qwen2.5").template, []).read("<think>\nhm\n</think>\n\nyes")
    assert found["content"] == "<think>\nhm\n</think>yes"
    assert "reasoning_content" not in found


def test_probing_words_are_of_the_template() -> None:
    """Templates that render no call say so by an empty turn."""
    template = Template("{% for m in messages %}{{ m.content }}{% endfor %}", {}, [])
    assert template.called == "" and ARGUMENT in chat("qwen3").template.called
