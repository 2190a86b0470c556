"""Reference log-probs: what the model says of every answer before it is trained, computed once.

They lie in the cache under a key of the model, the tokenizer, the tokens of the data and the
precision, so that all runs of a sweep read one file and no second model is ever in memory.
"""

import json
import time
from collections.abc import Callable
from itertools import batched
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from rich.progress import track
from torch import Tensor

from moetrain.config.recipe import Recipe
from moetrain.data.cache import build_once, cache_root, digest_files, key_of
from moetrain.data.loader import build_set, prepare, tokenizer_of
from moetrain.data.sets import PackedSet
from moetrain.data.tokenizer import tokenizer_files
from moetrain.engine import Engine
from moetrain.errors import DataError
from moetrain.loops.models import model_digest
from moetrain.methods import METHODS
from moetrain.ops.packed import Packed
from moetrain.ops.segment import segment_sum

VERSION = 2
PACKS_AT_A_TIME = 8  # of one data-parallel rank, between two words to the progress display


def reference_of(
    recipe: Recipe, engine: Engine, report: Callable[[str], None], *, held_out: bool
) -> Path | None:
    """The file of a run's reference log-probs, computed when the cache lacks it; None where the
    method or the recipe asks for none. Collective.

    The engine's model must still be the reference: the base, with an adapter that adds nothing yet.
    """
    if "ref_logp" not in METHODS[recipe.method.name].needs:
        return None
    data = build_set(recipe, held_out=held_out)
    if data is None:
        return None
    identity = _identity(recipe, engine, data)
    given = None if held_out else recipe.data.reference
    folder = given or cache_root(recipe.data.cache) / "reference" / key_of(identity)
    if given is not None or _everywhere(folder.is_dir()):
        _check(folder, identity)
    else:
        started = time.perf_counter()
        table = _score(engine, data, shows=engine.mesh.is_main and recipe.observe.progress)
        if engine.mesh.is_main:
            keep(folder, table, identity)
        dist.barrier()
        keep(folder, table, identity)  # where a node has a cache of its own
        seconds = time.perf_counter() - started
        report(f"reference log-probs of {data.num_items} answers in {seconds:.0f} s: {folder}")
    return folder / "logp.npy"


def fill(recipe: Recipe) -> int:
    """`moetrain score RECIPE`: put a recipe's reference log-probs into the cache, for all runs that
    ask for the same. Collective; returns the exit code.
    """
    method = METHODS[recipe.method.name]
    if "ref_logp" not in method.needs:
        raise DataError(f"method {method.name} has no reference: there is nothing to score.")
    prepare(recipe)
    engine = Engine(recipe, train=False)
    for held_out in (False, True):
        path = reference_of(recipe, engine, lambda line: None, held_out=held_out)
        if path is not None and engine.mesh.is_main:
            print(f"{'held out' if held_out else 'train'}: {path.parent}")
    engine.close()
    return 0


def _score(engine: Engine, data: PackedSet, *, shows: bool) -> Tensor:
    """[num_items] fp32 on the CPU: the sum of the log-probs of each answer's scored tokens."""
    mesh = engine.mesh
    table = torch.zeros(data.num_items, dtype=torch.float64)
    rounds = list(batched(range(len(data)), PACKS_AT_A_TIME * mesh.dp_size))
    for together in track(rounds, "reference log-probs", disable=not shows):
        mine = [data[i] for i in together[mesh.dp_rank :: mesh.dp_size]]
        for pack, logp in zip(mine, engine.logprobs(mine), strict=True):
            scored, items = answers(pack, logp)
            table[items] = scored.double()
    table = table.to(engine.device)
    dist.all_reduce(table, group=mesh.dp_group)
    return table.float().cpu()


def answers(pack: Packed, logp: Tensor) -> tuple[Tensor, Tensor]:
    """(sum of log-probs [m] fp32, item [m]) of the m answers in a pack, from [t] log-probs."""
    sums = segment_sum(logp * pack.loss_mask, pack.cu_seqlens)
    is_answer = pack.extras["role"] > 0
    return sums[is_answer], pack.extras["item"][is_answer]


def _identity(recipe: Recipe, engine: Engine, data: PackedSet) -> dict[str, Any]:
    """All that decides the numbers, by what a user would call it."""
    return {
        "version": VERSION,
        "model": _on_main(engine, lambda: model_digest(recipe, engine.source)),
        "dtype": recipe.model.dtype,
        "tokenizer": _tokenizer_digest(recipe),
        "data": data.sequences_fingerprint,
    }


def _tokenizer_digest(recipe: Recipe) -> str:
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
        found = json.loads((folder / "identity.json").read_text())
    except (OSError, ValueError) as error:
        raise DataError(
            f"{folder} holds no reference log-probs ({error}). Leave data.reference out, or remove"
            " it from the cache: they are computed then."
        ) from error
    for name, wanted in identity.items():
        if found.get(name) != wanted:
            raise DataError(
                f"{folder}: these reference log-probs were made with another {name} "
                f"({found.get(name)}, not {wanted}). Leave data.reference out, or give those of"
                f" this run."
            )


def _on_main(engine: Engine, find: Callable[[], str]) -> str:
    """What the main rank finds; DataError on all ranks when it cannot read."""
    said: list[tuple[str, str | None]] = [("", None)]
    if engine.mesh.is_main:
        try:
            said = [(find(), None)]
        except OSError as error:
            said = [("", f"{error.filename}: {error.strerror or error}. Is the model whole?")]
    dist.broadcast_object_list(said, src=0, device=engine.device)
    found, problem = said[0]
    if problem is not None:
        raise DataError(problem)
    return found


def _everywhere(here: bool) -> bool:
    """Whether all ranks say yes: a cache on a local disk may be there on one node alone."""
    said: list[bool] = [False] * dist.get_world_size()
    dist.all_gather_object(said, here)
    return all(said)
