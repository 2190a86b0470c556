"""Every format of preference data becomes the same pair, and what cannot be used says why."""

from typing import Any

import pytest

from moetrain.data.formats import FormatError, MissingError
from moetrain.data.pair_formats import PAIR_FORMATS, detect_pair, to_labelled, to_pair
from moetrain.data.prompts import to_prompt

ASKED = "What is 7 plus 5?"
PROMPT = [{"role": "user", "content": ASKED}]
GOOD, BAD = {"role": "assistant", "content": "12"}, {"role": "assistant", "content": "11"}
HUMAN = [{"from": "human", "value": ASKED}]

SAME: dict[str, dict[str, Any]] = {
    "trl strings": {"prompt": ASKED, "chosen": "12", "rejected": "11"},
    "trl messages": {"prompt": PROMPT, "chosen": [GOOD], "rejected": [BAD]},
    "trl text and messages": {"prompt": ASKED, "chosen": [GOOD], "rejected": [BAD]},
    "trl prompt and whole conversations": {
        "prompt": ASKED,
        "chosen": [*PROMPT, GOOD],
        "rejected": [*PROMPT, BAD],
        "messages": [*PROMPT, GOOD],
    },
    "trl implicit": {"chosen": [*PROMPT, GOOD], "rejected": [*PROMPT, BAD]},
    "trl implicit from a table": {
        "chosen": [{**m, "name": None} for m in [*PROMPT, GOOD]],
        "rejected": [{**m, "name": None} for m in [*PROMPT, BAD]],
        "prompt": None,
        "margin": None,
    },
    "ms-swift response": {"messages": [*PROMPT, GOOD], "rejected_response": "11"},
    "ms-swift messages": {"messages": [*PROMPT, GOOD], "rejected_messages": [*PROMPT, BAD]},
    "ms-swift switches": {
        "messages": [*PROMPT, {**GOOD, "loss": True}],
        "rejected_response": "11",
    },
    "sharegpt": {
        "conversations": HUMAN,
        "chosen": {"from": "gpt", "value": "12"},
        "rejected": {"from": "gpt", "value": "11"},
    },
    "sharegpt strings": {"conversations": HUMAN, "chosen": "12", "rejected": "11"},
    "sharegpt with roles": {"conversations": PROMPT, "chosen": GOOD, "rejected": BAD},
    "alpaca": {"instruction": ASKED, "input": "", "chosen": "12", "rejected": "11"},
    "ms-swift query": {"query": ASKED, "response": "12", "rejected_response": "11"},
}

LABELLED: dict[str, dict[str, Any]] = {
    "trl strings": {"prompt": ASKED, "completion": "12", "label": True},
    "trl messages": {"prompt": PROMPT, "completion": [GOOD], "label": True},
    "ms-swift": {"messages": [*PROMPT, GOOD], "label": True},
    "a table's": {"messages": [*PROMPT, GOOD], "label": 1, "kto_tag": None},
    "sharegpt": {"conversations": [*HUMAN, {"from": "gpt", "value": "12"}], "kto_tag": True},
    "alpaca": {"instruction": ASKED, "input": "", "output": "12", "kto_tag": True},
    "ms-swift query": {"query": ASKED, "response": "12", "label": True},
}


@pytest.mark.parametrize("name", SAME)
def test_same_pair(name: str) -> None:
    pair = to_pair(SAME[name])
    assert pair.chosen.messages == [*PROMPT, GOOD]
    assert pair.rejected.messages == [*PROMPT, BAD]
    assert pair.chosen.trained == pair.rejected.trained == [False, True]
    assert pair.margin is None


def test_every_format_is_tried() -> None:
    assert {detect_pair(record).name for record in SAME.values()} == {f.name for f in PAIR_FORMATS}


@pytest.mark.parametrize("name", LABELLED)
def test_same_labelled_answer(name: str) -> None:
    for value in (True, False):
        record = {k: value if v in (True, 1) else v for k, v in LABELLED[name].items()}
        labelled = to_labelled(record)
        assert labelled.conversation.messages == [*PROMPT, GOOD]
        assert labelled.conversation.trained == [False, True]
        assert labelled.desirable is value


def test_only_the_last_turn_is_learned() -> None:
    earlier = [*PROMPT, GOOD, {"role": "user", "content": "Sure?"}]
    record = {"messages": [*earlier, GOOD], "rejected_response": "No, 11."}
    pair = to_pair(record)
    assert pair.chosen.trained == pair.rejected.trained == [False, False, False, True]
    assert pair.rejected.messages == [*earlier, {"role": "assistant", "content": "No, 11."}]


