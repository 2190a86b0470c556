"""Reading what a Megatron checkpoint holds: every part is checked by the manifest, nothing in it is
run, and where one rank cannot read its part all ranks say so.
"""

import json
import re
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from megatron.core import dist_checkpointing
from torch.distributed.checkpoint.api import CheckpointException

from moetrain import manifest
from moetrain.engine.pickles import index_of
from moetrain.engine.world import World
from moetrain.errors import CheckpointError, MoetrainError
from moetrain.manifest import Manifest, say_unchecked

# What Megatron reads on every rank besides the tensors; the first is of its versions before 0.19.
COMMON = ("common.pt", "metadata.json")
COMMON_KEY = "common_state/shard_0_1"


def read(content: dict[str, Any], folder: Path, world: World) -> dict[str, Any]:
    """What the checkpoint holds for `content`, at whatever layout it was written. Collective.

    Raises CheckpointError or DamageError on every rank, when any rank met something.
    """
    # Upstream's own collectives come between: what every rank reads is looked at before.
    failures = (Exception, CheckpointException)  # torch's is no Exception
    describe = partial(_describe, folder)
    world.together(lambda: _check_common(folder), describe, failures)
    return world.together(lambda: dist_checkpointing.load(content, str(folder)), describe, failures)


def _check_common(folder: Path) -> None:
    written = Manifest.of(folder)
    index = index_of(folder)
    if written is None:
        say_unchecked(folder)
        return
    written.all_there()
    manifest.check(folder, COMMON)
    for place, part in index.storage_data.items():
        if place.fqn == COMMON_KEY:
            path = folder / part.relative_path
            written.check(path, part.offset, part.offset + part.length)


def _describe(folder: Path, error: BaseException) -> MoetrainError:
    """The error in a line; torch wraps those of reading."""
    cause: BaseException = error
    if isinstance(error, CheckpointException) and error.failures:
        cause = next(iter(error.failures.values()))[0]
    if isinstance(cause, MoetrainError):
        return cause
    asked = re.search(r"GLOBAL ([\w.]+)", str(cause))
    if asked and isinstance(cause, UnpicklingError):
        return CheckpointError(
            f"{folder} is refused: it asks for {asked[1]}, and reading that could run code. Take a"
            " checkpoint from whom you trust."
        )
    lines = str(cause).splitlines() or [""]
    message = next((line for line in lines if line.strip()), "")[:200]
    return CheckpointError(
        f"{folder} cannot be read ({type(cause).__name__}: {message}). Copy the checkpoint again."
    )


def read_state(folder: Path) -> dict[str, Any]:
    """What was saved beside the weights. Raises CheckpointError, DamageError."""
    path = folder / "state.json"
    try:
        state = json.loads(manifest.read_text(path))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path} cannot be read ({str(error)[:200]}). Copy the checkpoint again."
        ) from None
    if not isinstance(state, dict):
        raise CheckpointError(f"{path}: a mapping is wanted, not {type(state).__name__}.")
    return state
