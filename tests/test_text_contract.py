"""What a record says is what is learned: over real templates, forms of records and containers.

The right text of a turn is written down here for each template, from what is public about it.
"""

import itertools
import json
import pickle
import random
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from chat_templates import KNOWN, chat_of, end_of, folder

from moetrain.data import byte_spans, preference, sft, text_tokenizer, tokenizer
from moetrain.data import chat as chat_module
from moetrain.data.byte_spans import ByteSpans
from moetrain.data.chat import Chat, ChatOptions, Encoded, Marked
from moetrain.data.encode import Encoder, Result, SetKind, Spec
from moetrain.data.formats import to_conversation, unread
from moetrain.data.messages import FormatError
from moetrain.data.prompts import read_prompt
from moetrain.data.sources import Record, find_sources, read_rows
from moetrain.data.text_tokenizer import FAST, Fast
from moetrain.data.turns import end_of_turn, stop_ids

needs_gigatoken = pytest.mark.skipif(
    find_spec(FAST) is None, reason="gigatoken is not installed: its tokens stay uncompared"
)
THOUGHTFUL = {
    "qwen3": "<think>\n{}\n</think>\n\n",
    "qwen3-thinking-2507": "{}\n</think>\n\n",  # the prompt for an answer opens the thought
    "glm-4.5": "\n<think>{}</think>\n",
    "gpt-oss": "<|channel|>analysis<|message|>{}<|end|><|start|>assistant",
}
BEFORE = {"mixtral": " ", "gpt-oss": "<|channel|>final<|message|>"}
# Beginnings that templates, their prompts for an answer or a careless search could take for theirs.
FORMS = "messages sharegpt completion completions alpaca qa query".split()
STARTS = (
    "",
    "<",
    "<th",
    "think",
    "assistant",
    "[",
    "\u7b54",
    "{",
    '"',
    "/",
    "|",
    "0",
    "\U0001f600",
)
WORDS = (
    "one",
    "1.5",
    "caf\u00e9",
    "a\nb",
    "{x}",
    "\\frac12",
    "'s",
    "<b>",
    "\u6570\u5b57",
    "- item",
    "\t",
)


def said(name: str, content: str, thought: str | None = None) -> str:
    """What is learned of a turn that answers."""
    thoughtful = THOUGHTFUL.get(name)
    if thoughtful is None or (not thought and name == "gpt-oss"):
        front = ""
    else:
        front = thoughtful.format(thought or "")
    return front + BEFORE.get(name, "") + content + end_of(name)


def runs(chat: Chat, encoded: Encoded) -> list[str]:
    """The texts of the runs of tokens that are learned."""
    found: list[list[int]] = [[]]
    for token, learned in zip(encoded.tokens, encoded.mask, strict=True):
        if learned:
            found[-1].append(int(token))
        elif found[-1]:
            found.append([])
    return [str(chat.tokenizer.decode(run)) for run in found if run]


def learned(name: str, record: dict[str, Any]) -> list[str]:
    """The learned texts of a record of instruction data, turn by turn."""
    chat = chat_of(name)
    return [
        text
        for encoded in chat.encode(chat.mark(to_conversation(record)))
        for text in runs(chat, encoded)
    ]


