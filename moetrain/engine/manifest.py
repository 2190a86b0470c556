"""The manifest of a Megatron checkpoint: written once all of its files are there, and compared with
them by all ranks together before a run goes on from it.
"""

import json
from pathlib import Path

from moetrain import manifest
from moetrain.engine.pickles import index_of
from moetrain.engine.world import World
from moetrain.errors import MoetrainError
from moetrain.manifest import NAME, Files, Manifest


def write(folder: Path, known: Files) -> None:
    """Complete `known` with the files of `folder` that it lacks, and write the manifest. Raises
    OSError where what the checkpoint's own index names is not there in full.
    """
    content = manifest.complete(folder, known)
    for part in index_of(folder).storage_data.values():
        one = content.get(part.relative_path)
        if one is None or one.size < part.offset + part.length:
            raise OSError(f"{part.relative_path} has fewer bytes than were written")
    manifest.write(folder, content)


def damage(folder: Path, world: World) -> str:
    """What is wrong with a checkpoint, "" when it is whole. Collective: each rank reads a share."""
    problem = ""
    try:
        problem = damage_of_share(folder, world.rank, world.size)
    except (OSError, ValueError) as error:
        problem = str(error)
    return next((p for p in world.gather(problem) if p), "")


def damage_of_share(folder: Path, rank: int, num_ranks: int) -> str:
    """What is wrong with rank `rank`'s share of the files, "" for nothing. Raises OSError or
    ValueError where state.json cannot be read.
    """
    try:
        written = Manifest.of(folder)
        if written is None:
            # Checkpoints of earlier versions have none, nor a format.
            state = json.loads((folder / "state.json").read_text())
            return f"no {NAME}" if "format" in state else ""
        for name in sorted(written.files)[rank::num_ranks]:
            written.check(folder / name)
    except MoetrainError as error:
        return str(error).partition(". Copy")[0].removeprefix(f"{folder}/")
    return ""
