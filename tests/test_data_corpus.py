"""Indexed corpora: written for Megatron's readers, one stream on all ranks and runs."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from data_helpers import QUESTIONS, recipe, tokenizer_folder, write_jsonl

from moetrain.data import corpus, indexing, pieces, tokenizer
from moetrain.data.loader import Corpus, RunData
from moetrain.errors import DataError
from moetrain.ops.packed import concat, pack_one


def make(folder: Path, name: str, repeat: int = 4, offset: int = 0) -> Path:
    """An index of documents that begin with `name`."""
    texts = [
        {"text": f"{name} {i + offset}: {q} {a}"} for i, (q, a) in enumerate(QUESTIONS * repeat)
    ]
    indexing.index(
        [write_jsonl(folder / f"{name}.jsonl", texts)], tokenizer_folder(), folder / name
    )
    return folder / name


def test_megatron_reads_what_was_written(tmp_path: Path) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    (tmp_path / "one.txt").write_text("A whole file.")
    records = [
        {"text": "What is 1 plus 1?"},
        {"text": ""},
        {"other": "x"},
        {"text": "2"},
        {"text": 2},
    ]
    write_jsonl(tmp_path / "two.jsonl", records)
    inputs = [tmp_path / "one.txt", tmp_path / "two.jsonl"]
    with pytest.raises(DataError, match=r"2 of 5 records were rejected .*--max-rejected"):
        indexing.index(inputs, tokenizer_folder(), tmp_path / "out" / "c")
    assert not list((tmp_path / "out").glob("*.bin")) + list((tmp_path / "out").glob("*.idx"))
    stats = indexing.index(
        inputs, tokenizer_folder(), tmp_path / "out" / "c", indexing.Options(max_rejected=0.5)
    )
    loaded = tokenizer.load(tokenizer_folder())
    dataset = IndexedDataset(str(tmp_path / "out" / "c"))
    eod = loaded.convert_tokens_to_ids("<|endoftext|>")
    expected = ["A whole file.", "What is 1 plus 1?", "2"]
    assert [dataset[i].tolist() for i in range(len(dataset))] == [
        [*loaded(text)["input_ids"], eod] for text in expected
    ]
    assert dataset.document_indices.tolist() == [0, 1, 2, 3]
    assert (stats.num_documents, stats.num_rejected, stats.vocab) == (3, 2, 400)
    assert stats.num_empty == 1
    assert stats.num_tokens == sum(dataset.sequence_lengths)
    rejected = [
        json.loads(line)
        for line in (tmp_path / "out" / "c.rejected.jsonl").read_text().splitlines()
    ]
    assert [(r["line"], r["reason"].split(";")[0]) for r in rejected] == [
        (3, "no text under 'text'"),
        (5, "no text under 'text'"),
    ]


def test_samples_are_consecutive_tokens(tmp_path: Path) -> None:
    made = recipe(tmp_path, method={"name": "pretrain"}, data={"train": [str(make(tmp_path, "a"))]})
    pack = RunData(made).loader(0, 1).next()[0]
    assert pack.num_tokens == 64 and pack.cu_seqlens.tolist() == [0, 64]
    assert torch.equal(pack.labels[:-1], pack.tokens[1:])
    assert bool(pack.valid.all()) and bool((pack.loss_mask == 1).all())
    assert pack.position_ids.tolist() == list(range(64))


@pytest.mark.parametrize("own_length", [64, 7])
def test_documents_are_cut_as_megatron_cuts_them(tmp_path: Path, own_length: int) -> None:
    from megatron.core.datasets.gpt_dataset import _get_ltor_masks_and_position_ids

    sections: dict[str, Any] = {"method": {"name": "pretrain"}}
    data = {"train": [str(make(tmp_path, "a"))], "seq_len": own_length}
    plain = RunData(recipe(tmp_path, data=data, **sections)).loader(0, 1)
    eod = tokenizer.end_of_document(tokenizer.load(tokenizer_folder()))
    keys = {"document_mask": True, "eod_mask_loss": True}
    cut = RunData(recipe(tmp_path, data=data | keys, **sections)).loader(0, 1)
    num_cuts = 0
    for _ in range(6):
        for before, pack in zip(plain.next(), cut.next(), strict=True):
            assert torch.equal(pack.tokens, before.tokens)
            assert torch.equal(pack.labels, before.labels)
            mask, loss, positions = _get_ltor_masks_and_position_ids(
                pack.tokens, eod, True, True, True, True
            )
            assert torch.equal(pack.loss_mask, loss) and torch.equal(pack.position_ids, positions)
            own = pack.sequence_ids
            sees = (own[:, None] == own[None]).tril()
            assert mask is not None and torch.equal(~mask[0], sees)
            assert pack.num_sequences == len(pack.ids) and bool(pack.valid.all())
            num_cuts += pack.num_sequences - 1
            sizes = pack.cu_seqlens.diff().tolist()
            pieces = zip(*(x.split(sizes) for x in (pack.tokens, pack.labels, loss)), strict=True)
            joined = concat([pack_one(*piece) for piece in pieces])
            for name in ("tokens", "labels", "loss_mask", "position_ids", "cu_seqlens", "valid"):
                assert torch.equal(getattr(joined, name), getattr(pack, name)), name
    assert num_cuts > 6
    one = {"eod_mask_loss": True}
    pack = RunData(recipe(tmp_path, data=data | one, **sections)).loader(0, 1).next()[0]
    assert pack.num_sequences == 1


def stream(made: Any, dp_size: int, steps: int) -> list[list[int]]:
    """The first tokens of the packs of some steps, in the job's order."""
    ranks = [RunData(made).loader(rank, dp_size) for rank in range(dp_size)]
    found: list[list[int]] = []
    for _ in range(steps):
        shares = [rank.next() for rank in ranks]
        packs = [shares[r][i] for i in range(len(shares[0])) for r in range(dp_size)]
        found.extend(pack.tokens.tolist() for pack in packs if pack.valid.any())
    return found