def test_system_input_history_tools_and_margin() -> None:
    record = {
        "instruction": "Reverse it.",
        "input": "abc",
        "system": "Be brief.",
        "history": [["Hi", "Hello"]],
        "chosen": "cba",
        "rejected": "bca",
        "tools": '[{"name": "f"}]',
        "margin": 2,
    }
    pair = to_pair(record)
    roles = [message["role"] for message in pair.chosen.messages]
    assert roles == ["system", "user", "assistant", "user", "assistant"]
    assert pair.chosen.messages[3]["content"] == "Reverse it.\n\nabc"
    assert pair.rejected.template_kwargs == {"tools": [{"name": "f"}]}
    assert pair.margin == 2.0


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"rejected": "12"}, "chosen and rejected are identical"),
        ({"chosen": " "}, "chosen is empty"),
        ({"rejected": []}, "rejected is empty"),
        ({"rejected": [{"role": "assistant", "content": ""}]}, "the answer in rejected is empty"),
        ({"prompt": ""}, "prompt is empty"),
        ({"prompt": []}, "prompt must be a list with at least one message"),
        ({"rejected": PROMPT}, "rejected ends with a user turn and not with an answer"),
        ({"rejected": 3}, "rejected must be text, a message or a list, not int"),
        (
            {"rejected": [{"role": "user", "content": "What is 1?"}, BAD]},
            "rejected is a whole conversation and the prompt is not in it",
        ),
        (
            {"chosen": [GOOD, PROMPT[0], GOOD], "rejected": [BAD, PROMPT[0], BAD]},
            "chosen and rejected differ in turn 1: only their last turns may differ",
        ),
        (
            {"rejected": [GOOD, PROMPT[0], BAD]},
            "chosen and rejected have prompts of different lengths: only their last turns may",
        ),
        (
            {"prompt": None},
            "there is no prompt: chosen is str and not a list of messages; add the key prompt",
        ),
        ({"chosen": None}, r"no known format of pairs with the keys \['prompt', 'rejected'\]"),
        ({"chosen": [GOOD | {"weight": 0}]}, "the answer in chosen is switched off by its weight"),
        ({"rejected": [BAD | {"loss": False}]}, "the answer in rejected is switched off"),
        ({"prompt": PROMPT * 1001}, "prompt has 1,001 messages; at most 1,000"),
        ({"chosen": [*PROMPT * 1000, GOOD]}, "chosen has 1,001 messages; at most 1,000"),
        ({"prompt": PROMPT * 1000}, "the record has 1,001 messages; at most 1,000"),
        ({"margin": "big"}, "margin must be a number, not 'big'"),
        ({"margin": float("nan")}, "margin must be a number, not nan"),
    ],
)
def test_unusable_pairs(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(FormatError, match=reason):
        to_pair({"prompt": ASKED, "chosen": "12", "rejected": "11", **changes})


def test_an_answer_alone_is_no_pair() -> None:
    with pytest.raises(FormatError, match="there is no prompt before the answer in chosen"):
        to_pair({"chosen": [GOOD], "rejected": [BAD]})
    with pytest.raises(FormatError, match="chosen ends with a user turn"):
        to_pair({"messages": PROMPT, "rejected_response": "11"})


@pytest.mark.parametrize(
    "record",
    [
        {"messages": [*PROMPT, GOOD]},
        {"prompt": ASKED},
        {"prompt": ASKED, "chosen": "12", "rejected": None},
        {"prompt": ASKED, "completion": "12", "label": True},
    ],
)
def test_a_record_without_a_rejected_answer(record: dict[str, Any]) -> None:
    keys = sorted(key for key, value in record.items() if value is not None)
    with pytest.raises(MissingError) as caught:
        to_pair(record)
    assert str(caught.value).startswith(f"no rejected answer with the keys {keys}; known: ms-swift")
    assert caught.value.keys == tuple(keys)


def test_unusable_labels() -> None:
    with pytest.raises(MissingError, match="no label or kto_tag with the keys"):
        to_labelled(SAME["trl strings"])
    with pytest.raises(FormatError, match="label must be true or false, not 'good'"):
        to_labelled({"messages": [*PROMPT, GOOD], "label": "good"})
    with pytest.raises(FormatError, match="label must be true or false, not 2"):
        to_labelled({"messages": [*PROMPT, GOOD], "label": 2})
    with pytest.raises(FormatError, match="the record ends with a user turn"):
        to_labelled({"messages": PROMPT, "label": True})
    with pytest.raises(FormatError, match="no known format with the keys"):
        to_labelled({"text": "x", "label": True})
    with pytest.raises(FormatError, match="messages has 1,001 messages; at most 1,000"):
        to_labelled({"messages": [*PROMPT * 1000, GOOD], "label": True})


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": PROMPT * 1001},
        {"conversations": HUMAN * 1001},
        {"instruction": ASKED, "history": [["1", "2"]] * 500},
        {"messages": PROMPT * 1000, "system": "Be kind."},
    ],
)
def test_a_prompt_of_too_many_messages(record: dict[str, Any]) -> None:
    with pytest.raises(FormatError, match=r"has 1,001 messages; at most 1,000"):
        to_prompt(record)
