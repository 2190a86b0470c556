"""Every format people have becomes the same conversation, and what cannot be used says why."""

import json
from typing import Any

import pytest

from moetrain.data.formats import FORMATS, FormatError, detect, to_conversation

ONE = [{"role": "user", "content": "What is 7 plus 5?"}, {"role": "assistant", "content": "12"}]

SAME: dict[str, dict[str, Any]] = {
    "openai": {"messages": ONE},
    "openai parts": {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "What is 7 plus 5?"}]},
            ONE[1],
        ]
    },
    "parquet nulls": {
        "messages": [{**m, "tool_calls": None, "name": None} for m in ONE],
        "tools": None,
    },
    "trl strings": {"prompt": "What is 7 plus 5?", "completion": "12"},
    "trl messages": {"prompt": ONE[:1], "completion": ONE[1:]},
    "sharegpt": {
        "conversations": [
            {"from": "human", "value": "What is 7 plus 5?"},
            {"from": "gpt", "value": "12"},
        ]
    },
    "sharegpt with roles": {"conversations": ONE},
    "alpaca": {"instruction": "What is 7 plus 5?", "input": "", "output": "12"},
    "ms-swift query": {"query": "What is 7 plus 5?", "response": "12", "history": []},
    "gsm8k": {"question": "What is 7 plus 5?", "answer": "12"},
}


@pytest.mark.parametrize("name", SAME)
def test_same_conversation(name: str) -> None:
    conversation = to_conversation(SAME[name])
    assert conversation.messages == ONE
    assert conversation.trained == [False, True]
    assert conversation.template_kwargs == {}


def test_every_format_is_tried() -> None:
    assert {detect(record).name for record in SAME.values()} == {form.name for form in FORMATS}


@pytest.mark.parametrize(
    "own",
    [
        {"instruction": "Reverse it.", "input": "abc", "output": "cba"},
        {"query": "Reverse it.\n\nabc", "response": "cba"},
    ],
)
def test_a_system_message_and_history_beside_it(own: dict[str, Any]) -> None:
    record = {**own, "system": "Be brief.", "history": [["Hi", "Hello"]]}
    conversation = to_conversation(record)
    assert [m["role"] for m in conversation.messages] == [
        "system",
        "user",
        "assistant",
        "user",
        "assistant",
    ]
    assert conversation.messages[3]["content"] == "Reverse it.\n\nabc"
    assert conversation.trained == [False, False, True, False, True]


def test_weights_switch_turns_off() -> None:
    messages = [ONE[0], {**ONE[1], "weight": 0}, ONE[0], {**ONE[1], "loss": True}]
    conversation = to_conversation({"messages": messages})
    assert conversation.trained == [False, False, False, True]
    assert all("weight" not in m and "loss" not in m for m in conversation.messages)


def test_a_list_prompt_is_not_learned() -> None:
    record = {"prompt": [*ONE, ONE[0]], "completion": [ONE[1]]}
    assert to_conversation(record).trained == [False, False, False, True]


def test_tools_and_template_settings_reach_the_template() -> None:
    tools = [{"type": "function", "function": {"name": "add"}}]
    for given in (tools, json.dumps(tools)):
        record = {
            "messages": ONE,
            "tools": given,
            "chat_template_kwargs": {"enable_thinking": False},
        }
        assert to_conversation(record).template_kwargs == {"enable_thinking": False, "tools": tools}


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"text": "x"}, "no known format"),
        ({"messages": []}, "at least one"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role is 'robot'"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content must be text"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "must be text"),
        ({"messages": [ONE[0]]}, "no assistant turn"),
        ({"messages": [ONE[0], {"role": "assistant", "content": " "}]}, "turn 1 is empty"),
        ({"messages": [ONE[0], {**ONE[1], "weight": 0}]}, "switched off"),
        ({"prompt": "x", "completion": ""}, "completion is empty"),
        ({"prompt": "x", "completion": 1}, "completion must be text"),
        ({"conversations": [{"from": "alien", "value": "x"}]}, "from is 'alien'"),
        ({"conversations": ["x"]}, "must be an object"),
        ({"instruction": "", "output": "x"}, "instruction is empty"),
        ({"instruction": "x", "output": "y", "history": ["z"]}, "history[0]"),
        ({"messages": ONE, "tools": "{"}, "tools is neither"),
    ],
)
def test_reasons(record: dict[str, Any], reason: str) -> None:
    with pytest.raises(FormatError) as caught:
        to_conversation(record)
    assert reason in str(caught.value)