def U(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def A(text: str | None, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


@pytest.mark.parametrize("name", KNOWN)
def test_the_end_of_a_turn(name: str) -> None:
    known, chat = KNOWN[name], chat_of(name)
    ids = end_of_turn(chat)
    vocab = chat.tokenizer.get_vocab()
    if known.stops is not None:
        assert ids == ()
        assert vocab[known.stops] in stop_ids(chat, {})
        assert any(known.stops in note for note in chat.notes())
    else:
        assert ids[0] == vocab[end_of(name)]
        assert set(ids) <= set(stop_ids(chat, {"eos_token_id": 0}))
    assert learned(name, {"messages": [U("q"), A("x")]}) == [said(name, "x")]


@pytest.mark.parametrize("name", KNOWN)
@pytest.mark.parametrize("start", STARTS)
def test_an_answer_may_begin_with_anything(name: str, start: str) -> None:
    text = start + "x"
    assert learned(name, {"messages": [U("q"), A(text)]}) == [said(name, text)]


@pytest.mark.parametrize("field", ["reasoning", "thinking", "reasoning_content", "inline"])
@pytest.mark.parametrize("name", KNOWN)
def test_a_thought_under_any_name(name: str, field: str) -> None:
    known, chat = KNOWN[name], chat_of(name)
    turn = A("4", **{field: "two and two"})
    if field == "inline":
        turn = A("<think>\ntwo and two\n</think>\n\n4")
    record = {"messages": [U("q"), turn]}
    marked = chat.mark(to_conversation(record))
    if known.reasoning:
        assert learned(name, record) == [said(name, "4", "two and two")]
    elif field == "inline" and chat.template.reads.inline:
        assert learned(name, record) == [said(name, turn["content"])]
    else:  # no place for it: the answer is learned, and the loss is said
        assert learned(name, record) == [said(name, "4")]
        dropped = [note for m in marked for note in m.notes if "reasoning" in note]
        assert dropped or any("<think>" in note for note in chat.notes())


CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": 't\u00fc "x"'}}}
AS_TEXT = {
    "type": "function",
    "function": {"name": "add", "arguments": json.dumps(CALL["function"]["arguments"])},
}


@pytest.mark.parametrize("content", [None, ""])
@pytest.mark.parametrize("call", [CALL, AS_TEXT, CALL["function"], AS_TEXT["function"]])
@pytest.mark.parametrize("name", [name for name, known in KNOWN.items() if known.calls])
def test_calls_in_either_form(name: str, call: dict[str, Any], content: str | None) -> None:
    tool = {"type": "function", "function": {"name": "add", "description": "d",
            "parameters": {"type": "object", "properties": {}}}}  # fmt: skip
    record = {
        "tools": json.dumps([tool]),
        "messages": [U("q"), A(content, tool_calls=[call])],
    }
    (text,) = learned(name, record)
    value = CALL["function"]["arguments"]["b"]
    ways = (value, json.dumps(value), json.dumps(value, ensure_ascii=False))
    assert "add" in text and any(way in text for way in ways), text
    assert "\\\\" not in text and "'a'" not in text and "None" not in text
    chat = chat_of(name)
    ends = [str(chat.tokenizer.convert_ids_to_tokens(i)) for i in end_of_turn(chat)]
    assert text.endswith(tuple(ends) or "</tool_call>"), text


def records(rng: random.Random, name: str) -> tuple[dict[str, Any], list[str]]:
    """(a record in some form, what is learned of it)."""
    known = KNOWN[name]

    def words() -> str:
        number = rng.randint(1, 5)
        return (
            rng.choice(STARTS) + " ".join(rng.choice(WORDS) for _ in range(number))
        ).strip() + "."

    system = {rng.choice(["system", "system_prompt"]): words()} if known.system else {}
    system = system if rng.random() < 0.4 else {}
    form = rng.choice(FORMS)
    question, answer = words(), words()
    if form == "completion":
        return system | {"prompt": question, "completion": answer}, [said(name, answer)]
    if form == "completions":
        own = {"prompt": [U(question)], "completion": [A(answer)]}
        return system | own, [said(name, answer)]
    if form == "alpaca":
        return system | {"instruction": question, "output": answer}, [said(name, answer)]
    if form == "qa":
        return system | {"question": question, "answer": answer}, [said(name, answer)]
    if form == "query":
        return system | {"query": question, "response": answer}, [said(name, answer)]
    turns: list[dict[str, Any]] = []
    right: list[str] = []
    for number in range(rng.randint(1, 3)):
        question, answer = words(), words()
        off = rng.random() < 0.25 and number > 0
        thought = words() if known.reasoning and rng.random() < 0.5 else None
        more: dict[str, Any] = {"weight": 0} if off else {}
        if thought:
            more[rng.choice(["reasoning", "thinking", "reasoning_content"])] = thought
        turns += [U(question), A(answer, **more)]
        if not off:
            right.append(said(name, answer, thought))
    if form == "messages":
        return system | {"messages": turns}, right
    names = {"user": "human", "assistant": "gpt"}
    shared = [
        {"from": names[t["role"]], "value": t["content"]}
        | {k: v for k, v in t.items() if k not in ("role", "content")}
        for t in turns
    ]
    return system | {"conversations": shared}, right


def encoded(name: str, path: Path, kind: SetKind = sft.CHAT) -> list[Result]:
    spec = Spec((str(path),), folder(name), 4096, "reject", 1, chat=ChatOptions())
    encoder = Encoder(kind, spec)
    encoder.__dict__["chat"] = chat_of(name)  # a tokenizer loaded once for all of these tests
    return encoder([row for source in find_sources([path]) for row in read_rows(source)])


def as_jsonl(rows: list[dict[str, Any]], path: Path) -> Path:
    file = path / "a.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def filled(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with all columns: a table is made of the first row's alone."""
    names = dict.fromkeys(name for row in rows for name in row)
    return [{name: row.get(name) for name in names} for row in rows]


def as_parquet(rows: list[dict[str, Any]], path: Path) -> Path:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(filled(rows)), path / "a.parquet")
    return path / "a.parquet"


def as_folder(rows: list[dict[str, Any]], path: Path) -> Path:
    import datasets

    datasets.Dataset.from_list(filled(rows)).save_to_disk(str(path / "saved"))
    return path / "saved"


CONTAINERS: tuple[Callable[[list[dict[str, Any]], Path], Path], ...] = (
    as_jsonl,
    as_parquet,
    as_folder,
)
PER_TEMPLATE = -(-2000 // len(KNOWN))


@pytest.mark.parametrize("name", KNOWN)
def test_generated_records_in_every_container(name: str, tmp_path: Path) -> None:
    """2,000 records over all templates; each once as JSONL, in parquet and in a saved data set."""
    rng = random.Random(name)
    drawn = [records(rng, name) for _ in range(PER_TEMPLATE)]
    rows = [record for record, _ in drawn]
    for number, write in enumerate(CONTAINERS):
        place = tmp_path / str(number)
        place.mkdir()
        # A table has one type a column: records of one form at a time.
        results: list[Result] = []
        order: list[int] = []
        for form in ("messages", "conversations", "prompt", "instruction", "question", "query"):
            for listed in (True, False):
                own = [
                    i
                    for i, row in enumerate(rows)
                    if form in row and isinstance(row[form], list) is listed
                ]
                if own:
                    here = place / f"{form}-{listed}"
                    here.mkdir()
                    results += encoded(name, write([rows[i] for i in own], here))
                    order += own
        assert sorted(order) == list(range(len(rows)))
        for i, result in zip(order, results, strict=True):
            assert result.reason is None, (rows[i], result.reason)
            chat = chat_of(name)
            found = [t for g in result.groups for s in g.sequences for t in runs(chat, s)]
            assert found == drawn[i][1], rows[i]


PER_KIND = 12  # records of each kind, for each template
Drawn = tuple[dict[str, Any], Any]  # a record, and what is right of it


def draws(seed: str) -> tuple[random.Random, Callable[[], str]]:
    rng = random.Random(seed)
    return rng, lambda: rng.choice(STARTS) + rng.choice(WORDS).strip() + f"{rng.randrange(99)}."


def offered(rng: random.Random, word: Callable[[], str]) -> tuple[list[Any], list[Any]]:
    """(tools, calls of the first of them): both differ in their keys, which tables fill up."""
    kinds: dict[str, Callable[[], Any]] = {
        "text": word,
        "count": lambda: rng.randrange(99),
        "share": lambda: rng.randrange(8) / 8,
        "sure": lambda: rng.random() < 0.5,
        "many": lambda: [word(), word()],
        "deep": lambda: {rng.choice("ab"): word()},
    }
    tools, calls = [], []
    for number in range(rng.randint(1, 2)):
        own = rng.sample(sorted(kinds), rng.randint(1, 3))
        properties = {
            key: {"type": "string"} | ({"description": word()} if rng.random() < 0.5 else {})
            for key in own
        }
        parameters = {"type": "object", "properties": properties, "required": own[:1]}
        function = {"name": f"f{number}", "description": word(), "parameters": parameters}
        tools.append({"type": "function", "function": function})
        call = {"name": f"f{number}", "arguments": {key: kinds[key]() for key in own}}
        calls.append({"type": "function", "function": call})
    return tools, calls[:1]


def called(name: str, rng: random.Random, word: Callable[[], str]) -> Drawn:
    """A record with tools: calls, their results, and an answer after them; with thoughts where the
    template has a place. Right: what each call has to say, the results, the answer.
    """

    def thought() -> dict[str, str]:
        return {"thinking": word()} if KNOWN[name].reasoning and rng.random() < 0.5 else {}

    tools, calls = offered(rng, word)
    turns, said_of, results = [U(word())], [], []
    # DeepSeek-V3's template marks the first calls of a conversation alone: more are rejected.
    for _ in range(1 if name == "deepseek-v3" else rng.randint(1, 2)):
        own, results = thought(), [*results, f"found {word()}"]
        turns.append(A(None if rng.random() < 0.5 else "", tool_calls=calls, **own))
        turns.append({"role": "tool", "content": results[-1], "name": "f0"})
        values = ["f0", *own.values()]
        for value in calls[0]["function"]["arguments"].values():
            values += value if isinstance(value, list) else [value]
        said_of.append(values)
    answer, own = word(), thought()
    turns.append(A(answer, **own))
    right = said(name, answer, own.get("thinking"))
    return {"messages": turns, "tools": tools}, (said_of, results, right)


def stands(value: Any, text: str) -> bool:
    """Whether a value of a call is in a text, as itself or in JSON."""
    value = next(iter(value.values())) if isinstance(value, dict) else value
    ways = [json.dumps(value), json.dumps(value, ensure_ascii=False)]
    return any(way in text for way in ([*ways, value] if isinstance(value, str) else ways))


def paired(name: str, rng: random.Random, word: Callable[[], str]) -> Drawn:
    """Two answers in one of the forms of pairs, with a thought where the template has a place."""
    asked, better, worse = word(), f"{word()} yes", f"{word()} no"
    thoughts = [word() if KNOWN[name].reasoning and rng.random() < 0.5 else None for _ in range(2)]
    field = rng.choice(["reasoning", "thinking", "reasoning_content"])
    chosen, rejected = (
        A(text, **({field: thought} if thought else {}))
        for text, thought in zip((better, worse), thoughts, strict=True)
    )
    right = [said(name, better, thoughts[0]), said(name, worse, thoughts[1])]
    more: dict[str, Any] = {"margin": rng.randrange(9) / 8} if rng.random() < 0.5 else {}
    if KNOWN[name].system and rng.random() < 0.5:
        more["system"] = word()
    record = more | rng.choice(
        [
            {"prompt": [U(asked)], "chosen": [chosen], "rejected": [rejected]},
            {"chosen": [U(asked), chosen], "rejected": [U(asked), rejected]},
            {"messages": [U(asked), chosen], "rejected_messages": [U(asked), rejected]},
            {"conversations": [{"from": "human", "value": asked}],
             "chosen": chosen, "rejected": rejected},
        ]
    )  # fmt: skip
    return record, (more.get("system"), right)


def asked_for(name: str, rng: random.Random, word: Callable[[], str]) -> Drawn:
    """A prompt of RL and of benchmarks with its columns, and the messages that it is."""
    question, system = word(), []
    more: dict[str, Any] = {}
    if KNOWN[name].system and rng.random() < 0.5:
        more = {"system": word()}
        system = [{"role": "system", "content": more["system"]}]
    if KNOWN[name].calls and rng.random() < 0.5:
        more["tools"] = offered(rng, word)[0]
    if rng.random() < 0.5:
        more["chat_template_kwargs"] = {"enable_thinking": rng.random() < 0.5}
    more |= {rng.choice(["answer", "solution"]): word()}
    form = rng.choice(["question", "problem", "prompt", "messages", "conversations"])
    turns = [U(question)]
    if form in ("question", "problem"):
        return more | {form: question}, system + turns
    if rng.random() < 0.5:
        turns = [U(word()), A(word()), U(question)]
    names = {"user": "human", "assistant": "gpt"}
    shared = [{"from": names[t["role"]], "value": t["content"]} for t in turns]
    return more | {form: shared if form == "conversations" else turns}, system + turns


def in_containers(rows: list[dict[str, Any]], place: Path) -> Iterator[tuple[list[int], Path]]:
    """(numbers of rows, where they lie) in every container; rows of the same columns that share
    one type together, as a table has to have them.
    """
    kinds: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        typed = next(((k, type(row[k])) for k in ("messages", "prompt", "conversations", "chosen")
                      if k in row), None)  # fmt: skip
        kinds.setdefault(str(typed), []).append(i)
    for number, (own, write) in enumerate(itertools.product(kinds.values(), CONTAINERS)):
        (here := place / str(number)).mkdir()
        yield own, write([rows[i] for i in own], here)


@pytest.mark.parametrize("name", [name for name, known in KNOWN.items() if known.calls])
def test_generated_calls_in_every_container(name: str, tmp_path: Path) -> None:
    """Tools and calls with other keys in every record: nothing of them is lost or made up."""
    rng, word = draws(f"calls {name}")
    drawn = [called(name, rng, word) for _ in range(PER_KIND)]
    chat, first = chat_of(name), {}
    for own, path in in_containers([record for record, _ in drawn], tmp_path):
        for i, result in zip(own, encoded(name, path), strict=True):
            record, (said_of, results, answer) = drawn[i]
            assert result.reason is None, (record, result.reason)
            sequences = [s for group in result.groups for s in group.sequences]
            *texts, last = [text for s in sequences for text in runs(chat, s)]
            assert last == answer, record
            for call, values in zip(texts, said_of, strict=True):
                assert all(stands(value, call) for value in values), (record, call)
                assert not [found for found in results if found in call], call
                assert "null" not in call and "None" not in call, call
            whole = [str(chat.tokenizer.decode(s.tokens)) for s in sequences]
            unsaid = [note for note in result.notes if "tools on offer" in note]
            if KNOWN[name].tools:
                tools = [tool["function"]["name"] for tool in record["tools"]]
                assert not unsaid and all(tool in whole[-1] for tool in tools), record
            else:
                assert unsaid
            assert "null" not in whole[-1] and "None" not in whole[-1], whole[-1]
            # Keys stand in the table's order, and their values with them.
            assert first.setdefault(i, sorted("".join(whole))) == sorted("".join(whole)), path


@pytest.mark.parametrize("name", KNOWN)
def test_generated_pairs_in_every_container(name: str, tmp_path: Path) -> None:
    rng, word = draws(f"pairs {name}")
    drawn = [paired(name, rng, word) for _ in range(PER_KIND)]
    chat = chat_of(name)
    for own, path in in_containers([record for record, _ in drawn], tmp_path):
        for i, result in zip(own, encoded(name, path, preference.PAIRS), strict=True):
            record, (system, right) = drawn[i]
            assert result.reason is None, (record, result.reason)
            (group,) = result.groups
            assert [t for s in group.sequences for t in runs(chat, s)] == right, record
            assert system is None or system in str(chat.tokenizer.decode(group.sequences[1].tokens))
            margins = (group.extras or {}).get("margin", (0.0,))
            assert margins[0] == record.get("margin", 0.0), record


@pytest.mark.parametrize("name", KNOWN)
def test_generated_prompts_in_every_container(name: str, tmp_path: Path) -> None:
    """What is asked is what transformers renders of the messages; the rewards' columns, and with
    them a prompt's name, are the same from every container.
    """
    rng, word = draws(f"prompts {name}")
    drawn = [asked_for(name, rng, word) for _ in range(PER_KIND)]
    chat, first = chat_of(name), {}
    for own, path in in_containers([record for record, _ in drawn], tmp_path):
        rows = [row for source in find_sources([path]) for row in read_rows(source)]
        for i, row in zip(own, rows, strict=True):
            record, messages = drawn[i]
            assert isinstance(row, Record)
            prompt, _ = read_prompt(row.value, chat)
            wanted = chat.tokenizer.apply_chat_template(
                messages,
                tools=record.get("tools"),
                add_generation_prompt=True,
                tokenize=False,
                **record.get("chat_template_kwargs", {}),
            )
            text = str(chat.tokenizer.decode(list(prompt.tokens)))
            assert text == wanted or (record.get("tools") and sorted(text) == sorted(wanted))
            seen = prompt.id, prompt.columns, prompt.opened, sorted(text)
            assert first.setdefault(i, seen) == seen, path
            kept = {key: value for key, value in record.items() if key in ("answer", "solution")}
            assert kept.items() <= prompt.columns.items()


@pytest.mark.parametrize("name", KNOWN)
def test_pairs_and_labels_learn_the_same_text(name: str, tmp_path: Path) -> None:
    system = {"system": "Be brief."} if KNOWN[name].system else {}
    pair = system | {"prompt": "q?", "chosen": "<yes", "rejected": "[no"}
    (result,) = encoded(name, as_jsonl([pair], tmp_path), preference.PAIRS)
    assert result.reason is None
    (group,) = result.groups
    chat = chat_of(name)
    texts = [runs(chat, sequence) for sequence in group.sequences]
    assert texts == [[said(name, "<yes")], [said(name, "[no")]]
    if system:
        assert "Be brief." in str(chat.tokenizer.decode(group.sequences[0].tokens))
    labelled = system | {"prompt": "q?", "completion": "<yes", "label": True}
    (result,) = encoded(name, as_jsonl([labelled], tmp_path), preference.LABELS)
    assert [runs(chat, s) for g in result.groups for s in g.sequences] == [[said(name, "<yes")]]


def refused(record: dict[str, Any], name: str = "qwen3") -> str:
    with pytest.raises(FormatError) as caught:
        chat = chat_of(name)
        chat.mark(chat.controls.guarded(to_conversation(record))[0])
    return str(caught.value)


def test_text_that_is_templated_already() -> None:
    record = {
        "prompt": "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
        "completion": "x",
    }
    assert '"templated": true' in refused(record)
    assert "[INST]" in refused({"prompt": "[INST] hi [/INST]", "completion": "x"}, "mixtral")
    whole = record | {"completion": "x<|im_end|>", "templated": True}
    assert learned("qwen3", whole) == ["x<|im_end|>"]
    (marked,) = chat_of("qwen3").mark(to_conversation(whole))
    assert marked.text == record["prompt"] + "x<|im_end|>"


def test_what_a_template_changes_is_refused() -> None:
    assert "turn 1" in refused({"messages": [U("q"), A("a </think> b")]})
    assert "contradict" in refused({"messages": [U("q"), A("a", weight=1, loss=False)]})
    assert "nothing between" in refused({"messages": [U("q"), A("a", weight=0.5)]})
    assert "different things" in refused(
        {"messages": [U("q"), A("a", thinking="b", reasoning="c")]}
    )
    asked = [U("q"), A("a")]
    both = {"system": "a", "messages": [{"role": "system", "content": "b"}, *asked]}
    assert "keep one" in refused(both)
    reserved = {"messages": asked, "chat_template_kwargs": {"messages": 1}}
    assert "must not name" in refused(reserved)
    assert "wire" not in learned(
        "qwen3", {"messages": [U("q"), A("a")], "chat_template_kwargs": "{}"}
    )


def test_loss_scale_and_weights_switch_turns_off() -> None:
    for switch in ({"weight": 0}, {"loss": False}, {"loss_scale": 0.0}, {"train": False}):
        record = {"messages": [U("q"), A("one", **switch), U("r"), A("two")]}
        assert learned("qwen2.5", record) == [said("qwen2.5", "two")]
        turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "one", **switch},
                 {"from": "human", "value": "r"}, {"from": "gpt", "value": "two"}]  # fmt: skip
        assert learned("qwen2.5", {"conversations": turns}) == [said("qwen2.5", "two")]


