"""Only what the assistant said is learned, whatever the template; transformers is the oracle."""

from typing import Any

import pytest
from data_helpers import tokenizer_folder

from moetrain.data import tokenizer
from moetrain.data.chat import Chat, Encoded
from moetrain.data.formats import Conversation, FormatError, to_conversation
from moetrain.errors import DataError

PLAIN = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As Qwen3 does: thoughts are kept after the last question only, and an answer there has them.
THINKING = (
    "{% set ns = namespace(last=0) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}"
    "{% endfor %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.index0 > ns.last %}"
    "<think>\n{{ m.reasoning_content or '' }}\n</think>\n\n"
    "{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED_THINKING = (
    "{% set ns = namespace(last=0) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}"
    "{% endfor %}"
    "{% for m in messages %}{% set late = loop.index0 > ns.last %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}{% generation %}"
    "{% if late %}<think>\n{{ m.reasoning_content or '' }}\n</think>\n\n{% endif %}"
    "{{ m.content }}<|im_end|>{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TWO: dict[str, Any] = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What is 7 plus 5?"},
        {"role": "assistant", "content": "12", "reasoning_content": "seven and five"},
        {"role": "user", "content": "And 1 plus 1?"},
        {"role": "assistant", "content": "2", "reasoning_content": "one and one"},
    ]
}


def chat(template: str | None = None) -> Chat:
    return Chat(tokenizer.load(tokenizer_folder()), template)


def learned(maker: Chat, encoded: Encoded) -> list[str]:
    """The texts of the runs of tokens that are learned."""
    runs: list[list[int]] = [[]]
    for token, wanted in zip(encoded.tokens, encoded.mask, strict=True):
        if wanted:
            runs[-1].append(int(token))
        elif runs[-1]:
            runs.append([])
    return [str(maker.tokenizer.decode(run)) for run in runs if run]


def encode(maker: Chat, record: dict[str, Any]) -> list[list[str]]:
    return [learned(maker, e) for e in maker.encode(maker.mark(to_conversation(record)))]


def without_thoughts(record: dict[str, Any]) -> dict[str, Any]:
    return {
        "messages": [
            {k: v for k, v in m.items() if k != "reasoning_content"} for m in record["messages"]
        ]
    }


def test_marks_equal_transformers() -> None:
    maker = chat()
    assert maker.template.has_marks
    for record in (TWO, without_thoughts(TWO)):
        oracle: Any = maker.tokenizer.apply_chat_template(
            record["messages"], return_dict=True, return_assistant_tokens_mask=True
        )
        (ours,) = maker.encode(maker.mark(to_conversation(record)))
        assert ours.tokens.tolist() == oracle["input_ids"]
        assert ours.mask.tolist() == [bool(m) for m in oracle["assistant_masks"]]
    assert learned(maker, ours) == ["12<|im_end|>", "2<|im_end|>"]


def test_prefixes_find_what_marks_would() -> None:
    plain, marked = chat(PLAIN), chat()
    assert not plain.template.has_marks
    record = without_thoughts(TWO)
    (a,) = plain.encode(plain.mark(to_conversation(record)))
    (b,) = marked.encode(marked.mark(to_conversation(record)))
    assert a.tokens.tolist() == b.tokens.tolist()
    assert a.mask.tolist() == b.mask.tolist()


@pytest.mark.parametrize("template", [THINKING, MARKED_THINKING])
def test_a_template_that_rewrites_earlier_turns_is_split(template: str) -> None:
    maker = chat(template)
    assert maker.template.has_marks == (template is MARKED_THINKING)
    found = maker.mark(to_conversation(TWO))
    assert encode(maker, TWO) == [
        ["<think>\nseven and five\n</think>\n\n12<|im_end|>"],
        ["<think>\none and one\n</think>\n\n2<|im_end|>"],
    ]
    # Each text is what the model saw: the second has the first answer without its thoughts.
    for text, turns in zip(found, (3, 5), strict=True):
        assert text.text == maker.tokenizer.apply_chat_template(
            TWO["messages"][:turns], chat_template=THINKING, tokenize=False
        )
    assert "seven and five" not in found[1].text


def test_tool_rounds_after_one_question_stay_together() -> None:
    maker = chat(THINKING)
    record = {
        "messages": [
            {"role": "user", "content": "Add 1 and 1."},
            {"role": "assistant", "content": "call", "reasoning_content": "a tool"},
            {"role": "tool", "content": "2"},
            {"role": "assistant", "content": "2", "reasoning_content": "done"},
        ]
    }
    assert encode(maker, record) == [
        ["<think>\na tool\n</think>\n\ncall<|im_end|>", "<think>\ndone\n</think>\n\n2<|im_end|>"]
    ]


def test_a_turn_that_is_switched_off_is_context() -> None:
    record = {
        "messages": [{**m, "weight": 0} if i == 2 else m for i, m in enumerate(TWO["messages"])]
    }
    assert encode(chat(PLAIN), record) == [["2<|im_end|>"]]
    assert encode(chat(THINKING), record) == [["<think>\none and one\n</think>\n\n2<|im_end|>"]]
    assert len(encode(chat(), record)) == 1


def test_what_follows_the_last_answer_is_dropped() -> None:
    record = {"messages": [*TWO["messages"], {"role": "user", "content": "Thanks!"}]}
    maker = chat(PLAIN)
    (marked,) = maker.mark(to_conversation(record))
    assert marked.text.endswith("2<|im_end|>\n")


def test_every_assistant_token_is_learned_once_over_the_split() -> None:
    long = {"messages": TWO["messages"] + TWO["messages"][1:] + TWO["messages"][3:]}
    assert sum(len(runs) for runs in encode(chat(THINKING), long)) == 5


def test_a_template_that_refuses_gives_its_reason() -> None:
    maker = chat("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(FormatError, match="roles must alternate"):
        maker.mark(to_conversation(TWO))


def test_a_template_may_be_a_file(tmp_path: Any) -> None:
    (tmp_path / "t.jinja").write_text(PLAIN)
    assert chat(str(tmp_path / "t.jinja")).template.text == PLAIN
    with pytest.raises(DataError, match="neither a template nor a readable file"):
        chat(str(tmp_path / "none.jinja"))


def test_a_conversation_that_begins_with_the_assistant() -> None:
    conversation = Conversation([{"role": "assistant", "content": "Hello"}], [True])
    for template in (None, PLAIN):
        maker = chat(template)
        (encoded,) = maker.encode(maker.mark(conversation))
        assert learned(maker, encoded) == ["Hello<|im_end|>"]
