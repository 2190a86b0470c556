"""What a run reads: from a recipe's data section to the streams of training and held-out packs."""

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moetrain.config.recipe import Recipe
from moetrain.data import assets, preference, sft, tokenizer
from moetrain.data.cache import cache_root
from moetrain.data.chat import Chat, ChatOptions
from moetrain.data.encode import Kind, Spec
from moetrain.data.rejects import Reject, check_rejects, noted, write_rejects
from moetrain.data.selection import Selection
from moetrain.data.sets import PackedSet, build
from moetrain.data.stream import EvalPacks, Loader, Packs
from moetrain.data.tokenizer_check import check_beside_model
from moetrain.errors import DataError
from moetrain.models.lookup import read_mapping
from moetrain.ops.packed import Packed

# What a method eats: corpora, or a kind of set.
CORPUS = "corpus"
FEEDS: dict[str, str] = {
    "pretrain": CORPUS,
    "cpt": CORPUS,
    "sft": "chat",
    "dft": "chat",
    "chord_sft": "chat",
    "dpo": "pairs",
    "ipo": "pairs",
    "hinge": "pairs",
    "orpo": "pairs",
    "simpo": "pairs",
    "reward": "pairs",
    "kto": "labels",
}
KINDS: dict[str, Kind] = {
    "chat": sft.CHAT,
    "pairs": preference.PAIRS,
    "labels": preference.LABELS,
}


class Shuffled:
    """The packs of a set, shuffled anew each epoch."""

    def __init__(self, data: PackedSet, seed: int, shuffle: bool) -> None:
        self.data, self.seed, self.shuffle = data, seed, shuffle
        self.fingerprint = f"{data.fingerprint}-{seed}-{shuffle}"
        self._epoch, self._order = -1, np.arange(0)

    def __len__(self) -> int:
        return len(self.data)

    def at(self, epoch: int, number: int) -> Packed:
        if not self.shuffle:
            return self.data[number]
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = np.random.default_rng([self.seed, epoch]).permutation(len(self.data))
        return self.data[int(self._order[number])]


class Corpus:
    """Samples of indexed corpora; megatron-core shuffles them."""

    def __init__(self, data: Any) -> None:
        self.data = data
        self.fingerprint: str = data.fingerprint

    def __len__(self) -> int:
        return len(self.data)

    def at(self, epoch: int, number: int) -> Packed:
        return self.data.get(epoch, number)


@dataclass(frozen=True)
class Prepared:
    """What `prepare` found, for the run to say."""

    num_packs: int  # an epoch
    num_steps: int
    num_eval_packs: int
    num_rejected: int
    num_truncated: int
    lines: tuple[str, ...]  # in words


def prepare(recipe: Recipe) -> Prepared:
    """Build and cache all that a run reads; before the process group, in one process or in all.

    Checks the data against the model and writes <run_dir>/rejected.jsonl (on a cache hit too) when
    records were skipped. DataError: no usable data, too many rejected, a tokenizer or index larger
    than the model's vocabulary.
    """
    train, held_out = _packs(recipe, held_out=False), _packs(recipe, held_out=True)
    sets = [p.data for p in (train, held_out) if isinstance(p, Shuffled)]
    rejects = [reject for data in sets for reject in data.rejects()]
    write_rejected(recipe, rejects)
    for data in sets:
        check_rejects(data.rejects(), data.stats.num_records, recipe.data.max_rejected)
    steps = num_steps(recipe, len(train) if train is not None else 0)
    if isinstance(train, Corpus):
        most = limit(recipe, len(train)) or steps * recipe.train.global_batch
        for epoch in range(math.ceil(most / len(train))):
            train.data.epoch(epoch)
    lines = [
        _describe(name, packs, recipe)
        for name, packs in (("train", train), ("eval", held_out))
        if packs is not None
    ]
    if sets:
        chat = chat_of(recipe)
        notes: Counter[str] = Counter()
        for data in sets:
            notes.update(data.stats.notes)
        lines += [*told_of_tokenizer(recipe), *noted(chat.notes(), notes)]
    return Prepared(
        num_packs=len(train) if train is not None else 0,
        num_steps=steps,
        num_eval_packs=len(held_out) if held_out is not None else 0,
        num_rejected=len(rejects),
        num_truncated=sum(data.stats.num_truncated for data in sets),
        lines=tuple(lines),
    )