def test_calls_that_are_turns_of_their_own() -> None:
    """ms-swift's and LLaMA-Factory's way to store a call."""
    swift = {"messages": [U("q"), {"role": "tool_call", "content": json.dumps(CALL["function"])},
                          {"role": "tool_response", "content": "3"}, A("It is 3.")]}  # fmt: skip
    factory = {"conversations": [{"from": "human", "value": "q"},
                                 {"from": "function_call", "value": json.dumps(CALL["function"])},
                                 {"from": "observation", "value": "3"},
                                 {"from": "gpt", "value": "It is 3."}]}  # fmt: skip
    wire = {"messages": [U("q"), A(None, tool_calls=[CALL]), {"role": "tool", "content": "3"},
                         A("It is 3.")]}  # fmt: skip
    texts = [learned("qwen2.5", record) for record in (swift, factory, wire)]
    assert texts[0] == texts[1] == texts[2] and len(texts[0]) == 2


def test_a_call_without_arguments() -> None:
    texts = [
        learned("qwen2.5", {"messages": [U("q"), A(None, tool_calls=[{"function": function}])]})
        for function in ({"name": "f", "arguments": given} for given in ("", None, "{}", {}))
    ]
    assert texts[1:] == texts[:-1] and '"arguments": {}' in texts[0][0]


