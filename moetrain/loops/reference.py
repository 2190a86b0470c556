"""Reference log-probs: what the reference says of every answer, computed once before training.

They lie in the cache under a key of the model, the tokenizer, the tokens of the data and the
precision, so that all runs of a sweep read one file and no second model is ever in memory: another
model's engine is closed before the run's own is built.
"""

import gc
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import batched
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import track
from torch import Tensor

from moetrain.config.method import DpoMethod, ReferencedMethod
from moetrain.config.recipe import Recipe
from moetrain.data.cache import build_once, cache_root, digest_files, key_of
from moetrain.data.loader import RunData
from moetrain.data.run_tokenizer import model_vocab, tokenizer_of
from moetrain.data.sets import PackedSet
from moetrain.data.tokenizer import check_vocab
from moetrain.data.tokenizer_files import tokenizer_files
from moetrain.engine import Engine
from moetrain.engine.on_disk import model_digest, model_in
from moetrain.engine.source import ModelSource
from moetrain.errors import DataError
from moetrain.methods.pairs import tail_weights
from moetrain.ops.packed import Packed
from moetrain.ops.segment import segment_sum

VERSION = 2
START, BASE = "start", "base"
FAR = 0.5  # nats an answer, more than rounding makes of them
PACKS_AT_A_TIME = 8  # of one data-parallel rank, between two words to the progress display


@dataclass(frozen=True)
class References:
    """Files of a run's reference log-probs; None where it asks for none."""

    train: Path | None = None
    held_out: Path | None = None


def take_reference(
    data: RunData, report: Callable[[str], None], *, train: bool = True
) -> tuple[Engine, References]:
    """A run's engine as it starts, an earlier adapter included, and its reference log-probs,
    computed where the cache lacks them: those of the start, or of the base without that adapter, or
    of another model, whose engine is closed before the run's is built. Collective.
    """
    recipe, method = data.recipe, data.recipe.method
    reference = method.reference if isinstance(method, ReferencedMethod) else None
    references = References()
    if reference not in (None, START, BASE):
        references = _of_another(data, reference, report)
    engine = Engine(recipe, train=train)
    if reference == BASE:
        with engine.as_base():
            references = _of(engine, data, report)
    if reference == START:
        references = _of(engine, data, report)
    return engine, references


def _of_another(data: RunData, folder: str, report: Callable[[str], None]) -> References:
    """The log-probs that the model in `folder` gives the run's tokens."""
    recipe, tokenizer = data.recipe, tokenizer_of(data.recipe)
    model = recipe.model.model_copy(
        update={
            "path": model_in(folder),
            "hf": None,
            "init": None,
            "tokenizer": str(tokenizer),
        }
    )
    other = recipe.model_copy(update={"model": model, "adapter": None, "trainable": None})
    packed = data.packed(held_out=False)
    assert packed is not None, "a method with a reference learns from packed sets"
    check_vocab(packed.stats.vocab, model_vocab(other), f"The tokenizer {tokenizer}")
    engine = Engine(other, train=False)
    references = _of(engine, data, report)
    del engine
    gc.collect()  # a model is a circle through its hooks
    torch.cuda.empty_cache()
    return references


def _of(engine: Engine, data: RunData, report: Callable[[str], None]) -> References:
    return References(*(_file(engine, data, report, held_out=h) for h in (False, True)))


def _file(
    engine: Engine, run_data: RunData, report: Callable[[str], None], *, held_out: bool
) -> Path | None:
    """The file of what the engine's model gives, computed when the cache lacks it; None without
    such data. Collective.
    """
    recipe, data = engine.recipe, run_data.packed(held_out=held_out)
    if data is None:
        return None
    identity = _identity(engine, data)
    given = None if held_out else recipe.data.reference
    folder = given or cache_root(recipe.data.cache) / "reference" / key_of(identity)
    if given is not None or engine.world.all(folder.is_dir()):
        _check(folder, identity)
    else:
        started = time.perf_counter()
        table = _score(engine, data, shows=engine.world.is_first and recipe.observe.progress)
        if engine.world.is_first:
            keep(folder, table, identity)
        engine.world.barrier()
        keep(folder, table, identity)  # where a node has a cache of its own
        seconds = time.perf_counter() - started
        report(f"reference log-probs of {data.num_items} answers in {seconds:.0f} s: {folder}")
    return folder / "logp.npy"