def _describe(name: str, packs: Packs, recipe: Recipe) -> str:
    if not isinstance(packs, Shuffled):
        return f"{name}: {len(packs)} samples of {recipe.data.seq_len} tokens"
    return told_of_set(name, packs.data, recipe)


def told_of_set(name: str, data: PackedSet, recipe: Recipe) -> str:
    """How much a set holds and what was left out of it, in a line."""
    stats = data.stats
    line = (
        f"{name}: {stats.num_records} records, {stats.num_groups} {data.unit},"
        f" {stats.num_tokens} tokens in"
        f" {stats.num_packs} packs of {recipe.data.seq_len} ({stats.fill:.1%} full)"
    )
    if stats.num_shared:
        line += f"; {stats.num_shared} tokens fewer as prompts are shared"
    if stats.num_truncated:
        line += f"; {stats.num_truncated} truncated to data.seq_len"
    if stats.num_rejected:
        line += f"; {stats.num_rejected} rejected, see {recipe.run_dir / 'rejected.jsonl'}"
    return line


def write_rejected(recipe: Recipe, rejects: list[Reject]) -> None:
    """<run_dir>/rejected.jsonl; no such file when there are none."""
    write_rejects(recipe.run_dir / "rejected.jsonl", rejects)


def build_train(
    recipe: Recipe, dp_rank: int, dp_size: int, reference: Path | None = None
) -> Loader:
    """The training stream of one DP rank; `reference` is what `PackedSet.with_reference` takes.

    In a process group every rank calls this, at the same point.
    """
    packs = _packs(recipe, held_out=False, reference=reference)
    assert packs is not None
    return Loader(packs, recipe.train.global_batch, dp_rank, dp_size, limit(recipe, len(packs)))


def build_eval(
    recipe: Recipe, dp_rank: int, dp_size: int, reference: Path | None = None
) -> EvalPacks | None:
    """The held-out packs of one DP rank, at most train.eval_packs over all.

    None without data.eval and data.eval_share.
    """
    packs = _packs(recipe, held_out=True, reference=reference)
    return (
        EvalPacks(packs, recipe.train.eval_packs, dp_rank, dp_size) if packs is not None else None
    )


def build_set(recipe: Recipe, *, held_out: bool) -> PackedSet | None:
    """The set behind the packs, in its own order; None for corpora, or without
    data.eval and data.eval_share.
    """
    if FEEDS[recipe.method.name] == CORPUS:
        return None
    packs = _packs(recipe, held_out=held_out)
    return packs.data if isinstance(packs, Shuffled) else None


def num_steps(recipe: Recipe, num_packs: int | None = None) -> int:
    """Optimizer steps of the run: train.steps, or as many as train.epochs take, the last one with
    what is left.
    """
    if recipe.train.steps is not None:
        return recipe.train.steps
    if num_packs is None:
        packs = _packs(recipe, held_out=False)
        assert packs is not None
        num_packs = len(packs)
    most = limit(recipe, num_packs)
    assert most is not None
    return math.ceil(most / recipe.train.global_batch)


def limit(recipe: Recipe, num_packs: int) -> int | None:
    """Packs that train.epochs reads, one at least, and no part of one more; None with train.steps,
    which read as many as they need.
    """
    if recipe.train.epochs is None:
        return None
    return max(1, math.floor(recipe.train.epochs * num_packs + 1e-9))


def model_hf(recipe: Recipe) -> dict[str, Any]:
    """The model's Hugging Face configuration; {} when there is none to be read."""
    hf: Any = recipe.model.hf
    path = recipe.model.path
    if hf is None and path is not None and assets.is_builtin(path):
        from moetrain.config import builtin

        hf = builtin.MODELS.get(path.removeprefix("builtin:"))
    elif hf is None and path is not None:
        config, note = (Path(path) / name for name in ("config.json", "moetrain.json"))
        if note.is_file():  # a Megatron checkpoint
            hf = read_mapping(note).get("hf")
        elif config.is_file():
            hf = read_mapping(config)
    return hf if isinstance(hf, dict) else {}


