"""Text to an index: by any engine and number of processes the same bytes as Megatron's own builder
writes, and the same after a kill.
"""

import json
import os
import random
import re
import signal
import struct
import subprocess
import sys
import time
from importlib.util import find_spec
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chat_templates import KNOWN, folder
from data_helpers import QUESTIONS, tokenizer_folder, write_jsonl

from moetrain.data import (
    index_parts,
    indexing,
    odd_texts,
    pieces,
    same_tokens,
    sources,
    text_tokenizer,
    tokenizer,
)
from moetrain.data.indexing import Options, index
from moetrain.data.text_tokenizer import FAST, SLOW, TextTokenizer
from moetrain.errors import DataError

ONE = Options(workers=1)
needs_gigatoken = pytest.mark.skipif(
    find_spec(FAST) is None, reason="gigatoken is not installed: its tokens stay uncompared"
)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything that a large corpus meets, for a small one."""
    monkeypatch.setattr(indexing, "WORTH", 0)
    monkeypatch.setattr(pieces, "FIRST", 1 << 12)
    monkeypatch.setattr(pieces, "LARGEST", 1 << 13)


def written(prefix: Path) -> dict[str, bytes]:
    return {s: Path(f"{prefix}{s}").read_bytes() for s in (".bin", ".idx")}


def texts(num: int) -> list[str]:
    return [f"{i}: {q} {a} \u4f60\u597d" for i, (q, a) in enumerate(QUESTIONS * num)]


def corpus(folder: Path) -> list[Path]:
    """JSONL with and without faults, a list, a table, and files of text."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows: list[Any] = [{"text": text, "url": "x"} for text in texts(4)]
    rows[7:7] = ["{", {"text": ""}, {"no": 1}, {"text": "\ud800"}]
    write_jsonl(folder / "a.jsonl", rows)
    raw = (folder / "a.jsonl").read_bytes()
    (folder / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + raw.removesuffix(b"\n"))
    (folder / "b.json").write_text(json.dumps([{"text": text} for text in texts(2)]))
    table = pa.table({"text": [*texts(3), None, ""]})
    pq.write_table(table, folder / "c.parquet", row_group_size=100)
    for i, text in enumerate(texts(1)[:20]):
        (folder / f"d{i:03}.txt").write_text(text)
    write_jsonl(folder / "e.jsonl", [{"text": text} for text in texts(1)])
    return [folder]


@needs_gigatoken
def test_any_engine_and_any_number_of_processes_write_what_megatron_would(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small: None
) -> None:
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    from moetrain.data.sources import Record, find_sources, read_rows

    (tmp_path / "in").mkdir()
    inputs = corpus(tmp_path / "in")
    said: list[str] = []
    found: list[tuple[dict[str, bytes], str]] = []
    for name, workers in (("one", 1), ("two", 2), ("slow", 1)):
        if name == "slow":
            monkeypatch.setattr(same_tokens, "compared", lambda *_: "it is a test")
        stats = index(inputs, tokenizer_folder(), tmp_path / name, Options(workers=workers),
                      say=said.append)  # fmt: skip
        assert stats.engine == (SLOW if name == "slow" else FAST)
        rejects = Path(f"{tmp_path / name}.rejected.jsonl").read_text()
        found.append((written(tmp_path / name), rejects))
    assert found[0] == found[1] == found[2]
    assert len(said) == 1 and "tokenizers are used" in said[0] and said[0].endswith("it is a test")
    assert [json.loads(line)["line"] for line in found[0][1].splitlines()] == [8, 10, 11]
    loaded = tokenizer.load(tokenizer_folder())
    end, vocab = tokenizer.end_of_document(loaded), tokenizer.vocab_of(loaded)
    builder: Any = IndexedDatasetBuilder(str(tmp_path / "m.bin"), dtype=DType.optimal_dtype(vocab))
    import torch

    for row in (row for source in find_sources(inputs) for row in read_rows(source)):
        text = row.value.get("text") if isinstance(row, Record) else None
        if text:
            ids: Any = loaded(text, add_special_tokens=False)["input_ids"]
            builder.add_item(torch.tensor([*ids, end]))
            builder.end_document()
    builder.finalize(str(tmp_path / "m.idx"))
    assert found[0][0] == written(tmp_path / "m")
    assert not list(tmp_path.glob(".*"))