def test_a_call_as_openai_wrote_it_before_tool_calls() -> None:
    call = A(None, function_call=CALL["function"])
    assert learned("qwen2.5", {"messages": [U("q"), call]}) == learned(
        "qwen2.5", {"messages": [U("q"), A(None, tool_calls=[CALL])]}
    )


def test_fields_of_a_message_that_are_not_read_are_named() -> None:
    odd = {"thoughts": "hm", "images": ["a.png"], "refusal": "no", "id": 3, "extra": None}
    odd |= {"mask": 1, "learned": False}
    record = {"messages": [U("q"), A("a", **odd)]}
    fields = [note.split()[2] for note in unread(record, ("messages",))]
    assert fields == ["images", "learned", "mask", "refusal", "thoughts"]
    _, notes = read_prompt({"prompt": [U("q") | {"images": ["a"]}], "image": "b"}, chat_of("qwen3"))
    assert [note.split()[2] for note in notes if "not read" in note] == ["image", "images"]
    rendered = {"templated": True, "prompt": "<|im_start|>user", "completion": "a", "system": "S"}
    assert list(unread(rendered, ("prompt", "completion"))) == ["the column system is not read"]


def test_a_system_message_of_the_recipe() -> None:
    chat = Chat(chat_of("qwen3").tokenizer, system="Be brief.")
    (marked,) = chat.mark(to_conversation({"messages": [U("q"), A("a")]}))
    assert marked.text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n")
    assert chat.prompt([U("q")]).startswith("<|im_start|>system\nBe brief.<|im_end|>\n")
    (own,) = chat.mark(to_conversation({"system": "Be long.", "messages": [U("q"), A("a")]}))
    assert "Be brief." not in own.text and "Be long." in own.text