def model_vocab(recipe: Recipe) -> int | None:
    """The model's vocab_size as its configuration says; None when there is none to be read.
    DataError, ConfigError, DamageError.
    """
    vocab = model_hf(recipe).get("vocab_size")
    if vocab is None:
        return None
    if type(vocab) is not int or vocab < 1:
        raise DataError(f"The model's vocab_size is {str(vocab)[:40]!r}: give a number of tokens.")
    return vocab


def told_of_tokenizer(recipe: Recipe) -> list[str]:
    """What is to be said of the run's tokenizer beside the model that it exports. DataError."""
    said = check_beside_model(tokenizer_of(recipe), model_hf(recipe).get("model_type"))
    return [f"note: {said}"] if said else []


def adapter_tokenizer(recipe: Recipe) -> Path | None:
    """The folder of an adapter to go on from, where the tokenizer that it was trained with lies
    beside it and the recipe names no other.
    """
    folder = recipe.adapter.path if recipe.adapter is not None else None
    if folder is None or recipe.model.tokenizer is not None:
        return None
    return folder if (folder / "tokenizer.json").is_file() else None


def tokenizer_of(recipe: Recipe) -> Path:
    """The local folder of the run's tokenizer. DataError when the recipe names none."""
    name = recipe.model.tokenizer or adapter_tokenizer(recipe) or recipe.model.path
    if name is None:
        raise DataError(
            "A model made from model.hf has no tokenizer: set model.tokenizer (a folder or"
            " builtin:NAME)."
        )
    root = cache_root(recipe.data.cache)
    return assets.resolve(name, root) if assets.is_builtin(name) else tokenizer.locate(name)


def chat_of(recipe: Recipe) -> Chat:
    """The run's tokenizer with its chat template. DataError where there is none."""
    return ChatOptions.of(recipe.data).open(tokenizer_of(recipe))


def _packs(recipe: Recipe, *, held_out: bool, reference: Path | None = None) -> Packs | None:
    root = cache_root(recipe.data.cache)
    selection = Selection.of(recipe)
    given = recipe.data.eval if held_out else recipe.data.train
    if held_out and selection is not None:
        selection = selection.other() if selection.share else None
        given = recipe.data.train if selection else given
    if not given:
        if held_out:
            return None
        raise DataError("data.train is empty: give a path, a list of paths or builtin:NAME.")
    inputs = [str(assets.resolve(path, root)) for path in given]
    feed = FEEDS[recipe.method.name]
    if feed == CORPUS:
        return _corpus(recipe, inputs, root, held_out=held_out)
    spec = Spec(
        inputs=tuple(inputs),
        tokenizer=tokenizer_of(recipe),
        seq_len=recipe.data.seq_len,
        too_long=recipe.data.too_long,
        seed=recipe.seed,
        pack=recipe.data.pack,
        share_prompt=recipe.data.share_prompt,
        chat=ChatOptions.of(recipe.data),
        model_vocab=model_vocab(recipe),
        held_out=held_out and selection is None,
        selection=selection,
        num_workers=recipe.data.num_workers,
    )
    data = PackedSet(build(KINDS[feed], spec, root))
    if reference is not None:
        data = data.with_reference(reference)
    return Shuffled(data, recipe.seed, recipe.data.shuffle or held_out)


def _corpus(recipe: Recipe, inputs: list[str], root: Path, *, held_out: bool) -> Corpus:
    from moetrain.data import (
        corpus,
    )  # imports megatron, which instruction tuning's data does not need

    data = corpus.CorpusSet(
        inputs,
        None if held_out else recipe.data.weights,
        seq_len=recipe.data.seq_len,
        seed=recipe.seed,
        root=root,
        held_out=held_out,
        model_vocab=model_vocab(recipe),
    )
    return Corpus(data)
