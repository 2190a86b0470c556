"""Whether a checkpoint is whole: the size and SHA-256 of each of its files, as they were read back
from the disk once they had been written.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint.filesystem import FileSystemReader

from moetrain.pulse import beat

NAME = "manifest.json"
BLOCK = 1 << 24  # bytes
Entry = list[Any]
"""[bytes, SHA-256 in hex]"""


def entry(path: Path) -> Entry:
    """A file as the disk gives it back: its pages are written and dropped from memory first."""
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        while block := file.read(BLOCK):
            digest.update(block)
            size += len(block)
            beat()
    return [size, digest.hexdigest()]


def entries(paths: Iterable[Path]) -> dict[str, Entry]:
    """Name -> entry of each file."""
    return {path.name: entry(path) for path in paths}


def write(folder: Path, known: Mapping[str, Entry]) -> None:
    """Complete `known` with the files of `folder` that it lacks, and write the manifest. Raises
    OSError where what the checkpoint's own index names is not there in full.
    """
    rest = [p for p in folder.iterdir() if p.is_file() and p.name not in known]
    found = dict(known) | entries(rest)
    for part in FileSystemReader(folder).read_metadata().storage_data.values():
        end = part.offset + part.length
        if found.get(part.relative_path, [0])[0] < end:
            raise OSError(f"{part.relative_path} has fewer bytes than were written")
    (folder / NAME).write_text(json.dumps({"files": found}, indent=1))


def damage(folder: Path) -> str:
    """What is wrong with a checkpoint, "" when it is whole. Collective: each rank reads a share."""
    problem = ""
    try:
        problem = damage_of_share(folder, dist.get_rank(), dist.get_world_size())
    except (OSError, ValueError, KeyError) as error:  # also a manifest that is no JSON
        problem = f"{NAME}: {error}"
    problems: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    return next((p for p in problems if p), "")


def damage_of_share(folder: Path, rank: int, num_ranks: int) -> str:
    """What is wrong with rank `rank`'s share of the files, "" for nothing. Raises OSError,
    ValueError or KeyError where the manifest itself cannot be read.
    """
    if not (folder / NAME).is_file():
        # Checkpoints of earlier versions have none, nor a format.
        state = json.loads((folder / "state.json").read_text())
        return f"no {NAME}" if "format" in state else ""
    files: dict[str, Entry] = json.loads((folder / NAME).read_text())["files"]
    for name in sorted(files)[rank::num_ranks]:
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        size = path.stat().st_size
        if size != files[name][0]:
            return f"{name} has {size} bytes, {files[name][0]} were written"
        if entry(path) != files[name]:
            return f"{name} has other bytes than were written"
    return ""