@pytest.mark.parametrize("name", [name for name, known in KNOWN.items() if known.system])
def test_a_developer_s_message_is_a_system_message(name: str) -> None:
    """For templates that know no such role, Qwen3's among them, which leave it out."""
    told = [{"role": "developer", "content": "Be brief."}, U("q")]
    chat = chat_of(name)
    (marked,) = chat.mark(to_conversation({"messages": [*told, A("a")]}))
    assert "Be brief." in marked.text and not [n for n in marked.notes if "system" in n]
    assert "Be brief." in chat.prompt(told)
    assert "enable_thinking" in str(unread({"enable_thinking": False}, ()))


def test_a_thought_that_never_ends_is_told() -> None:
    cut = {"messages": [U("q"), A("<think>\nand so")]}
    (marked,) = chat_of("qwen2.5").mark(to_conversation(cut))
    assert "a trained turn begins a thought and never ends it" in marked.notes
    whole = {"messages": [U("q"), A("<think>\nand so\n</think>\n\n4")]}
    (marked,) = chat_of("qwen2.5").mark(to_conversation(whole))
    assert not [note for note in marked.notes if "never ends" in note]


def test_empty_thoughts_can_be_left_out() -> None:
    record = {"messages": [U("q"), A("a")]}
    chat = Chat(chat_of("qwen3").tokenizer, empty_thoughts=False)
    assert [m.learned for m in chat.mark(to_conversation(record))] == [("a<|im_end|>",)]
    (marked,) = chat_of("qwen3").mark(to_conversation(record))
    assert any("empty thought" in note for note in marked.notes)
    off = Chat(chat_of("qwen3").tokenizer, kwargs={"enable_thinking": False})
    assert [m.learned for m in off.mark(to_conversation(record))] == [("a<|im_end|>",)]
    assert off.prompt([U("q")]).endswith("<think>\n\n</think>\n\n")