def test_the_stream_is_the_same_at_every_layout_and_length(tmp_path: Path) -> None:
    base = {"method": {"name": "pretrain"}, "data": {"train": [str(make(tmp_path, "a"))]}}
    made = recipe(tmp_path, **base, train={"epochs": 2.5})
    steps = RunData(made).num_steps
    whole = stream(made, 1, steps)
    assert whole == stream(made, 4, steps)
    assert whole[: 4 * 3] == stream(recipe(tmp_path, **base, train={"steps": 3}), 2, 3)
    loader = RunData(made).loader(0, 1)
    per_epoch = len(loader.packs)
    assert steps == -(-5 * per_epoch // 8)
    # Each epoch has an order of its own.
    assert whole[:per_epoch] != whole[per_epoch : 2 * per_epoch]
    loader.load_state_dict({**loader.state_dict(), "position": per_epoch + 1})
    assert [p.tokens.tolist() for p in loader.next()] == whole[per_epoch + 1 : per_epoch + 5]


def test_blends_keep_their_weights(tmp_path: Path) -> None:
    prefixes = [str(make(tmp_path, "a")), str(make(tmp_path, "b", offset=500))]
    for weights, share in (([0.75, 0.25], 0.75), ([1, 9], 0.1), (None, 0.5)):
        data = {"train": prefixes, "weights": weights}
        made = recipe(tmp_path, method={"name": "pretrain"}, data=data, train={"epochs": 1})
        loader = RunData(made).loader(0, 1)
        assert isinstance(loader.packs, Corpus)
        drawn = loader.packs.data.epoch(0).dataset_index
        assert len(drawn) == len(loader.packs)
        assert abs((drawn == 0).mean() - share) < 0.02
        if weights is None:
            unique = {
                tuple(loader.packs.at(0, i).tokens.tolist()) for i in range(len(loader.packs))
            }
            assert len(unique) == len(loader.packs)  # each sample once


def test_a_remade_index_is_read_in_its_own_order(tmp_path: Path) -> None:
    prefix = make(tmp_path, "a")
    made = recipe(tmp_path, method={"name": "pretrain"}, data={"train": [str(prefix)]})
    state = RunData(made).loader(0, 1).state_dict()
    make(tmp_path, "a", repeat=2)
    again = RunData(made).loader(0, 1)
    assert len(stream(made, 1, 20)) == 80
    with pytest.raises(DataError, match="other training data"):
        again.load_state_dict(state)


def test_held_out_text_and_cpt(tmp_path: Path) -> None:
    prefixes = [str(make(tmp_path, name)) for name in ("a", "b")]
    data = {"train": f"{prefixes[0]}.bin", "eval": prefixes}
    made = recipe(tmp_path, method={"name": "cpt"}, data=data)
    prepared = RunData(made).prepare()
    shares = [RunData(made).eval_packs(rank, 2) for rank in range(2)]
    assert all(share is not None for share in shares)
    real = [p for share in shares for p in share or [] if p.valid.any()]
    assert len(real) == prepared.num_eval_packs > 0
    assert len({tuple(p.tokens.tolist()) for p in real}) == len(real)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"train": ["nowhere/x"]}, "moetrain data index"),
        ({"train": ["{a}"], "seq_len": 100_000}, "too few for a sample"),
        ({"train": ["{a}"], "shuffle": False}, "data.shuffle"),
        ({"train": ["{cut}"]}, "cut short"),
        ({"train": ["{bad}"]}, "not a Megatron index"),
    ],
)
def test_unusable_indexes(tmp_path: Path, data: dict[str, Any], message: str) -> None:
    made = make(tmp_path, "a")
    for suffix in (".bin", ".idx"):
        content = Path(f"{made}{suffix}").read_bytes()
        (tmp_path / f"cut{suffix}").write_bytes(content[:100] if suffix == ".bin" else content)
        (tmp_path / f"bad{suffix}").write_bytes(content if suffix == ".bin" else b"MMIDIDX\x00\x00")
    names = [t.format(a=made, cut=tmp_path / "cut", bad=tmp_path / "bad") for t in data["train"]]
    with pytest.raises((DataError, ValueError), match=message):
        RunData(
            recipe(tmp_path, method={"name": "pretrain"}, data={**data, "train": names})
        ).prepare()


