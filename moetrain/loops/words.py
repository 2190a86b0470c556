"""A teacher's words for a run's records: its likeliest tokens wherever one is learned, computed
once and kept in the cache, so that all runs of a sweep read one folder.
"""

import gc
import json
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from itertools import batched
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from rich.progress import track

from moetrain import files
from moetrain.config.recipe import Recipe
from moetrain.data.cache import build_once, cache_root, key_of
from moetrain.data.loader import RunData
from moetrain.data.run_tokenizer import model_vocab
from moetrain.data.sets import PackedSet
from moetrain.data.trajectories import Word
from moetrain.data.words import Words, WordsWriter
from moetrain.engine import Engine
from moetrain.engine.on_disk import model_digest
from moetrain.engine.world import World
from moetrain.errors import DataError
from moetrain.loops.reference import References, take_reference, tokenizer_digest
from moetrain.loops.teacher import engine_of
from moetrain.loops.teacher_servers import TeacherServers
from moetrain.methods import METHODS

VERSION = 1
AT_A_TIME = 8  # packs of a data-parallel rank; records for each that servers score at a time
CLOSE = 0.05  # nats, more than rounding makes of a log-prob

Learned = tuple[int, Word]
"""A sequence, and what the teacher says at its learned places."""


def open_with_references(
    data: RunData, report: Callable[[str], None], *, train: bool = True
) -> tuple[Engine, References]:
    """A run's engine as it starts, and what another model says of its records: a teacher's words,
    in folders, or a reference's log-probs, as `take_reference` has them. Collective.
    """
    recipe = data.recipe
    if not recipe.method.taught:
        return take_reference(data, report, train=train)
    assert recipe.teacher is not None
    if recipe.teacher.path is None:
        engine = Engine(recipe, train=train)
        return engine, _of_servers(engine.world, data, report)
    words = _of_model(data, recipe.teacher.path, report)
    return Engine(recipe, train=train), words


def fill(recipe: Recipe) -> int:
    """`moetrain score RECIPE`: put a recipe's reference log-probs, or its teacher's words, into the
    cache, for all runs that ask for the same. Collective; returns the exit code.
    """
    method = METHODS[recipe.method.name]
    if not method.needs & {"ref_logp", "at_teacher"} or recipe.method.samples:
        raise DataError(
            f"method {method.name} has no reference and no teacher's words that could be kept:"
            " there is nothing to score."
        )
    data = RunData(recipe)
    data.prepare()
    engine, references = open_with_references(data, lambda line: None, train=False)
    for what, path in (("train", references.train), ("held out", references.held_out)):
        if path is not None and engine.world.is_first:
            print(f"{what}: {path if path.is_dir() else path.parent}")
    engine.close()
    return 0


def _of_model(data: RunData, path: str, report: Callable[[str], None]) -> References:
    """By an engine, which is gone before the run's is built."""
    words = _by_model(data, path, report)
    gc.collect()  # a model is a circle through its hooks
    torch.cuda.empty_cache()
    return words


def _by_model(data: RunData, path: str, report: Callable[[str], None]) -> References:
    recipe = data.recipe
    engine = engine_of(recipe, path, None, model_vocab(recipe))
    world = engine.world
    identity = {
        "model": world.first(lambda: model_digest(engine.recipe, engine.source)),
        "dtype": recipe.model.dtype,
    }
    shows = world.is_first and recipe.observe.progress
    build = partial(_by_engine, engine, recipe.method.teacher_tokens, shows)
    return _both(world, data, identity, build, report)


def _of_servers(world: World, data: RunData, report: Callable[[str], None]) -> References:
    """By teacher.address, which the first rank asks."""
    with ExitStack() as stack:
        held: list[TeacherServers] = []

        def look() -> list[str]:
            held.append(TeacherServers(data.recipe))
            stack.callback(held[0].close)
            return held[0].models

        identity: dict[str, Any] = {"served": world.first(look)}
        assert data.recipe.teacher is not None
        identity["address"] = data.recipe.teacher.address

        def build(packed: PackedSet, folder: Path, identity: dict[str, Any]) -> None:
            world.first_slowly(lambda: _by_servers(held[0], packed, folder, identity))

        words = _both(world, data, identity, build, report)
        for held_out, folder in ((False, words.train), (True, words.held_out)):
            packed = data.packed(held_out=held_out)
            if packed is not None and folder is not None:
                world.first(lambda p=packed, f=folder: _still_says(held[0], p, f))
        return words


