"""Preference sets on disk and in a run: cache, reference log-probs, the stream, the recipe."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_helpers import LABELS, PAIRS, recipe, write_jsonl
from data_helpers import preference_set as make
from data_helpers import preference_spec as spec

from moetrain.config.method import SECTIONS
from moetrain.data import assets, preference
from moetrain.data.chat import ChatOptions
from moetrain.data.loader import KINDS, Loader, RunData, Shuffled
from moetrain.data.sets import PackedSet, build
from moetrain.errors import DataError
from moetrain.ops.packed import Packed


def test_the_cache_is_by_content(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", PAIRS)
    root = tmp_path / "cache"
    first = build(preference.PAIRS, spec(path), root)
    before = (first / "tokens.bin").stat().st_mtime_ns
    assert build(preference.PAIRS, spec(path, num_workers=3), root) == first
    assert (first / "tokens.bin").stat().st_mtime_ns == before
    other = "{% for m in messages %}{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}"
    same = [{"seed": 2}, {"pack": False}, {"share_prompt": False}, {"seq_len": 97}]
    packed = [PackedSet(build(preference.PAIRS, spec(path, **change), root)) for change in same]
    templated = PackedSet(build(preference.PAIRS, spec(path, chat=ChatOptions(other)), root))
    assert len({first.name, templated.fingerprint, *(data.fingerprint for data in packed)}) == 6
    # What a reference computes per answer outlives another packing, not another template.
    sequences = PackedSet(first).sequences_fingerprint
    assert {data.sequences_fingerprint for data in packed} == {sequences}
    assert templated.sequences_fingerprint != sequences
    write_jsonl(path, PAIRS[:-1])
    assert build(preference.PAIRS, spec(path), root) != first


@pytest.mark.slow
def test_workers_change_nothing(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [*LABELS, "{"] * 10)
    one = build(preference.LABELS, spec(path), tmp_path / "one")
    two = build(preference.LABELS, spec(path, num_workers=2), tmp_path / "two")
    for name in ("tokens.bin", "mask.bin", "pack_groups.npy", "lines.npy", "extras/role.npy"):
        assert (one / name).read_bytes() == (two / name).read_bytes()


def test_reference_log_probs(tmp_path: Path) -> None:
    data = make(tmp_path, PAIRS)
    values = -np.arange(data.num_items, dtype=np.float32) - 1
    np.save(tmp_path / "logp.npy", values)
    scored = data.with_reference(tmp_path / "logp.npy")
    assert scored.fingerprint == data.fingerprint and "ref_logp" not in data[0].extras
    for i in range(len(scored)):
        extras = scored[i].extras
        answer = extras["role"] > 0
        assert torch.equal(extras["ref_logp"][answer], -extras["item"][answer].float() - 1)
        assert not extras["ref_logp"][~answer].any()
    for wrong in (values[1:], values.astype(np.float64)):
        np.save(tmp_path / "logp.npy", wrong)
        with pytest.raises(DataError, match=f"the set has {data.num_items} answers"):
            data.with_reference(tmp_path / "logp.npy")
    (tmp_path / "logp.npy").write_bytes(b"")
    with pytest.raises(DataError, match="cannot be read"):
        data.with_reference(tmp_path / "logp.npy")


def stream(data: PackedSet, steps: int, dp: int, start: dict[str, Any] | None = None) -> list[Any]:
    """The packs of `steps` steps in the job's order, and the place after them."""
    loaders = [Loader(Shuffled(data, 1, True), 4, rank, dp) for rank in range(dp)]
    found: list[Packed] = []
    for loader in loaders:
        if start is not None:
            loader.load_state_dict(start)
    for _ in range(steps):
        shares = [loader.next() for loader in loaders]
        found += [shares[i % dp][i // dp] for i in range(4)]
    return [[(p.ids, p.extras["item"].tolist()) for p in found], loaders[0].state_dict()]


@pytest.mark.parametrize("kind", ["pairs", "labels"])
def test_neither_layout_nor_resume_changes_the_stream(tmp_path: Path, kind: str) -> None:
    data = make(tmp_path, {"pairs": PAIRS, "labels": LABELS}[kind], KINDS[kind])
    packs, _ = stream(data, 6, 1)
    assert stream(data, 6, 2)[0] == stream(data, 6, 4)[0] == packs
    early, place = stream(data, 2, 4)
    assert early + stream(data, 4, 2, json.loads(json.dumps(place)))[0] == packs


def test_every_method_has_its_data() -> None:
    for section in SECTIONS.values():
        assert section.learns_from in {"corpus", "prompts", *KINDS}
        assert (section.learns_from == "prompts") == section.samples


@pytest.mark.parametrize("name", ["dpo", "kto"])
def test_a_recipe_finds_its_kind(tmp_path: Path, name: str) -> None:
    records = {"dpo": PAIRS, "kto": LABELS}[name]
    path = write_jsonl(tmp_path / "a.jsonl", records)
    given = {"train": str(path), "eval": [str(path)], "max_rejected": 0.5, "seq_len": 96}
    made = recipe(tmp_path, method={"name": name}, data=given)
    unit = {"dpo": "64 pairs", "kto": "64 answers"}[name]
    assert f"train: 64 records, {unit}, " in RunData(made).prepare().lines[0]
    assert "tokens fewer as prompts are shared" in RunData(made).prepare().lines[1]
    data = RunData(made).packed(held_out=False)
    assert data is not None and data.num_items == 128
    np.save(tmp_path / "logp.npy", np.ones(128, dtype=np.float32))
    pack = RunData(made).loader(0, 2, tmp_path / "logp.npy").next()[0]
    assert pack.extras["ref_logp"].sum() == (pack.extras["role"] > 0).sum()
    other = recipe(tmp_path, method={"name": "sft"}, data={**given, "train": str(path)})
    assert KINDS[other.method.learns_from].name == "sft"


@pytest.mark.parametrize("kind", ["pairs", "labels"])
def test_builtin_data(tmp_path: Path, kind: str) -> None:
    path, held_out = (
        assets.resolve(f"builtin:checkable-{kind}{end}", tmp_path) for end in ("", "-eval")
    )
    sft = assets.resolve("builtin:checkable-sft-eval", tmp_path)
    taught = [json.loads(line) for line in path.read_text().splitlines()]
    asked = [json.loads(line) for line in held_out.read_text().splitlines()]
    assert (len(taught), len(asked)) == (10000, 200)
    questions = {r["prompt"][0]["content"] for r in asked}
    known = {json.loads(line)["messages"][0]["content"] for line in sft.read_text().splitlines()}
    assert questions == known and not questions & {r["prompt"][0]["content"] for r in taught}
    data = PackedSet(build(KINDS[kind], spec(held_out, seq_len=128), tmp_path))
    assert data.stats.num_groups == 200 and not data.rejects()
