"""What a run reads: from a recipe's data section to the streams of training and held-out packs."""

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moetrain.config.method import KtoMethod
from moetrain.config.recipe import Recipe
from moetrain.config.section import MethodSection
from moetrain.data import assets, preference, sft
from moetrain.data.boundaries import Boundaries
from moetrain.data.cache import cache_root
from moetrain.data.chat import ChatOptions
from moetrain.data.encode import SetKind, Spec
from moetrain.data.rejects import check_rejects, noted, write_rejects
from moetrain.data.run_tokenizer import chat_of, model_vocab, tokenizer_notes, tokenizer_of
from moetrain.data.selection import Selection
from moetrain.data.sets import PackedSet, build
from moetrain.data.stream import EvalPacks, Loader, Packs
from moetrain.errors import DataError, plural
from moetrain.ops.packed import Packed

# What MethodSection.learns_from says, of records that become sequences before the run.
KINDS: dict[str, SetKind] = {
    "chat": sft.CHAT,
    "pairs": preference.PAIRS,
    "labels": preference.LABELS,
}


def kind_of(method: MethodSection) -> SetKind:
    """How the records of a method become sequences."""
    if isinstance(method, KtoMethod) and method.loss_type != "kto":
        return preference.LABELS_ALONE
    return KINDS[method.learns_from]


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
    """What `RunData.prepare` found, for the run to report."""

    num_packs: int  # an epoch
    num_steps: int
    num_eval_packs: int
    num_rejected: int
    num_truncated: int
    lines: tuple[str, ...]  # in words


class RunData:
    """All that a run of packs reads, opened once: training packs and held-out ones.

    Opening builds and caches what is not there yet: before the process group, in one process or in
    all. DataError: no usable data, a tokenizer or index larger than the model's vocabulary.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        train = _packs(recipe, held_out=False)
        assert train is not None, "data.train is not empty"
        self.train: Packs = train
        self.held_out: Packs | None = _packs(recipe, held_out=True)

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the run."""
        return num_steps(self.recipe, len(self.train))

    def prepare(self) -> Prepared:
        """Check the data against the recipe and write <run_dir>/rejected.jsonl (on a cache hit too)
        when records were skipped. DataError when too many are.
        """
        recipe, train = self.recipe, self.train
        both = (self.packed(held_out=held_out) for held_out in (False, True))
        sets = [data for data in both if data is not None]
        rejects = [reject for data in sets for reject in data.rejects()]
        write_rejects(recipe.run_dir / "rejected.jsonl", rejects)
        for data in sets:
            check_rejects(data.rejects(), data.stats.num_records, recipe.data.max_rejected)
        if isinstance(train, Corpus):
            most = limit(recipe, len(train)) or self.num_steps * recipe.train.global_batch
            for epoch in range(math.ceil(most / len(train))):
                train.data.epoch(epoch)
        lines = [
            _describe(name, packs, recipe)
            for name, packs in (("train", train), ("eval", self.held_out))
            if packs is not None
        ]
        if sets:
            notes: Counter[str] = Counter()
            for data in sets:
                notes.update(data.stats.notes)
            lines += [*tokenizer_notes(recipe), *noted(chat_of(recipe).notes(), notes)]
        return Prepared(
            num_packs=len(train),
            num_steps=self.num_steps,
            num_eval_packs=len(self.held_out) if self.held_out is not None else 0,
            num_rejected=len(rejects),
            num_truncated=sum(data.stats.num_truncated for data in sets),
            lines=tuple(lines),
        )

    def packed(self, *, held_out: bool) -> PackedSet | None:
        """The set behind the packs, in its own order; None for corpora and where there is none."""
        packs = self.held_out if held_out else self.train
        return packs.data if isinstance(packs, Shuffled) else None

    def loader(self, dp_rank: int, dp_size: int, reference: Path | None = None) -> Loader:
        """The training stream of one DP rank; `reference` is the file that
        `PackedSet.with_reference` takes, or the folder that `with_words` takes.
        """
        packs, batch = _with_reference(self.train, reference), self.recipe.train.global_batch
        return Loader(packs, batch, dp_rank, dp_size, limit(self.recipe, len(packs)))

    def eval_packs(
        self, dp_rank: int, dp_size: int, reference: Path | None = None
    ) -> EvalPacks | None:
        """The held-out packs of one DP rank, at most train.eval_packs over all; None without
        data.eval and data.eval_share.
        """
        if self.held_out is None:
            return None
        packs = _with_reference(self.held_out, reference)
        return EvalPacks(packs, self.recipe.train.eval_packs, dp_rank, dp_size)


def _with_reference(packs: Packs, reference: Path | None) -> Packs:
    if reference is None:
        return packs
    assert isinstance(packs, Shuffled), "corpora have no reference log-probs"
    data = packs.data
    beside = data.with_words if reference.is_dir() else data.with_reference
    return Shuffled(beside(reference), packs.seed, packs.shuffle)


def _describe(name: str, packs: Packs, recipe: Recipe) -> str:
    if not isinstance(packs, Shuffled):
        return f"{name}: {plural(len(packs), 'sample')} of {recipe.data.seq_len} tokens"
    return describe_set(name, packs.data, recipe)


def describe_set(name: str, data: PackedSet, recipe: Recipe) -> str:
    """How much a set holds and what was left out of it, in a line."""
    stats = data.stats
    line = (
        f"{name}: {plural(stats.num_records, 'record')}, {stats.num_groups} {data.unit},"
        f" {plural(stats.num_tokens, 'token')} in"
        f" {plural(stats.num_packs, 'pack')} of {recipe.data.seq_len} ({stats.fill:.1%} full)"
    )
    if stats.num_shared:
        line += f"; {stats.num_shared} tokens fewer as prompts are shared"
    if stats.num_truncated:
        line += f"; {stats.num_truncated} truncated to data.seq_len"
    if stats.num_rejected:
        line += f"; {stats.num_rejected} rejected, see {recipe.run_dir / 'rejected.jsonl'}"
    return line


def num_steps(recipe: Recipe, num_packs: int) -> int:
    """Optimizer steps of a run over `num_packs`: train.steps, or as many as train.epochs take, the
    last one with what is left.
    """
    if recipe.train.steps is not None:
        return recipe.train.steps
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


def _packs(recipe: Recipe, *, held_out: bool) -> Packs | None:
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
    if recipe.method.learns_from == "corpus":
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
    data = PackedSet(build(kind_of(recipe.method), spec, root))
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
        boundaries=Boundaries.of(recipe),
    )
    return Corpus(data)