def test_an_index_of_a_larger_vocabulary_is_refused(tmp_path: Path) -> None:
    prefix = make(tmp_path, "a")
    hf = {"architectures": ["Qwen3MoeForCausalLM"], "vocab_size": 262}
    made = recipe(
        tmp_path, method={"name": "pretrain"}, model={"hf": hf}, data={"train": [str(prefix)]}
    )
    with pytest.raises(DataError, match="has 400 tokens but the model's vocab_size is 262"):
        RunData(made).prepare()
    # Without the note, or with that of another index, the tokens themselves are looked at.
    note = Path(f"{prefix}.json")
    said = json.loads(note.read_text())
    note.write_text(json.dumps(said | {"vocab": 200, "num_tokens": said["num_tokens"] + 1}))
    for _ in range(2):
        with pytest.raises(DataError, match=r"The index .* model's vocab_size is 262"):
            RunData(made).prepare()
        note.unlink(missing_ok=True)


def _on_a_rank(folder: str, prefixes: list[str], prepared: bool) -> list[list[int]]:
    import os

    from moetrain.engine.world import join

    made = recipe(
        Path(folder), method={"name": "pretrain"}, data={"train": prefixes}, train={"epochs": 3}
    )
    if prepared:
        RunData(made).prepare()
    join()
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    loader = RunData(made).loader(rank, world)
    return [p.tokens.tolist() for _ in range(RunData(made).num_steps) for p in loader.next()]


@pytest.mark.gloo
@pytest.mark.parametrize("prepared", [True, False])
def test_ranks_of_a_gloo_group_share_the_stream(
    tmp_path: Path, workers: Any, prepared: bool
) -> None:
    prefixes = [str(make(tmp_path, name)) for name in ("a", "b")]
    shares = workers.run(2, _on_a_rank, str(tmp_path), prefixes, prepared)
    elsewhere = recipe(
        tmp_path / "alone",
        method={"name": "pretrain"},
        data={"train": prefixes},
        train={"epochs": 3},
    )
    alone = stream(elsewhere, 1, RunData(elsewhere).num_steps)
    assert [t for pair in zip(*shares, strict=True) for t in pair] == alone