def far_from_reference(recipe: Recipe, metrics: Mapping[str, float]) -> str | None:
    """What to warn of at a run's first step, when the model's answers are not yet its own: the
    reference is another model than the one that is trained.
    """
    method = recipe.method
    if not isinstance(method, ReferencedMethod):
        return None
    names = ("rewards/margins", "rewards/chosen", "rewards/rejected")
    nats = max((abs(metrics.get(name, 0.0)) / method.beta for name in names), default=0.0)
    if nats <= FAR:
        return None
    if method.reference != START:
        cause = (
            f"method.reference is {method.reference}, and the run starts from another model; start"
            " would take that"
        )
    elif recipe.data.reference is not None:
        cause = f"those in data.reference={recipe.data.reference} were made otherwise; leave it out"
    else:
        cause = "both are the same weights, so it is rounding: try model.dtype=fp32"
    return (
        f"WARNING: at the first step an answer's log-prob is {nats:.1f} nats from the reference's"
        f" (rewards/margins {metrics.get('rewards/margins', 0.0):.3f}, and 0 is expected). {cause}."
    )


def _score(engine: Engine, data: PackedSet, *, shows: bool) -> Tensor:
    """[num_items] fp32 on the CPU: the sum of the log-probs of each answer's scored tokens."""
    world, alpha = engine.world, _ld_alpha(engine.recipe)
    table = torch.zeros(data.num_items, dtype=torch.float64)
    rounds = list(batched(range(len(data)), PACKS_AT_A_TIME * world.dp_size))
    for together in track(rounds, "reference log-probs", disable=not shows):
        mine = [data[i] for i in together[world.dp_rank :: world.dp_size]]
        for pack, logp in zip(mine, engine.logprobs(mine), strict=True):
            if alpha is not None:
                logp = logp * tail_weights(pack, alpha)
            scored, items = answers(pack, logp)
            table[items] = scored.double()
    return world.sum(table, world.dp_group).float()


def answers(pack: Packed, logp: Tensor) -> tuple[Tensor, Tensor]:
    """(sum of log-probs [m] fp32, item [m]) of the m answers in a pack, from [t] log-probs."""
    sums = segment_sum(logp * pack.loss_mask, pack.cu_seqlens)
    is_answer = pack.extras["role"] > 0
    return sums[is_answer], pack.extras["item"][is_answer]


def _identity(engine: Engine, data: PackedSet) -> dict[str, Any]:
    """All that decides the numbers, by what a user would call it."""
    recipe = engine.recipe
    return (
        {
            "version": VERSION,
            "model": engine.world.first(lambda: _model_digest(recipe, engine.source)),
            "dtype": recipe.model.dtype,
            "tokenizer": tokenizer_digest(recipe),
            "data": data.sequences_fingerprint,
        }
        | _started_from(recipe)
        | _counted(recipe)
    )


def _started_from(recipe: Recipe) -> dict[str, Any]:
    """The adapter that is part of the reference, where there is one."""
    method, adapter = recipe.method, recipe.adapter
    if adapter is None or adapter.path is None:
        return {}
    if not isinstance(method, ReferencedMethod) or method.reference != START:
        return {}
    files = [path for path in sorted(adapter.path.glob("adapter_*")) if path.is_file()]
    digests = digest_files(files, cache_root(recipe.data.cache))
    return {"adapter": key_of([digest for _, digest in digests])}


def _ld_alpha(recipe: Recipe) -> float | None:
    return recipe.method.ld_alpha if isinstance(recipe.method, DpoMethod) else None


def _counted(recipe: Recipe) -> dict[str, Any]:
    """How an answer's tokens are counted, where that is not all alike."""
    alpha = _ld_alpha(recipe)
    return {} if alpha is None else {"ld_alpha": alpha}


def tokenizer_digest(recipe: Recipe) -> str:
    """Of the files that decide what the run's text becomes."""
    files = tokenizer_files(tokenizer_of(recipe))
    return key_of([digest for _, digest in digest_files(files, cache_root(recipe.data.cache))])


def keep(folder: Path, table: Tensor, identity: dict[str, Any]) -> None:
    """Put a reference into the cache. Another run may have been as quick, with equal numbers."""

    def fill(tmp: Path) -> None:
        np.save(tmp / "logp.npy", table.numpy())
        (tmp / "identity.json").write_text(json.dumps(identity, indent=1))

    build_once(folder, fill)


def _check(folder: Path, identity: dict[str, Any]) -> None:
    """DataError when a cache was made with another model, tokenizer or data."""
    try:
        stored = json.loads((folder / "identity.json").read_text())
    except (OSError, ValueError) as error:
        raise DataError(
            f"{folder} holds no reference log-probs ({error}). Leave data.reference out, or remove"
            " it from the cache: they are computed then."
        ) from error
    for name in identity | stored:
        if stored.get(name) != identity.get(name):
            raise DataError(
                f"{folder}: these reference log-probs were made with another {name}"
                f" ({stored.get(name)}, not {identity.get(name)}). Leave data.reference out, or"
                " give those of this run."
            )


def _model_digest(recipe: Recipe, source: ModelSource) -> str:
    try:
        return model_digest(recipe, source)
    except OSError as error:
        raise DataError(
            f"{error.filename}: {error.strerror or error}. Is the model whole?"
        ) from None
