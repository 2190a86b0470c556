"""Files of data and of runs that say what is not so: one line, at the start."""

import json
import shutil
import struct
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_helpers import tokenizer_folder, write_jsonl

from moetrain.data import corpus, indexing
from moetrain.data.sources import find_sources, read_rows
from moetrain.errors import DataError, MoetrainError, WeightsError
from moetrain.observe.ledger import Ledger, read_ledger
from moetrain.observe.runs import find_runs, last_row
from moetrain.rewards.cases import Ask, cases_of
from moetrain.weights.side_files import side_files_of_adapter

TYPES: tuple[Any, ...] = (None, True, 5, -1, 1.5, "x", "", [], [1], {}, {"a": 1}, 10**400, 1e400)
HEADER = struct.Struct("<9sQBQQ")
DOCUMENTS = 50


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    """An index of 50 documents."""
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": f"What is {i}?"} for i in range(DOCUMENTS)])
    indexing.index([path], tokenizer_folder(), tmp_path / "a")
    return tmp_path / "a"


def open_corpus(prefix: Path) -> corpus.CorpusSet:
    root = prefix.parent / "cache"
    return corpus.CorpusSet([str(prefix)], None, seq_len=8, seed=1, root=root, model_vocab=512)


def patched(prefix: Path, place: int, value: bytes) -> None:
    raw = bytearray(Path(f"{prefix}.idx").read_bytes())
    raw[place : place + len(value)] = value
    Path(f"{prefix}.idx").write_bytes(raw)


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [
        (9, struct.pack("<Q", 2), "of version 2, and 1 is what is read"),
        (9, struct.pack("<Q", 2**63), "of version 9223372036854775808"),
        (17, b"\x00", "unknown or fractional type (code 0;"),
        (17, b"\x06", "unknown or fractional type (code 6;"),
        (17, b"\x63", "unknown or fractional type (code 99;"),
        (18, struct.pack("<QQ", 0, 1), "has no document"),
        (18, struct.pack("<Q", 2**60), "is cut short"),
        (26, struct.pack("<Q", 2**60), "is cut short"),
        (HEADER.size, struct.pack("<i", -3), "is damaged"),
        (HEADER.size + 4 * DOCUMENTS + 8 * 7, struct.pack("<q", 2**40), "sequence 7 is at byte"),
        (HEADER.size + 4 * DOCUMENTS + 8 * 7, struct.pack("<q", -8), "sequence 7 is at byte -8"),
        (HEADER.size + 4 * DOCUMENTS, struct.pack("<q", 2**63 - 1), "sequence 0 is at byte"),
        (HEADER.size + 4 * DOCUMENTS + 8 * 7, struct.pack("<q", 1), "sequence 7 is at byte 1 of"),
    ],
)
def test_an_index_that_lies(prefix: Path, place: int, value: bytes, words: str) -> None:
    """Before the first step, and not where the sample is met."""
    open_corpus(prefix)
    patched(prefix, place, value)
    with pytest.raises(DataError) as caught:
        open_corpus(prefix)
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("tokens", "code", "words"),
    [
        (np.array([3, 600], np.uint16), 8, "has 601 tokens but the model's vocab_size is 512"),
        (np.array([3, 600], np.int32), 4, "has 601 tokens"),
        (np.array([3, 2**40], np.int64), 5, "has 1099511627777 tokens"),
        (np.array([3, -7], np.int32), 4, "has a token -7, which no vocabulary has"),
    ],
)
def test_an_index_from_elsewhere_with_tokens_that_the_model_lacks(
    tmp_path: Path, tokens: Any, code: int, words: str
) -> None:
    many = np.tile(tokens, 50)
    places = np.array([0, many.nbytes // 2], np.int64)
    head = HEADER.pack(b"MMIDIDX\x00\x00", 1, code, 2, 3)
    lengths = np.array([50, 50], np.int32)
    parts = (lengths, places, np.arange(3, dtype=np.int64))
    (tmp_path / "a.idx").write_bytes(head + b"".join(part.tobytes() for part in parts))
    (tmp_path / "a.bin").write_bytes(np.where(many == tokens[1], 5, many).astype(many.dtype))
    assert len(open_corpus(tmp_path / "a")) > 0
    (tmp_path / "a.bin").write_bytes(many)
    for _ in range(2):
        with pytest.raises(DataError, match=words):
            open_corpus(tmp_path / "a")


def test_an_index_may_be_sparse(prefix: Path) -> None:
    """Documents may lie in any order in the .bin, with room between them."""
    starts = HEADER.size + 4 * DOCUMENTS
    raw = Path(f"{prefix}.idx").read_bytes()
    places = np.frombuffer(raw, np.int64, DOCUMENTS, starts)[::-1]
    lengths = np.frombuffer(raw, np.int32, DOCUMENTS, HEADER.size)[::-1]
    patched(prefix, HEADER.size, lengths.tobytes())
    patched(prefix, starts, places.tobytes())
    assert len(open_corpus(prefix)) > 0


@pytest.mark.parametrize("value", TYPES, ids=lambda value: str(value)[:9])
def test_the_note_of_an_index(prefix: Path, value: Any) -> None:
    """PREFIX.json of another type is about something else; a vocabulary of another one is a lie."""
    note = Path(f"{prefix}.json")
    note.write_text(json.dumps(value))
    open_corpus(prefix)
    note.write_text("[" * 100_000)
    open_corpus(prefix)
    note.write_text(json.dumps({"vocab": value}))
    if value == 5 and value is not True:
        open_corpus(prefix)
        return
    with pytest.raises(DataError, match=r"vocab=|10{10}"):
        open_corpus(prefix)


@pytest.mark.parametrize("name", ["state.json", "dataset_info.json"])
@pytest.mark.parametrize("value", TYPES, ids=lambda value: str(value)[:9])
def test_a_saved_data_set(tmp_path: Path, name: str, value: Any) -> None:
    import datasets

    records = [{"text": "a"}, {"text": "b"}]
    datasets.Dataset.from_list(records).save_to_disk(tmp_path / "d")
    good = json.loads((tmp_path / "d" / name).read_text())
    for content in (value, *({**good, key: value} for key in good)):
        (tmp_path / "d" / name).write_text(json.dumps(content))
        try:
            rows = [r for source in find_sources([tmp_path / "d"]) for r in read_rows(source)]
        except DataError as error:
            assert "\n" not in str(error) and str(tmp_path) in str(error)
        else:
            assert len(rows) in (0, 2)
    (tmp_path / "d" / name).write_text(json.dumps([]))
    with pytest.raises(DataError, match="not a readable Hugging Face dataset folder"):
        list(read_rows(find_sources([tmp_path / "d"])[0]))


ROWS = {
    "no step": {"loss": 1.0},
    "text": {"step": "2", "loss": 1.0},
    "a share": {"step": 1.5},
    "a truth": {"step": True},
    "a list": [1, 2],
    "a number": 5,
    "nothing": None,
}


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_a_row_of_a_ledger_without_a_step(tmp_path: Path, row: Any) -> None:
    """Going on with the run is refused, and a report tells it beside what there is."""
    path = tmp_path / "run" / "ledger.jsonl"
    write_jsonl((path.parent.mkdir(), path)[1], [{"step": 1, "loss": 2.0}, row, {"step": 3}])
    for read in (read_ledger, lambda own: Ledger(own, 3)):
        with pytest.raises(MoetrainError, match=r"ledger.jsonl:2 is no row of a ledger.*Remove"):
            read(path)
    (run,) = find_runs([tmp_path / "run"])
    assert run.problems == ["ledger.jsonl: 1 of 3 lines are no rows"] and run.step == 3
    assert last_row(tmp_path / "run") == {"step": 3, "loss": 2.0}


def test_a_ledger_of_bytes(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    path.write_bytes(b'{"step": 1}\n\xff\xfe\n{"step": 2}\n' + b"[" * 100_000 + b"\n")
    assert read_ledger(path) == [{"step": 1}]
    (run,) = find_runs([tmp_path])
    assert run.step == 2 and "2 of 4 lines are no rows" in run.problems[0]


@pytest.mark.parametrize("value", TYPES, ids=lambda value: str(value)[:9])
def test_rows_of_a_sweep(tmp_path: Path, value: Any) -> None:
    """A plan's line of another type, or with a name that is no folder beside it, is no run."""
    run = tmp_path / "a"
    run.mkdir()
    (run / "ledger.jsonl").write_text('{"step": 1}\n')
    lines = [value, {"name": value}, {"name": "a", "overrides": value}, {"name": "../a"}]
    lines += [{"name": "a\0b"}, {"name": "a", "overrides": [value]}]
    for line in lines:
        (tmp_path / "sweep.jsonl").write_text(json.dumps(line) + "\n" + "[" * 100_000 + "\n")
        runs = find_runs([tmp_path])
        assert [own.path for own in runs if own.step] == [run.resolve()]
        assert all(own.path.parent == tmp_path.resolve() for own in runs)


def test_a_report_of_endless_yaml(tmp_path: Path) -> None:
    (tmp_path / "ledger.jsonl").write_text('{"step": 1}\n')
    lines = ["a: &a {x: 1}"] + [
        f"{b}: &{b} {{<<: [{', '.join([f'*{a}'] * 9)}]}}"
        for a, b in zip("abcdefgh", "bcdefghi", strict=True)
    ]
    (tmp_path / "resolved.yaml").write_text("\n".join(lines))
    (tmp_path / "sweep.jsonl").write_text("")
    begin = time.process_time()
    (run,) = find_runs([tmp_path])
    assert time.process_time() - begin < 2
    assert run.problems == ["resolved.yaml is not readable (ConfigError)"]


@pytest.mark.parametrize("value", TYPES, ids=lambda value: str(value)[:9])
def test_cases_of_another_form(value: Any) -> None:
    """The grader answers with a reason; its process goes on."""
    forms = [value, [value], {"inputs": value, "outputs": value}, {"test_cases": value}]
    forms += [json.dumps(form) for form in forms if form not in (10**400, [10**400])]
    for form in forms:
        try:
            found = cases_of({"tests": form})
        except ValueError:
            continue
        assert all(isinstance(case.given, str | Ask) for case in found)


@pytest.mark.parametrize("lie", [10**12, -5, [2, 10**30], "2", [True], 2.0])
def test_ids_that_no_token_can_have(tmp_path: Path, lie: Any) -> None:
    """In what ends a sequence, beside an adapter: one line, whoever reads it."""
    adapter = tmp_path / "adapter"
    shutil.copytree(tokenizer_folder(), adapter)
    base = tmp_path / "base"
    base.mkdir()
    (adapter / "generation_config.json").write_text(json.dumps({"eos_token_id": lie}))
    with pytest.raises(WeightsError, match="is no token id"):
        side_files_of_adapter(base, adapter)