def test_empty_documents_are_counted_and_not_held_against_the_limit(tmp_path: Path) -> None:
    """A crawl has many; in a table an empty one may be null."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    texts = ["one", "", None, " \n", "two"]
    lines = [*({"text": text} for text in texts), "", {"text": None, "url": "x"}]
    write_jsonl(tmp_path / "a.jsonl", lines)
    pq.write_table(pa.table({"text": texts, "url": ["x"] * 5}), tmp_path / "b.parquet")
    (tmp_path / "c.txt").write_text("\n")
    stats = indexing.index(
        [tmp_path], tokenizer_folder(), tmp_path / "c", indexing.Options(max_rejected=0.0)
    )
    assert (stats.num_documents, stats.num_empty, stats.num_rejected) == (4, 9, 0)
    assert not (tmp_path / "c.rejected.jsonl").exists()
    summary = stats.summary(tmp_path / "c")
    assert summary.startswith(f"wrote {tmp_path}/c.bin and {tmp_path}/c.idx: 4 documents, ")
    assert "9 empty ones skipped" in summary and summary.endswith(f"data.train={tmp_path}/c")


@pytest.mark.parametrize("how", ["reject", "escape", "keep"])
def test_control_tokens_in_documents(tmp_path: Path, how: Any) -> None:
    """A page about ChatML would end the document, or begin a turn, in the middle."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    texts = ["Plain.", "It ends with <|endoftext|>, then <|im_start|>system\n.", "<think> is text."]
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in texts])
    prefix = tmp_path / "a"
    stats = indexing.index(
        [path], tokenizer_folder(), prefix, indexing.Options(max_rejected=0.5, special_tokens=how)
    )
    found = IndexedDataset(str(prefix))
    loaded = tokenizer.load(tokenizer_folder())
    documents = [found[i].tolist()[:-1] for i in range(len(found))]
    ends = ["<|endoftext|>", "<|im_start|>"]
    special = {
        i
        for i, name in enumerate(loaded.convert_ids_to_tokens([*range(len(loaded))]))
        if name in ends
    }
    kept = [text for text in texts if how != "reject" or "<|" not in text]
    assert [loaded.decode(ids) for ids in documents] == kept
    assert any(special & set(ids) for ids in documents) == (how == "keep")
    assert (stats.num_rejected, stats.num_special) == ((1, 0) if how == "reject" else (0, 1))
    if how == "reject":
        reason = (tmp_path / "a.rejected.jsonl").read_text()
        assert "'<|endoftext|>'" in reason and "--special-tokens" in reason
    else:
        assert "control tokens in 1 of them" in stats.summary(prefix)


def test_a_limit_passed_early_stops_and_passed_late_keeps_the_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pieces, "FIRST", 1 << 12)
    monkeypatch.setattr(indexing, "FEWEST", 200)
    monkeypatch.setattr(indexing, "EARLY", 400)
    good = [{"text": f"{i}"} for i in range(450)]
    write_jsonl(tmp_path / "late.jsonl", [*good, *[{"no": 1}] * 50])
    with pytest.raises(DataError, match=r"50 of 500 .*--max-rejected.* 450 documents is whole"):
        indexing.index([tmp_path / "late.jsonl"], tokenizer_folder(), tmp_path / "late")
    prefix = tmp_path / "late"
    kept = corpus.CorpusSet([str(prefix)], None, seq_len=8, seed=1, root=tmp_path / "cache")
    assert len(kept) > 40
    rejected = (tmp_path / "late.rejected.jsonl").read_text().splitlines()
    assert len(rejected) == 50
    # Nothing after the first few hundred records is read, however long the file.
    write_jsonl(tmp_path / "early.jsonl", [*[{"no": 1}] * 150, *good, *good])
    with pytest.raises(DataError, match=r"1\d\d of [2-4]\d\d records were rejected"):
        indexing.index([tmp_path / "early.jsonl"], tokenizer_folder(), tmp_path / "early")
    assert not list(tmp_path.glob("early.*.idx")) + list(tmp_path.glob("early*.bin"))


def test_a_corpus_that_is_listed_twice_or_copied_is_refused(tmp_path: Path) -> None:
    """megatron-core 0.19 would give each sample twice in a row."""
    import shutil

    a, b = make(tmp_path, "a"), make(tmp_path, "b", offset=500)
    copied = tmp_path / "copied"
    for suffix in (".bin", ".idx"):
        shutil.copyfile(f"{a}{suffix}", f"{copied}{suffix}")
    how: dict[str, Any] = {"seq_len": 32, "seed": 1, "root": tmp_path / "cache"}
    for prefixes in ([a, b, a], [a, Path(f"{a}.bin")], [copied, b, a]):
        for weights in (None, [1.0] * len(prefixes)):
            with pytest.raises(DataError, match=r"once more: .*train.epochs"):
                corpus.CorpusSet([str(p) for p in prefixes], weights, **how)
    # The same lengths are not the same corpus.
    other = bytearray(Path(f"{a}.bin").read_bytes())
    other[-1] ^= 1
    Path(f"{copied}.bin").write_bytes(other)
    assert len(corpus.CorpusSet([str(a), str(copied)], None, **how)) > 0


def test_an_index_with_several_sequences_a_document_is_refused(tmp_path: Path) -> None:
    """As Megatron's own tool makes with --split-sentences: GPTDataset would shuffle sentences."""
    import numpy as np
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(str(tmp_path / "s.bin"), dtype=np.uint16)
    for document in range(20):
        for sentence in range(5):
            builder.add_item(torch.full((8,), 5 * document + sentence))
        builder.end_document()
    builder.finalize(str(tmp_path / "s.idx"))
    with pytest.raises(DataError, match="100 sequences in 20 documents"):
        corpus.CorpusSet([str(tmp_path / "s")], None, seq_len=16, seed=1, root=tmp_path / "cache")
