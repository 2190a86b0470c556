"""`moetrain score`: the log-prob of each token of given sequences, under the Megatron engine at any
layout.
"""

import json
import os
from array import array
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TextIO

from moetrain import files
from moetrain.config.answering import SCORE, keys_given
from moetrain.config.recipe import Recipe
from moetrain.data import tokenizer
from moetrain.data.rejects import Reject
from moetrain.data.sources import Record, find_sources, read_rows
from moetrain.engine import Engine
from moetrain.engine.on_disk import is_adapter, model_in, recipe_for, sections_of
from moetrain.engine.source import find_source
from moetrain.errors import CheckpointError, DataError
from moetrain.models import read_model
from moetrain.ops.packed import Packed, concat, from_tokens

WINDOW = 1024  # rows whose log-probs are held at one time
PACK_TOKENS = 4096  # short rows share a pack up to so many tokens


def score(model: str, data: Path, out: Path, overrides: Sequence[str] = ()) -> int:
    """Score the rows of `data` with `model` and write `out`, one output row per input row, in their
    order. Returns the exit code.

    A row has `tokens` (ids) or `text`. Every rank of the job calls this; rank 0 writes `out`, which
    appears whole. DataError with file and line for the first row that cannot be scored, before
    anything is computed.
    """
    SCORE.check(keys_given(overrides))
    path, adapter = of_run(model)
    recipe = recipe_for(path, out.parent, overrides, adapter)
    if not out.parent.is_dir():
        raise DataError(f"{out}: there is no folder {out.parent}. Make it, or give another --out.")
    rows = read_sequences(recipe, data)
    engine = Engine(recipe, train=False)
    try:
        with _written(out, engine.world.is_first) as file:
            for start in range(0, len(rows), WINDOW):
                window = rows[start : start + WINDOW]
                for tokens, logprobs in zip(window, score_window(engine, window), strict=True):
                    line = {"tokens": tokens.tolist(), "logprobs": logprobs.tolist()}
                    file.write(json.dumps(line) + "\n")
    except OSError as error:
        raise DataError(f"{out} cannot be written: {error.strerror or error}.") from error
    engine.close()
    return 0


def of_run(model: str) -> tuple[str, dict[str, Any]]:
    """(path of a model, which may be a run's, or of its base; further sections of the recipe)."""
    start = model_in(model)
    if is_adapter(Path(start).expanduser()) and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise CheckpointError(
            f"{start} is an adapter's checkpoint, which one process turns into a folder: tools/"
            f"convert adapter {start} FOLDER, then give the base with adapter.path=FOLDER."
        )
    return sections_of(start)


@contextmanager
def _written(out: Path, is_main: bool) -> Iterator[TextIO]:
    """What is written to, which becomes `out` on the first rank."""
    with ExitStack() as stack:
        part = stack.enter_context(files.publish(out))[0] if is_main else Path("/dev/null")
        yield stack.enter_context(part.open("w"))


def read_sequences(recipe: Recipe, data: Path) -> "list[array[int]]":
    """The token ids of every row; text is tokenised with the model's tokenizer as it stands (no
    chat template).
    """
    source = find_source(recipe.model)
    vocab = read_model(source.hf).heads.vocab
    loaded: Any = None
    rows: list[array[int]] = []
    for row in (row for data_source in find_sources([data]) for row in read_rows(data_source)):
        where = f"{row.file}:{row.line}"
        if isinstance(row, Reject):
            raise DataError(
                f'{where}: {row.reason}. A row is {{"tokens": [ids]}} or {{"text": ...}}.'
            )
        tokens = row.value.get("tokens")
        if tokens is None and isinstance(row.value.get("text"), str):
            if loaded is None:
                if source.tokenizer is None:
                    raise DataError(f"{where}: text needs a tokenizer. Set model.tokenizer=FOLDER.")
                loaded = tokenizer.load(source.tokenizer)
            tokens = loaded(row.value["text"], verbose=False)["input_ids"]
        rows.append(_checked(tokens, vocab, row, where))
    if not rows:
        raise DataError(f'{data} has no rows. A row is {{"tokens": [ids]}} or {{"text": ...}}.')
    return rows


def _checked(tokens: Any, vocab: int, row: Record, where: str) -> "array[int]":
    if tokens is None:
        keys = ", ".join(sorted(row.value))
        raise DataError(
            f"{where}: neither `tokens` (a list of ids) nor `text` (a string) among {keys}."
        )
    if not isinstance(tokens, list) or not all(type(t) is int for t in tokens):
        raise DataError(f"{where}: `tokens` must be a list of whole numbers.")
    if not tokens:
        raise DataError(f"{where}: an empty sequence cannot be scored. Remove the row.")
    bad = next((t for t in tokens if not 0 <= t < vocab), None)
    if bad is not None:
        raise DataError(
            f"{where}: token {bad} is outside the model's vocabulary of {vocab} (0..{vocab - 1})."
        )
    return array("l", tokens)


def score_window(engine: Engine, rows: "Sequence[array[int]]") -> "list[array[float]]":
    """Log-probs of each token after the first of every row, on rank 0 (empty ones on the others).
    Collective.
    """
    world = engine.world
    bins = list(bins_of([len(row) for row in rows], PACK_TOKENS))
    # Packs of like length go to the replicas together, since a round takes as long as its longest.
    mine = bins[world.dp_rank :: world.dp_size]
    by_row: dict[int, array[float]] = {}
    for number in range(-(-len(bins) // world.dp_size)):
        members = mine[number] if number < len(mine) else []
        packs: list[Packed] = (
            [concat([from_tokens(rows[i].tolist()) for i in members])] if members else []
        )
        logps = engine.logprobs(packs)
        if members and world.tp_rank == world.cp_rank == world.pp_rank == 0:
            starts = packs[0].cu_seqlens.tolist()
            for i, start in zip(members, starts, strict=False):
                by_row[i] = array("f", logps[0][start : start + len(rows[i]) - 1].tolist())
    for part in world.to_first(by_row) or ():
        by_row.update(part)
    return [by_row.get(i, array("f")) for i in range(len(rows))]


def bins_of(lengths: Sequence[int], most: int) -> Iterator[list[int]]:
    """Rows of like length together, longest first, up to `most` tokens (a longer row alone)."""
    members: list[int] = []
    total = 0
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if members and total + lengths[i] > most:
            yield members
            members, total = [], 0
        members.append(i)
        total += lengths[i]
    if members:
        yield members
