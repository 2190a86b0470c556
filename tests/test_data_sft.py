"""From files to packs: sources, rejects, the cache, a stream that no layout or resume changes."""

import json
import math
import pickle
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from data_helpers import chat, questions, recipe, tokenizer_folder, write_jsonl

from moetrain.data import sft, tokenizer, workers
from moetrain.data.chat import ChatOptions
from moetrain.data.encode import Encoder, Spec
from moetrain.data.loader import Loader, RunData
from moetrain.data.parsing import parse_json
from moetrain.data.rejects import Reject
from moetrain.data.run_tokenizer import model_vocab
from moetrain.data.sets import build
from moetrain.data.sources import Record, find_sources, read_rows
from moetrain.errors import DataError
from moetrain.ops.packed import Packed


def rows(*inputs: Path) -> list[Record | Reject]:
    return [row for source in find_sources(inputs) for row in read_rows(source)]


def texts(packs: list[Packed]) -> list[str]:
    """What is learned in each sequence, to compare packs by content."""
    loaded = tokenizer.load(tokenizer_folder())
    found: list[str] = []
    for pack in packs:
        for start, end in zip(pack.cu_seqlens[:-1], pack.cu_seqlens[1:], strict=True):
            wanted = pack.loss_mask[start:end] > 0
            if wanted.any():
                found.append(str(loaded.decode(pack.labels[start:end][wanted].tolist())))
    return found


def same(a: list[Packed], b: list[Packed]) -> bool:
    return len(a) == len(b) and all(
        x.ids == y.ids and torch.equal(x.tokens, y.tokens) and torch.equal(x.loss_mask, y.loss_mask)
        for x, y in zip(a, b, strict=True)
    )


