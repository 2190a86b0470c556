"""The same records out of whatever they are kept in, and one bad record costs itself alone."""

import datetime as dt
import decimal
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_helpers import chat, recipe, tokenizer_folder, write_jsonl

from moetrain.config.bench import BenchConfig
from moetrain.config.builtin import MODELS
from moetrain.data import indexing, preference, sft
from moetrain.data.chat import ChatOptions
from moetrain.data.encode import Encoder, Spec
from moetrain.data.formats import to_conversation
from moetrain.data.loader import RunData
from moetrain.data.pair_formats import to_pair
from moetrain.data.parsing import MAX_DEPTH
from moetrain.data.prompts import PromptOrder, describe_repeats, read_prompts
from moetrain.data.rejects import Reject
from moetrain.data.sources import Record, find_sources, read_rows
from moetrain.data.tokenizer_training import train as train_tokenizer
from moetrain.errors import DataError
from moetrain.evals.questions import read_questions
from moetrain.loops.score import read_sequences

Fields = dict[str, Any]
USER = {"role": "user", "content": "q"}
ANSWER = {"role": "assistant", "content": "a"}


def read(*inputs: Path) -> list[Any]:
    """Records, and the reasons of those that are none."""
    found = [row for source in find_sources(inputs) for row in read_rows(source)]
    return [row.value if isinstance(row, Record) else row.reason for row in found]


def kept_in_all(folder: Path, records: Sequence[Fields]) -> dict[str, Path]:
    """The records as JSONL, as a parquet file of Arrow's own, and as `datasets` stores them when it
    is given them and when it reads the JSONL.
    """
    import datasets

    datasets.disable_progress_bars()
    jsonl = write_jsonl(folder / "a.jsonl", records)
    names = {name for record in records for name in record}
    full = [{name: record.get(name) for name in names} for record in records]
    pq.write_table(pa.Table.from_pylist(full), folder / "own.parquet")
    given = datasets.Dataset.from_list(full)
    given.save_to_disk(str(folder / "given"))
    given.to_parquet(str(folder / "given.parquet"))
    cache = str(folder / "cache")
    loaded: Any = datasets.load_dataset(
        "json", data_files=str(jsonl), split="train", cache_dir=cache
    )
    loaded.save_to_disk(str(folder / "loaded"))
    loaded.to_parquet(str(folder / "loaded.parquet"))
    made = ("own.parquet", "given", "given.parquet", "loaded", "loaded.parquet")
    return {"a.jsonl": jsonl} | {name: folder / name for name in made}


def call(name: str, **arguments: Any) -> Fields:
    function = {"name": name, "arguments": arguments}
    return {"role": "assistant", "content": None, "tool_calls": [{"function": function}]}


def tool(name: str, **properties: Any) -> Fields:
    parameters = {"type": "object", "properties": properties}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


UNEVEN: list[Fields] = [
    {
        "messages": [
            {"role": "user", "content": "What is the weather?"},
            call("weather", city="Ulm", days=2),
            {"role": "tool", "content": "rain", "name": "weather"},
            {"role": "assistant", "content": "It rains.", "reasoning_content": "So it says."},
        ],
        "tools": [
            tool("weather", city={"type": "string"}, days={"type": "integer", "default": None}),
            tool("clock", zone={"type": "string", "enum": ["UTC", None]}),
        ],
        "chat_template_kwargs": {"enable_thinking": False},
        "answer": "rain",
    },
    {
        "messages": [
            {"role": "user", "content": "And the time?"},
            call("clock", zone="UTC"),
            {"role": "tool", "content": "noon", "tool_call_id": "1"},
            {"role": "assistant", "content": "It is noon."},
        ],
        "tools": [tool("clock", zone={"type": "string"})],
        "solution": "noon",
    },
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]},
]


def test_every_container_gives_the_records_that_were_put_in(tmp_path: Path) -> None:
    """Absent keys stay absent at every depth: in messages, calls, schemas, kwargs and columns; the
    null content of a call, a null among values, and `"default": null` are the record's own.
    """
    for name, path in kept_in_all(tmp_path, UNEVEN).items():
        assert read(path) == UNEVEN, name