def test_a_large_vocabulary_takes_four_bytes_a_token(tmp_path: Path) -> None:
    from megatron.core.datasets.indexed_dataset import DType

    for vocab in (400, 65499, 65500, 151_936):
        assert np.dtype(index_parts.type_of(vocab)) == DType.optimal_dtype(vocab)
    path = tmp_path / "lengths"
    np.array([3, 1], dtype=np.int32).tofile(path)
    index_parts._write_index(tmp_path / "a.idx", path, 2, np.int32)
    raw = (tmp_path / "a.idx").read_bytes()
    assert struct.unpack("<QBQQ", raw[9:34]) == (1, 4, 2, 3)
    assert np.frombuffer(raw[34:42], np.int32).tolist() == [3, 1]
    assert np.frombuffer(raw[42:], np.int64).tolist() == [0, 12, 0, 1, 2]


def stopped(inputs: list[Path], out: Path, after: int) -> None:
    """A build that ends as by ctrl-c once it has read so many bytes."""

    def report(done: int, total: int) -> None:
        if done > after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        index(inputs, tokenizer_folder(), out, ONE, report=report)


@pytest.mark.parametrize(
    "damage", ["none", "tokens", "flip", "journal", "cut", "other", "vanished"]
)
def test_a_build_that_was_stopped_goes_on(tmp_path: Path, small: None, damage: str) -> None:
    (tmp_path / "in").mkdir()
    inputs = corpus(tmp_path / "in")
    total = sum(path.stat().st_size for path in (tmp_path / "in").iterdir())
    index(inputs, tokenizer_folder(), tmp_path / "whole", ONE)
    out, part = tmp_path / "again", tmp_path / ".again.part"
    stopped(inputs, out, total // 2)
    assert part.is_dir() and not list(tmp_path.glob("again*"))
    journal = part / "journal"
    raw, tokens = journal.read_bytes(), bytearray((part / "tokens").read_bytes())
    if damage == "tokens":
        (part / "tokens").write_bytes(tokens[:-5])
    elif damage == "flip":
        tokens[len(tokens) // 2] ^= 1
        (part / "tokens").write_bytes(tokens)
    elif damage == "journal":
        journal.write_bytes(raw[:-20])
    elif damage == "cut":
        journal.write_bytes(raw[:10])
    elif damage == "other":  # the data has changed since
        write_jsonl(tmp_path / "in" / "e.jsonl", [{"text": text} for text in texts(1)])
        os.utime(tmp_path / "in" / "e.jsonl", (1, 1))
    elif damage == "vanished":
        (part / "lengths").unlink()
    began: list[int] = []
    index(inputs, tokenizer_folder(), out, ONE, report=lambda done, total: began.append(done))
    if damage in ("none", "tokens", "flip", "journal"):
        assert began[0] > total // 8  # and what is done is not done again
    else:
        assert began[0] == 0
    assert written(out) == written(tmp_path / "whole")
    assert (
        Path(f"{out}.rejected.jsonl").read_text()
        == Path(f"{tmp_path / 'whole'}.rejected.jsonl").read_text()
    )
    assert not list(tmp_path.glob(".*"))


def test_a_kill_in_the_middle(tmp_path: Path, small: None) -> None:
    """kill -9 of the parent alone: its processes end with it, and the next start goes on."""
    path = tmp_path / "a.jsonl"
    line = json.dumps({"text": "one two three four " * 50}) + "\n"
    path.write_text(line * 4000)
    program = (
        "import sys, time; from pathlib import Path; from moetrain.data import indexing, pieces\n"
        "indexing.WORTH, pieces.LARGEST = 0, 1 << 16\n"
        "def report(done, total): print(done, flush=True); time.sleep(0.05)\n"
        "if __name__ == '__main__':\n"
        "    options = indexing.Options(workers=2)\n"
        "    _, path, folder, out = sys.argv\n"
        "    indexing.index([path], Path(folder), out, options, report=report)\n"
    )
    (tmp_path / "run.py").write_text(program)
    words = [sys.executable, str(tmp_path / "run.py"), str(path), str(tokenizer_folder())]
    command = [*words, str(tmp_path / "killed")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as build:
        assert build.stdout is not None
        done = [int(line) for line in islice(build.stdout, 20)]
        children = Path(f"/proc/{build.pid}/task/{build.pid}/children").read_text().split()
        build.send_signal(signal.SIGKILL)
    assert len(children) >= 2 and 0 < done[-1] < path.stat().st_size
    for _ in range(100):
        alive = [c for c in children if _runs(c)]
        if not alive:
            break
        time.sleep(0.1)
    assert not alive
    began: list[int] = []
    again = tmp_path / "killed"
    index([path], tokenizer_folder(), again, ONE, report=lambda done, total: began.append(done))
    assert began[0] >= done[-1]
    index([path], tokenizer_folder(), tmp_path / "whole", ONE)
    assert written(again) == written(tmp_path / "whole")


def _runs(pid: str) -> bool:
    try:
        return (
            "moetrain" in Path(f"/proc/{pid}/cmdline").read_text()
            or "spawn" in Path(f"/proc/{pid}/cmdline").read_text()
        )
    except OSError:
        return False


def test_two_builds_of_one_index(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in texts(1)])

    def report(done: int, total: int) -> None:
        with pytest.raises(DataError, match="being written by another process"):
            index([path], tokenizer_folder(), tmp_path / "a")

    index([path], tokenizer_folder(), tmp_path / "a", report=report)
    assert (tmp_path / "a.idx").is_file()


def variants() -> dict[str, Any]:
    """Tokenizers as people have them, of which gigatoken 0.10 cuts some otherwise."""
    from tokenizers import AddedToken, normalizers, pre_tokenizers

    def made(change: Any) -> Any:
        one = tokenizer.load(tokenizer_folder()).backend_tokenizer
        one = type(one).from_str(one.to_str())
        change(one)
        return one

    def setting(name: str, value: Any) -> Any:
        return made(lambda one: setattr(one, name, value))

    plain = pre_tokenizers.ByteLevel(add_prefix_space=False)
    single = AddedToken("word", single_word=True)
    normal = AddedToken("e\u0301x", normalized=True)
    return {
        "itself": (made(lambda one: None), None),
        "nfc": (setting("normalizer", normalizers.NFC()), None),
        "gpt2": (setting("pre_tokenizer", plain), None),
        "stripped": (
            made(lambda one: one.add_tokens([AddedToken("<mask>", lstrip=True, rstrip=True)])),
            None,
        ),
        "single": (made(lambda one: one.add_tokens([single])), "otherwise"),
        "normalised": (
            made(
                lambda one: [
                    setattr(one, "normalizer", normalizers.NFC()),
                    one.add_tokens([normal]),
                ]
            ),
            "otherwise",
        ),
        "lower": (setting("normalizer", normalizers.Lowercase()), "cannot read it"),
        "digits": (
            setting("pre_tokenizer", pre_tokenizers.Sequence([pre_tokenizers.Digits(), plain])),
            "cannot read it",
        ),
    }


@needs_gigatoken
@pytest.mark.parametrize("name", variants())
def test_gigatoken_is_used_where_it_gives_the_same_tokens(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOETRAIN_CACHE", str(tmp_path))
    monkeypatch.setattr(odd_texts, "unassigned", lambda: (0x88F, 0x323B0))  # of 100,000
    one, why = variants()[name]
    read = TextTokenizer(one.to_str(), one.get_vocab_size(), 0, (), True, False)
    found = same_tokens.compared(read)
    assert isinstance(found, TextTokenizer) if why is None else why in str(found)
    assert same_tokens.compared(read) == found  # as it is remembered
    if name == "itself":  # special tokens that are cut in pieces, as a tokenizer's config may say
        split = TextTokenizer(one.to_str(), one.get_vocab_size(), 0, (), True, True)
        assert "otherwise" in str(same_tokens.compared(split))


@needs_gigatoken
@pytest.mark.parametrize("name", KNOWN)
def test_the_same_ids_for_every_template_s_tokenizer(name: str) -> None:
    """A few of the texts of tools/same_ids.py, which takes 100,000."""
    read = text_tokenizer.read(folder(name))
    loaded = tokenizer.load(folder(name))
    fast, slow = read.open(FAST), read.open(SLOW)
    some = list(islice(same_tokens.special_cases(read, seed=7), 400))
    right: Any = loaded(some, add_special_tokens=False, verbose=False)["input_ids"]
    for text, a, b, c in zip(some, right, fast(some), slow(some), strict=True):
        assert a == b.tolist() == c.tolist(), text


def test_texts_without_gigatoken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small: None
) -> None:
    monkeypatch.setattr(same_tokens, "FAST", "gigatoken-that-is-not-here")
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in texts(1)])
    said: list[str] = []
    stats = index([path], tokenizer_folder(), tmp_path / "a", Options(workers=1), say=said.append)
    assert stats.engine == SLOW and stats.num_documents == len(QUESTIONS)
    assert len(said) == 1 and "gigatoken is not installed" in said[0]