def test_jsonl_lines_are_numbered_and_bad_ones_rejected(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\n\n{"a": \n[1]\n{}\n\xff\xfe\n{"a": 2}')
    found = rows(path)
    assert [type(row).__name__ for row in found] == ["Record", *["Reject"] * 5, "Record"]
    assert [row.line for row in found] == list(range(1, 8))
    reasons = [row.reason for row in found if isinstance(row, Reject)]
    assert reasons[0] == "empty line"
    assert reasons[1] == "malformed JSON: cut short at its end, column 6"
    assert reasons[2] == "a record must be an object, not list"
    assert reasons[3] == "empty record"
    assert reasons[4] == "not UTF-8 at byte 0"


def test_parquet_json_and_dataset_folders_give_the_same_rows(tmp_path: Path) -> None:
    import datasets

    records = questions(5)
    data = datasets.Dataset.from_list(records)
    data.to_parquet(str(tmp_path / "a.parquet"))
    data.save_to_disk(str(tmp_path / "hf"))
    datasets.DatasetDict({"train": data, "test": data}).save_to_disk(str(tmp_path / "splits"))
    (tmp_path / "a.json").write_text(json.dumps(records))
    for name in ("a.parquet", "a.json", "hf", "splits"):
        found = rows(tmp_path / name)
        assert [row.value for row in found if isinstance(row, Record)] == records, name
        assert [row.line for row in found] == [1, 2, 3, 4, 5]


def test_folders_are_read_in_name_order(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "b.jsonl", [{"n": 2}])
    write_jsonl(tmp_path / "a.jsonl", [{"n": 1}])
    (tmp_path / ".hidden.jsonl").write_text("{")
    assert [row.value["n"] for row in rows(tmp_path) if isinstance(row, Record)] == [1, 2]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.jsonl", None, "does not exist"),
        ("a.csv", b"x", "the endings read are .jsonl"),
        ("a.parquet", b"x", "not a readable parquet file"),
        ("a.json", b"[1,", "not valid JSON"),
    ],
)
def test_unreadable_inputs(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        rows(tmp_path / name)


def test_a_pack_holds_shifted_labels_inside_each_sequence(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", questions())
    loader = RunData(recipe(tmp_path, data={"train": str(path)})).loader(0, 1)
    for pack in loader.next():
        assert pack.num_tokens == 64
        bounds = pack.cu_seqlens.tolist()
        for start, end, name in zip(bounds[:-1], bounds[1:], pack.ids, strict=True):
            if not pack.valid[start]:
                assert (
                    name == ""
                    and not pack.valid[start:].any()
                    and pack.loss_mask[start:].sum() == 0
                )
                continue
            assert name.startswith(f"{path}:")
            assert torch.equal(pack.labels[start : end - 1], pack.tokens[start + 1 : end])
            assert pack.position_ids[start:end].tolist() == list(range(end - start))
            assert pack.loss_mask[end - 1] == 0


def test_an_epoch_learns_every_answer_once(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", questions())
    made = recipe(tmp_path, data={"train": str(path)}, train={"epochs": 2, "global_batch": 1})
    loader = RunData(made).loader(0, 1)
    packs = [pack for _ in range(RunData(made).num_steps // 2) for pack in loader.next()]
    answers = sorted(f"{r['messages'][1]['content']}<|im_end|>" for r in questions())
    assert sorted(texts(packs)) == answers
    again = [pack for _ in range(RunData(made).num_steps // 2) for pack in loader.next()]
    assert sorted(texts(again)) == answers and not same(again, packs)


@pytest.mark.parametrize(("epochs", "share"), [(1, 1.0), (0.5, 0.5), (1.5, 1.5), (1e-9, 0.0)])
def test_epochs_read_no_record_more(tmp_path: Path, epochs: float, share: float) -> None:
    """No further epoch begins to fill the last batch, which may be smaller; at any layout."""
    path = write_jsonl(tmp_path / "a.jsonl", questions(22))
    batch = 8  # 22 packs an epoch
    data = {"train": str(path), "pack": False}
    made = recipe(tmp_path, data=data, train={"epochs": epochs, "global_batch": batch})
    alone, most = RunData(made).loader(0, 1), max(1, int(22 * share))
    steps = [alone.next() for _ in range(RunData(made).num_steps)]
    assert sum(map(len, steps)) == most and alone.steps_left() == 0
    assert all(len(packs) == batch for packs in steps[:-1])
    seen = [name for packs in steps for pack in packs for name in pack.ids if name]
    assert max(map(seen.count, seen)) == math.ceil(most / 22)
    ranks = [RunData(made).loader(rank, 4) for rank in range(4)]
    for packs in steps:
        shares = [rank.next() for rank in ranks]
        assert len(set(map(len, shares))) == 1  # pipelines want as many everywhere
        dealt = [share[i] for i in range(len(shares[0])) for share in shares]
        assert same(dealt[: len(packs)], packs)
        assert not any(pack.valid.any() for pack in dealt[len(packs) :])


@pytest.mark.parametrize("pack", [True, False])
def test_the_stream_does_not_depend_on_the_layout(tmp_path: Path, pack: bool) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", questions())
    made = recipe(tmp_path, data={"train": str(path), "pack": pack})
    alone = RunData(made).loader(0, 1)
    ranks = [RunData(made).loader(rank, 4) for rank in range(4)]
    for _ in range(2 * len(alone.packs) // 4 + 1):
        together = alone.next()
        shares = [rank.next() for rank in ranks]
        assert same(together, [share[i] for i in range(1) for share in shares])


def test_resume_goes_on_exactly(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", questions())
    made = recipe(tmp_path, data={"train": str(path)})
    whole = RunData(made).loader(0, 2)
    taken = [whole.next() for _ in range(15)]
    for stop in (0, 3, 7):
        first = RunData(made).loader(0, 2)
        for _ in range(stop):
            first.next()
        second = RunData(made).loader(0, 2)
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        assert all(same(second.next(), taken[step]) for step in range(stop, 15))
    other = recipe(tmp_path, data={"train": str(path), "seq_len": 32})
    with pytest.raises(DataError, match="other training data"):
        RunData(other).loader(0, 2).load_state_dict(whole.state_dict())


def test_a_batch_that_does_not_divide_is_refused(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", questions())
    with pytest.raises(DataError, match="global_batch 4 does not divide over 3"):
        RunData(recipe(tmp_path, data={"train": str(path)})).loader(0, 3)


def test_held_out_packs_cover_all_ranks_evenly(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", questions(60))
    made = recipe(tmp_path, data={"train": str(path), "eval": [str(path)], "pack": False})
    assert RunData(recipe(tmp_path, data={"train": str(path)})).eval_packs(0, 1) is None
    alone = RunData(made).eval_packs(0, 1)
    shares = [RunData(made).eval_packs(rank, 8) for rank in range(8)]
    assert alone is not None and len(alone) == 60
    found: list[Packed] = []
    for share in shares:
        assert share is not None and len(share) == 8
        found.extend(share)
    assert sum(not pack.valid.any() for pack in found) == 4
    assert sorted(texts(found)) == sorted(texts(list(alone)))
    few = RunData(
        recipe(tmp_path, data={"train": str(path), "eval": [str(path)]}, train={"eval_packs": 3})
    ).eval_packs(0, 1)
    assert few is not None and len(few) == 3


def test_rejects_are_listed_on_a_cache_hit_too(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [*questions(), "", "{", {"text": "x"}])
    made = recipe(tmp_path, data={"train": str(path)})
    listed = made.run_dir / "rejected.jsonl"
    for _ in range(2):
        prepared = RunData(made).prepare()
        assert prepared.num_rejected == 3
        assert "3 rejected" in prepared.lines[0]
        found = [json.loads(line) for line in listed.read_text().splitlines()]
        assert [(r["file"], r["line"]) for r in found] == [(str(path), n) for n in (65, 66, 67)]
        listed.unlink()


def test_too_many_rejects_stop_the_run(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ["{", *questions(9)])
    with pytest.raises(DataError) as caught:
        RunData(recipe(tmp_path, data={"train": str(path)})).prepare()
    assert "1 of 10 records were rejected (10.0%" in str(caught.value)
    assert f"{path}:1: malformed JSON" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert (
        RunData(recipe(tmp_path, data={"train": str(path), "max_rejected": 0.2}))
        .prepare()
        .num_rejected
        == 1
    )


def test_no_usable_record(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "x"}])
    with pytest.raises(DataError, match="None of the 1 records"):
        RunData(recipe(tmp_path, data={"train": str(path)})).prepare()


def test_over_long_records_are_cut_and_counted_or_rejected(tmp_path: Path) -> None:
    records = [*questions(), chat("Say it.", "yes " * 200), chat("no " * 200, "hopeless")]
    path = write_jsonl(tmp_path / "a.jsonl", records)
    prepared = RunData(recipe(tmp_path, data={"train": str(path)})).prepare()
    assert (prepared.num_truncated, prepared.num_rejected) == (1, 1)
    ends = RunData(recipe(tmp_path, data={"train": str(path), "too_long": "keep_end"})).prepare()
    assert (ends.num_truncated, ends.num_rejected) == (2, 0)
    refused = RunData(recipe(tmp_path, data={"train": str(path), "too_long": "reject"})).prepare()
    assert (refused.num_truncated, refused.num_rejected) == (0, 2)
    lines = (tmp_path / "run" / "rejected.jsonl").read_text().splitlines()
    assert "more than data.seq_len 64" in lines[0]


def spec(path: Path, **changes: Any) -> Spec:
    return Spec(
        (str(path),),
        tokenizer_folder(),
        **{"seq_len": 64, "too_long": "truncate", "seed": 1, **changes},
    )


def test_the_cache_is_by_content(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", questions())
    root = tmp_path / "cache"
    first = build(sft.CHAT, spec(path), root)
    before = (first / "tokens.bin").stat().st_mtime_ns
    assert build(sft.CHAT, spec(path, num_workers=3), root) == first
    assert (first / "tokens.bin").stat().st_mtime_ns == before
    others = [
        {"seq_len": 65},
        {"too_long": "reject"},
        {"too_long": "keep_end"},
        {"seed": 2},
        {"pack": False},
    ]
    plain = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    others += [{"chat": ChatOptions(plain)}, {"chat": ChatOptions(system="Be brief.")}]
    assert len({first, *(build(sft.CHAT, spec(path, **change), root) for change in others)}) == 8
    write_jsonl(path, questions(63))
    assert build(sft.CHAT, spec(path), root) != first
    assert not list(root.glob("sft/.*.tmp-*"))


def test_workers_need_no_torch(tmp_path: Path) -> None:
    """A worker gets the tokenizer that is loaded: to load one, transformers imports torch."""
    path = write_jsonl(tmp_path / "a.jsonl", questions())
    encoder = Encoder(sft.CHAT, spec(path))
    expected = encoder(rows(path))[0].groups[0].sequences[0].tokens.tolist()
    code = (
        "import pickle, sys; encode, rows = pickle.load(sys.stdin.buffer); found = encode(rows);"
        "print('torch' in sys.modules, found[0].groups[0].sequences[0].tokens.tolist())"
    )
    sent = pickle.dumps((encoder, rows(path)))
    done = subprocess.run([sys.executable, "-c", code], input=sent, capture_output=True)
    assert done.stdout.decode() == f"False {expected}\n", done.stderr.decode()
    cores = workers.num_cores()
    sizes = (0, workers.EACH - 1, 2 * workers.EACH, 1 << 40)
    assert [workers.worth(size) for size in sizes] == [0, 0, min(2, cores), min(8, cores)]


@pytest.mark.slow
def test_workers_change_nothing(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [*questions(), "{"] * 10)
    one = build(sft.CHAT, spec(path), tmp_path / "one")
    two = build(sft.CHAT, spec(path, num_workers=2), tmp_path / "two")
    for name in ("tokens.bin", "mask.bin", "pack_groups.npy", "lines.npy", "rejected.jsonl"):
        assert (one / name).read_bytes() == (two / name).read_bytes()


def test_two_builders_at_once(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", questions())
    found: list[Path] = []
    threads = [
        threading.Thread(target=lambda: found.append(build(sft.CHAT, spec(path), tmp_path / "c")))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4 and len(set(found)) == 1
    assert len(list((tmp_path / "c" / "sft").glob("[!.]*"))) == 1


def test_a_tokenizer_larger_than_the_model_is_refused(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", questions())
    hf = {"architectures": ["Qwen3MoeForCausalLM"], "vocab_size": 300}
    made = recipe(tmp_path, data={"train": str(path)}, model={"hf": hf})
    assert model_vocab(made) == 300
    with pytest.raises(DataError, match="has 400 tokens but the model's vocab_size is 300"):
        RunData(made).prepare()
    folder = tmp_path / "megatron"  # a checkpoint knows it too
    folder.mkdir()
    (folder / "moetrain.json").write_text(json.dumps({"hf": hf}))
    model = {"hf": None, "path": str(folder)}
    with pytest.raises(DataError, match="has 400 tokens but the model's vocab_size is 300"):
        RunData(recipe(tmp_path, data={"train": str(path)}, model=model)).prepare()


def test_a_full_cache_says_so(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", questions())
    (tmp_path / "cache").write_text("a file where the folder should be")
    with pytest.raises(DataError, match=r"data.cache or \$MOETRAIN_CACHE"):
        RunData(recipe(tmp_path, data={"train": str(path)})).prepare()


def test_loader_wants_packs_of_any_kind() -> None:
    class Numbers:
        fingerprint = "numbers"

        def __len__(self) -> int:
            return 3

        def at(self, epoch: int, number: int) -> Any:
            return epoch, number

    loader = Loader(Numbers(), 4, 1, 2)
    assert [loader.next() for _ in range(3)] == [
        [(0, 1), (1, 0)],
        [(1, 2), (2, 1)],
        [(3, 0), (3, 2)],
    ]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"a": "hel', "cut short at its end, column 11"),
        ('{"a": "b\\"', "cut short at its end, column 11"),
        ('{"a": "\\u12', "cut short at its end, column 12"),
        ('{"a": [1, {"b": 2}', "cut short at its end, column 19"),
        ('{"a": tr', "cut short at its end, column 9"),
        ('{"a": 1,  ', "cut short at its end, column 9"),
        ('{"a": "b\\u1", "c": 2}', "at column 10: Invalid"),
        ('{"a": "b"} x', "at column 12: Extra data"),
        ('{"a": x', "at column 7: Expecting value"),
    ],
)
def test_json_that_is_cut_short_points_to_its_end(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match="malformed JSON") as caught:
        parse_json(text)
    assert reason in str(caught.value)