def test_every_container_gives_the_same_tokens(tmp_path: Path) -> None:
    """With a template that shows whatever it is given, calls and schemas included."""
    template = (
        "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}{% for m in messages %}"
        "<|im_start|>{{ m.role }}{{ m.content }}{% for c in m.tool_calls or [] %}"
        "{{ c.function.name }}{{ c.function.arguments | tojson }}{% endfor %}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant{% endif %}"
    )
    tokens: dict[str, list[list[int]]] = {}
    for name, path in kept_in_all(tmp_path, UNEVEN).items():
        spec = Spec((str(path),), tokenizer_folder(), 4096, "reject", 1, chat=ChatOptions(template))
        rows = [row for source in find_sources([path]) for row in read_rows(source)]
        results = Encoder(sft.CHAT, spec)(rows)
        assert not [result.reason for result in results if result.reason], name
        tokens[name] = [s.tokens.tolist() for r in results for g in r.groups for s in g.sequences]
    assert all(found == tokens["a.jsonl"] for found in tokens.values())


def test_messages_as_texts_of_json_are_read(tmp_path: Path) -> None:
    """What `datasets` 4.8 writes as JSONL when the keys of messages differ."""
    import datasets

    datasets.disable_progress_bars()
    path, cache = write_jsonl(tmp_path / "a.jsonl", UNEVEN), str(tmp_path / "cache")
    loaded: Any = datasets.load_dataset(
        "json", data_files=str(path), split="train", cache_dir=cache
    )
    loaded.to_json(str(tmp_path / "b.jsonl"))
    first = json.loads((tmp_path / "b.jsonl").read_text().splitlines()[0])
    assert isinstance(first["messages"][0], str), "datasets no longer does this"
    assert [record["messages"] for record in read(tmp_path / "b.jsonl")] == [
        record["messages"] for record in UNEVEN
    ]
    pair = {"prompt": "hi", "chosen": UNEVEN[2]["messages"], "rejected": "no"}
    texts = pair | {"chosen": json.dumps(pair["chosen"])}
    assert read(write_jsonl(tmp_path / "c.jsonl", [texts])) == [pair]
    plain = {"prompt": '["a", "b"]', "completion": '{"role": "user"}', "messages": "[no JSON"}
    assert read(write_jsonl(tmp_path / "d.jsonl", [plain])) == [plain]


def _tool(name: str, **more: Any) -> Fields:
    own = {"type": "object", "properties": {name: {"type": "integer"}}}
    return {"type": "function", "function": {"name": name, "parameters": own, **more}}


MIXED: dict[str, list[Fields]] = {
    "parts beside texts": [
        {"messages": [USER | {"content": [{"type": "text", "text": "q"}]}, ANSWER]},
        {"messages": [USER, ANSWER]},
        {"messages": [USER | {"content": "1"}, ANSWER | {"content": "[2]"}]},
    ],
    "texts beside messages": [
        {"prompt": "q", "completion": "a"},
        {"prompt": [USER], "completion": [ANSWER]},
    ],
    "tools": [
        {"messages": [USER, ANSWER], "tools": [_tool("one")]},
        {"messages": [USER, ANSWER], "tools": [_tool("two", strict=True)]},
    ],
    "texts of JSON of its own": [
        {"messages": [USER, ANSWER | {"content": '"a"'}]},
        {"messages": [USER, ANSWER | {"content": "[1]"}]},
        {"messages": [USER, ANSWER]},
    ],
}


def rewritten(folder: Path, records: Sequence[Fields], **form: Any) -> Path:
    """The records as `load_dataset` reads and `to_json` writes them."""
    import datasets

    datasets.disable_progress_bars()
    path = write_jsonl(folder / "a.jsonl", records)
    cache = str(folder / "cache")
    loaded: Any = datasets.load_dataset(
        "json", data_files=str(path), split="train", cache_dir=cache
    )
    loaded.to_json(str(folder / "b.json"), **form)
    return folder / "b.json"