def _both(
    world: World,
    data: RunData,
    identity: dict[str, Any],
    build: Callable[[PackedSet, Path, dict[str, Any]], None],
    report: Callable[[str], None],
) -> References:
    """The folders of data.train and of what is held out, built where the cache lacks them."""
    recipe = data.recipe
    whole = identity | {
        "version": VERSION,
        "k": recipe.method.teacher_tokens,
        "tokenizer": tokenizer_digest(recipe),
    }
    folders: list[Path | None] = []
    for held_out in (False, True):
        packed = data.packed(held_out=held_out)
        if packed is None:
            folders.append(None)
            continue
        of_set = whole | {"data": packed.sequences_fingerprint}
        folder = cache_root(recipe.data.cache) / "words" / key_of(of_set)
        if not world.all(folder.is_dir()):
            started = time.perf_counter()
            build(packed, folder, of_set)
            seconds = time.perf_counter() - started
            report(f"a teacher's words on {packed.num_items} records in {seconds:.0f} s: {folder}")
        if not world.all(folder.is_dir()):
            raise DataError(
                f"{folder} is not on every node: a teacher's words are written once. Point"
                " data.cache or $MOETRAIN_CACHE at a folder that all nodes share"
            )
        folders.append(folder)
    return References(*folders)


def _by_engine(
    engine: Engine, k: int, shows: bool, packed: PackedSet, folder: Path, identity: dict[str, Any]
) -> None:
    """All packs, dealt to the replicas; the first rank writes. Collective."""
    world = engine.world
    with ExitStack() as stack:
        held: list[_Folder] = []
        world.first(lambda: held.append(stack.enter_context(_Folder(folder, packed, k, identity))))
        rounds = list(batched(range(len(packed)), AT_A_TIME * world.dp_size))
        for together in track(rounds, "a teacher's words", disable=not shows):
            made = _learned(engine, packed, together[world.dp_rank :: world.dp_size], k)
            every = world.to_first(made if world.adds_loss else [])
            world.first(lambda every=every: held[0].write(every or []))
        world.first(lambda: held[0].publish())


def _learned(engine: Engine, packed: PackedSet, indices: tuple[int, ...], k: int) -> list[Learned]:
    """Of the sequences in these packs. Collective."""
    packs = [packed[i] for i in indices]
    made: list[Learned] = []
    for index, pack, out in zip(indices, packs, engine.likeliest(packs, k), strict=True):
        assert out.likeliest is not None and out.at_teacher is not None
        starts = pack.cu_seqlens.tolist()
        for item, begin, end in zip(packed.items(index), starts, starts[1:], strict=False):
            places = pack.loss_mask[begin:end].nonzero()[:, 0] + begin
            word = Word(
                out.logp[places].numpy(),
                out.likeliest[places].to(torch.int32).numpy(),
                out.at_teacher[places].numpy(),
            )
            made.append((item, word))
    return made


def _by_servers(
    servers: TeacherServers, packed: PackedSet, folder: Path, identity: dict[str, Any]
) -> None:
    """All sequences, some at a time."""
    items = range(packed.num_items)
    with _Folder(folder, packed, servers.k, identity) as made:
        for some in batched(items, AT_A_TIME * servers.concurrency):
            made.write([list(zip(some, _asked(servers, packed, some), strict=True))])
        made.publish()


def _asked(servers: TeacherServers, packed: PackedSet, items: tuple[int, ...]) -> Iterator[Word]:
    """What servers say at the learned places of these sequences."""
    whole = [packed.sequence(item).tolist() for item in items]
    words = servers.words([(tokens[:1], tokens[1:]) for tokens in whole])
    for item, word in zip(items, words, strict=True):
        places = packed.learned(item) - 1
        yield Word(word.logp[places], word.ids[places], word.top[places])


def _still_says(servers: TeacherServers, packed: PackedSet, folder: Path) -> None:
    """Raise DataError where a server no longer says what is kept: other weights have its name."""
    (now,) = _asked(servers, packed, (0,))
    kept = Words(folder, packed.num_learned)
    end = int(kept.starts[1])
    # Which of two that are nearly level is in the list may change; what the k-th has does not.
    far = np.abs(np.sort(now.top, 1) - np.sort(kept.top[:end], 1)).max(initial=0.0)
    if far > CLOSE:
        raise DataError(
            f"teacher.address: its log-probs are {far:.2g} nats from those in {folder}: other"
            " weights have the same name. Remove that folder, or give the server another name"
        )


class _Folder:
    """The words of a set as they are written: beside their place in the cache until `publish`."""

    def __init__(self, folder: Path, packed: PackedSet, k: int, identity: dict[str, Any]):
        self.folder, self.identity = folder, identity
        self._stack = ExitStack()
        folder.parent.mkdir(parents=True, exist_ok=True)
        self.aside = self._stack.enter_context(files.sibling_folder(folder))
        self.writer = WordsWriter(self.aside, packed.num_learned, k)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def write(self, parts: list[list[Learned]]) -> None:
        """Sequences, as every rank has them."""
        for item, word in (one for part in parts for one in part):
            self.writer.write(item, word.ids, word.top)

    def publish(self) -> None:
        """Into the cache. Another run may have been as quick, with the same numbers."""
        self.writer.close()
        (self.aside / "identity.json").write_text(json.dumps(self.identity, indent=1))

        def fill(tmp: Path) -> None:
            for path in self.aside.iterdir():
                path.rename(tmp / path.name)

        build_once(self.folder, fill)