def test_what_is_dropped_by_design_is_noted() -> None:
    chat = chat_of("r1-distill")
    record = {"messages": [U("q"), A("<think>\nlong\n</think>\n\n4")]}
    assert any("strips" in note for note in chat.notes())
    (marked,) = chat.mark(to_conversation(record))
    assert any("ends with '<think>\\n'" in note for note in marked.notes)
    with_tools = {"tools": [{"type": "function", "function": {"name": "add"}}], **record}
    (marked,) = chat.mark(to_conversation(with_tools))
    assert any("tools on offer" in note for note in marked.notes)


def test_tools_of_any_shape_end_no_run() -> None:
    for function in ("integer", 3, None, ["add"], {"name": 3}):
        record = {
            "messages": [U("q"), A("a")],
            "tools": [{"type": "function", "function": function}],
        }
        try:
            assert learned("qwen3", record) == [said("qwen3", "a")]
        except FormatError:
            pass  # a template may refuse it


@needs_gigatoken
@pytest.mark.parametrize("name", KNOWN)
def test_the_quick_way_learns_the_same_tokens(name: str) -> None:
    """gigatoken gives no places: they follow from the bytes of the tokens."""
    rng = random.Random(11)
    chat = Chat(tokenizer.load(folder(name)), special_tokens="escape")
    marked: list[Marked] = []
    while len(marked) < 40:
        conversation = to_conversation(records(rng, name)[0])
        turn = next(m for m in conversation.messages if m["role"] == "assistant")
        if len(marked) % 4 == 0 and turn["content"]:
            turn["content"] += f" {KNOWN[name].eos} \U0001f469\u200d\U0001f4bb\u4f60e\u0301"
        guarded, _ = chat.controls.guarded(conversation)
        marked += chat.mark(guarded)
    assert any(m.cuts for m in marked)
    slow = chat.encode(marked)
    chat._spans, chat._num_chars = ByteSpans(Fast(text_tokenizer.of(chat.tokenizer))), 1 << 30
    for text, a, b in zip(marked, slow, chat.encode(marked), strict=True):
        assert a.tokens.tolist() == b.tokens.tolist(), text
        assert a.mask.tolist() == b.mask.tolist(), text
        assert (a.tokens.dtype, a.mask.dtype) == (b.tokens.dtype, b.mask.dtype)


@needs_gigatoken
def test_the_quick_way_is_taken_where_places_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    from tokenizers import processors

    made: Any = tokenizer.load(folder("qwen3"))
    chat = Chat(made)
    own = chat.mark(to_conversation({"messages": [U("q"), A(" x\u4f60")]}))
    monkeypatch.setattr(chat_module, "MANY", 2)
    assert chat.encode(own)[0].tokens.tolist() == chat._slowly(own)[0].tokens.tolist()
    assert chat._spans is not None
    sent = pickle.loads(pickle.dumps(chat))  # as worker processes get it
    monkeypatch.setattr(Chat, "_slowly", None)
    assert sent.encode(own)[0].tokens.tolist() == chat.encode(own)[0].tokens.tolist()
    trimming = tokenizer.load(folder("qwen3"))  # GPT-2's: a blank before a word is not its place
    trimming.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    assert byte_spans.of(trimming) is None
    # Bytes that are not the text's: none are guessed.
    assert chat._spans.ends("ab", chat._spans.ids(["abc"])[0]) is None