@pytest.mark.parametrize("lines", [True, False])
@pytest.mark.parametrize("kind", MIXED)
def test_uneven_values_that_datasets_wrote(tmp_path: Path, kind: str, lines: bool) -> None:
    wanted = [to_conversation(record) for record in MIXED[kind]]
    found = read(rewritten(tmp_path, MIXED[kind], lines=lines))
    assert [to_conversation(record) for record in found] == wanted


def test_uneven_answers_that_datasets_wrote(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "q"}]
    good, bad = {"from": "gpt", "value": "a"}, {"from": "gpt", "value": "b"}
    records = [
        {"conversations": turns, "chosen": good | more, "rejected": bad}
        for more in ({"id": "1"}, {"note": "x"})
    ]
    path = rewritten(tmp_path, records)
    assert isinstance(json.loads(path.read_text().splitlines()[0])["chosen"], str)
    assert [to_pair(record) for record in read(path)] == [to_pair(record) for record in records]


def test_dates_and_other_values_of_tables_are_what_json_can_say(tmp_path: Path) -> None:
    import datasets

    datasets.disable_progress_bars()
    dates = [
        {"prompt": "When?", "answer": "2024-01-05"},
        {"prompt": "And?", "answer": "2024-02-29"},
    ]
    path = write_jsonl(tmp_path / "a.jsonl", dates)
    loaded: Any = datasets.load_dataset(
        "json", data_files=str(path), split="train", cache_dir=str(tmp_path / "cache")
    )
    assert isinstance(loaded[0]["answer"], dt.datetime), "datasets no longer does this"
    loaded.to_parquet(str(tmp_path / "dates.parquet"))
    loaded.save_to_disk(str(tmp_path / "dates"))
    assert read(tmp_path / "dates.parquet") == read(tmp_path / "dates") == dates

    at = dt.datetime(2024, 1, 5, 10, 30)
    row = {
        "at": pa.array([at], pa.timestamp("ms")),
        "zone": pa.array([at], pa.timestamp("us", "UTC")),
        "day": pa.array([at.date()]),
        "time": pa.array([at.time()]),
        "long": pa.array([dt.timedelta(hours=1)]),
        "whole": pa.array([decimal.Decimal("12.00")]),
        "part": pa.array([decimal.Decimal("3.25")]),
        "text": pa.array([b"caf\xc3\xa9"]),
        "bytes": pa.array([b"\xff\xfe"]),
        "map": pa.array([[("k", at)]], pa.map_(pa.string(), pa.timestamp("s"))),
        "kind": pa.array(["red"]).dictionary_encode(),
        "deep": pa.array([[{"at": [at, None]}]]),
    }
    pq.write_table(pa.table(row), tmp_path / "b.parquet")
    (found,) = read(tmp_path / "b.parquet")
    assert found == {
        "at": "2024-01-05 10:30:00",
        "zone": "2024-01-05T10:30:00Z",
        "day": "2024-01-05",
        "time": "10:30:00",
        "long": "1:00:00",
        "whole": 12,
        "part": 3.25,
        "text": "café",
        "bytes": "//4=",
        "map": {"k": "2024-01-05 10:30:00"},
        "kind": "red",
        "deep": [{"at": ["2024-01-05 10:30:00", None]}],
    }
    assert json.loads(json.dumps(found)) == found


def test_nulls_of_jsonl_are_its_own(tmp_path: Path) -> None:
    record = {"messages": [{"role": "user", "content": "a", "name": None}], "answer": None}
    assert read(write_jsonl(tmp_path / "a.jsonl", [record])) == [record]


DEEP = MAX_DEPTH + 1
BAD_LINES = {
    '{"text": "\\ud800"}': "half of a character",
    '{"\\udfff": 1}': "half of a character",
    '{"text": ' + "9" * 5000 + "}": "more than 4300 digits",
    '{"text": ' + "[" * DEEP + "]" * DEEP + "}": "nested too deeply",
    '{"text": ' + "[" * 100_000 + "]" * 100_000 + "}": "nested too deeply",
    "[1]": "must be an object",
}