@needs_gigatoken
def test_memory_of_words_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """gigatoken 0.10 keeps every word that it has met."""
    read = text_tokenizer.read(tokenizer_folder())
    monkeypatch.setattr(text_tokenizer, "RECYCLE", 1 << 24)
    engine: Any = read.open(FAST)
    rng = np.random.default_rng(0)
    before: set[int] = set()
    for _ in range(12):
        words = rng.integers(97, 123, (60_000, 9), dtype=np.uint8)
        words[:, 8] = 32
        text = words.tobytes().decode()
        (ids,) = engine([text])
        before.add(engine._before)  # memory when the tokenizer was made
    assert len(before) > 1
    assert ids.tolist() == read.open(SLOW)([text])[0].tolist()


def test_lines_wherever_a_file_is_cut(tmp_path: Path) -> None:
    rng = random.Random(3)
    path = tmp_path / "a.jsonl"
    for _ in range(300):
        raw = "".join(
            rng.choices(["\n", "a", "\u4f60", "\r", "bcdefgh"], [2, 2, 1, 1, 1], k=30)
        ).encode()
        raw = rng.choice((b"", b"\xef\xbb\xbf")) + raw
        path.write_bytes(raw)
        cuts = sorted({0, len(raw), *rng.choices(range(len(raw)), k=rng.randint(0, 8))})
        found = [line for a, b in pairwise(cuts) for line in sources._lines_from(path, a, b)]
        assert found == [line.removesuffix(b"\n") for line in sources._lines(path)], (raw, cuts)