@pytest.mark.parametrize("ending", ["jsonl", "json"])
def test_a_bad_record_costs_itself_alone(tmp_path: Path, ending: str) -> None:
    lines = ['{"text": "\\ud83d\\ude00"}', *BAD_LINES, '{"text": "b"}']
    if ending == "json":
        lines = [line for line in lines if len(line) < 100_000]
    path = tmp_path / f"a.{ending}"
    path.write_text("[" + ",\n".join(lines) + "]" if ending == "json" else "\n".join(lines))
    found = read(path)
    assert (found[0], found[-1]) == ({"text": "😀"}, {"text": "b"})
    for line, reason in zip(lines[1:-1], found[1:-1], strict=True):
        assert BAD_LINES[line] in reason


def test_a_bad_row_of_a_table_costs_itself_alone(tmp_path: Path) -> None:
    ends = pa.array([0, 1, 3, 4], pa.int32()).buffers()[1]
    texts = pa.Array.from_buffers(pa.string(), 3, [None, ends, pa.py_buffer(b"a\xff\xfeb")])
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == [
        {"text": "a"},
        "a value cannot be read: 'utf-8' codec can't decode byte 0xff in position 0: invalid start"
        " byte",
        {"text": "b"},
    ]
    late = pa.array([0, 10**13], pa.timestamp("s"))
    pq.write_table(pa.table({"at": late}), tmp_path / "b.parquet")
    first, second = read(tmp_path / "b.parquet")
    assert first == {"at": "1970-01-01"} and second.startswith("a value cannot be read")
    half = pa.array(['{"a": "\\ud800"}', '{"a": 1}'], pa.json_())
    pq.write_table(pa.table({"extra": half}), tmp_path / "c.parquet")
    first, second = read(tmp_path / "c.parquet")
    assert "half of a character" in first and second == {"extra": {"a": 1}}


def test_half_a_character_does_not_end_training(tmp_path: Path) -> None:
    records = [chat(f"{i}?", f"{i}!") for i in range(30)]
    path = write_jsonl(tmp_path / "a.jsonl", [*records, chat("hi", "\ud800")])
    prepared = RunData(recipe(tmp_path, data={"train": str(path)})).prepare()
    assert prepared.num_rejected == 1
    (listed,) = map(json.loads, (tmp_path / "run" / "rejected.jsonl").read_text().splitlines())
    assert (listed["file"], listed["line"]) == (str(path), 31)
    with pytest.raises(DataError, match=r"no text in .*b.jsonl:1: a text holds half"):
        train_tokenizer(
            [write_jsonl(tmp_path / "b.jsonl", [{"text": "\ud800"}])], 400, tmp_path / "t"
        )


@pytest.mark.parametrize("margin", ["1e400", "1e39", "9" * 400, "true", '"2"', "[1]", "NaN"])
def test_a_margin_must_be_a_number_that_fits(tmp_path: Path, margin: str) -> None:
    line = '{"prompt": "a?", "chosen": "b", "rejected": "c", "margin": ' + margin + "}"
    path = write_jsonl(tmp_path / "a.jsonl", [line])
    rows = [row for source in find_sources([path]) for row in read_rows(source)]
    spec = Spec((str(path),), tokenizer_folder(), 64, "truncate", 1)
    (result,) = Encoder(preference.PAIRS, spec)(rows)
    assert result.reason is not None and "margin must be a number" in result.reason


def test_rejects_of_a_file_whose_name_is_no_text(tmp_path: Path) -> None:
    from moetrain.data.rejects import read_rejects, write_rejects

    odd = [Reject("a\udcff.jsonl", 1, "why \ud800")]
    write_rejects(tmp_path / "r.jsonl", odd)
    assert read_rejects(tmp_path / "r.jsonl") == odd


def test_a_prompt_that_returns_is_kept_and_counted(tmp_path: Path) -> None:
    """Sampling a record more often is a choice: 40 of 60 records are no bad data."""
    records = [{"prompt": f"{i % 20}?", "answer": str(i % 20)} for i in range(60)]
    path = write_jsonl(tmp_path / "a.jsonl", records)
    prompts, rejects, _ = read_prompts([path], ChatOptions().open(tokenizer_folder()))
    assert [p.columns["answer"] for p in prompts] == [r["answer"] for r in records]
    assert not rejects and len({prompt.id for prompt in prompts}) == 60
    epochs = PromptOrder(prompts, 1).take(0, 180)
    assert len({prompt.id for prompt in epochs}) == 180
    assert describe_repeats(prompts) == ", 40 of them records that were there before"
    assert describe_repeats(prompts[:20]) == ""


@pytest.mark.parametrize("bad", [line for line in BAD_LINES if len(line) < 20_000])
def test_every_command_names_a_bad_record(tmp_path: Path, bad: str) -> None:
    """`score` and `eval` give a line for a line, so they stop; the others go on without it."""
    good = [json.dumps({"question": f"{i}?", "answer": "a", "text": "b"}) for i in range(40)]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join([*good, bad]) + "\n")
    reason = BAD_LINES[bad]
    where = re.escape(f"{path}:41: ") + f".*{reason}"

    chat = ChatOptions().open(tokenizer_folder())
    made = recipe(tmp_path, data={"train": str(path)}, model={"hf": MODELS["qwen3-moe-tiny"]})
    with pytest.raises(DataError, match=where):
        read_sequences(made, path)
    bench = BenchConfig.model_validate({"name": "b", "data": str(path), "scorer": "exact"})
    with pytest.raises(DataError, match=where):
        read_questions(bench, path, chat, 100)

    prompts, rejects, _ = read_prompts([path], chat)
    assert len(prompts) == 40 and [(r.line, reason in r.reason) for r in rejects] == [(41, True)]
    indexing.index([path], tokenizer_folder(), tmp_path / "index")
    train_tokenizer([path], 300, tmp_path / "tokenizer")
    for name in ("index", "tokenizer"):
        (listed,) = map(json.loads, (tmp_path / f"{name}.rejected.jsonl").read_text().splitlines())
        assert (listed["file"], listed["line"]) == (str(path), 41) and reason in listed["reason"]


@pytest.mark.parametrize(
    "record",
    [
        {"messages": [{"role": "user", "content": "a"},
                      {"role": "assistant", "content": None, "tool_calls": r'[{"id": "\ud800"}]'}]},
        {"prompt": "a", "completion": "b", "tools": [r'{"name": "\ud800"}']},
        {"prompt": "a", "completion": "b", "tools": r'[{"name": "\ud800"}]'},
        {"prompt": "a", "completion": "b", "tools": [{"type": "function", "function": "f"}]},
        {"prompt": "a", "completion": "b", "chat_template_kwargs": {"tools": 5}},
        {"prompt": "a", "completion": "b", "chat_template_kwargs": {"text": "x", "self": 1}},
    ],
)  # fmt: skip
def test_text_of_json_inside_a_record_is_held_to_the_same(
    tmp_path: Path, record: dict[str, Any]
) -> None:
    """Nothing but a reject, or a sequence, comes of it in any kind of data."""
    path = write_jsonl(tmp_path / "a.jsonl", [record, chat("hi", "ho")])
    rows = [row for source in find_sources([path]) for row in read_rows(source)]
    spec = Spec((str(path),), tokenizer_folder(), 64, "truncate", 1)
    first, second = Encoder(sft.CHAT, spec)(rows)
    assert first.reason is not None or "ud800" not in json.dumps(record)
    assert second.groups
    found = read_prompts([path], ChatOptions().open(tokenizer_folder()))
    assert len(found.prompts) + len(found.rejects) == 2


def test_prompts_of_an_empty_file(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text("")
    with pytest.raises(DataError, match=r"No record in .*p\.jsonl can be used\.$"):
        read_prompts([tmp_path / "p.jsonl"], ChatOptions().open(tokenizer_folder()))