def test_edges_of_unicode() -> None:
    """Each kind of character is among those that are compared, and each that is not assigned."""
    codes = odd_texts.edges()
    assert len(codes) > 5_000 and not set(codes) & set(odd_texts.SURROGATES)
    assert {0x41, 0x5B, 0x60, 0xA0, 0xAA, 0x2028, 0x3000} <= set(codes)
    assert len(odd_texts.unassigned()) > 50_000


@needs_gigatoken
def test_characters_of_a_later_unicode(monkeypatch: pytest.MonkeyPatch) -> None:
    """Letters for gigatoken 0.10 and nothing for tokenizers 0.23, or the other way round."""
    read = text_tokenizer.read(tokenizer_folder())
    found = same_tokens.compared(read)
    assert isinstance(found, TextTokenizer)
    later = [0x88F, 0xA7CE, 0x2B73A, 0x323B0, 0x33479]  # Unicode 17
    some = [odd_texts.around([code]) for code in later] + ["\u4f60's ..\u4f60"]
    right = found.open(SLOW)(some)
    for a, b in zip(right, found.open(FAST)(some), strict=True):
        assert a.tolist() == b.tolist()
    raw = read.open(FAST)(some)
    differ = [a.tolist() != b.tolist() for a, b in zip(right, raw, strict=True)]
    assert differ == [bool(re.search(found.apart or "(?!)", text)) for text in some]
    assert not differ[-1]
    assert same_tokens.class_of([]) == ""
    own = re.compile(same_tokens.class_of([0x41, 0x42, 0x43, 0x5D, 0x5E, 0x1F642]))
    assert own.findall("@ABCD\\]^_\U0001f641\U0001f642\U0001f643") == [*"ABC]^\U0001f642"]
