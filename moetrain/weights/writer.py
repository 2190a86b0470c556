"""Writing a Hugging Face model folder: every rank writes the tensors it owns, the first rank makes
the index.

The folder appears whole under its name, or not at all, with a manifest of its files as they were
read back from the disk.
"""

import errno
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from moetrain import files, manifest
from moetrain.errors import WeightsError
from moetrain.manifest import Entry, entry
from moetrain.weights.folder import INDEX, SINGLE
from moetrain.weights.ranks import ALONE, Ranks
from moetrain.weights.side_files import SideFiles

# A full disk is a SafetensorError, which is no OSError.
FAILURES = (OSError, RuntimeError, SafetensorError)


@dataclass(frozen=True)
class Shard:
    """A file that a rank wrote."""

    name: str
    tensors: tuple[str, ...]
    size: int  # bytes of its tensors
    entry: Entry


def write_hf(
    params: Iterable[tuple[str, Tensor]],
    folder: Path,
    ranks: Ranks = ALONE,
    *,
    side_files: SideFiles,
    config: Mapping[str, Any],
    dtypes: Mapping[str, torch.dtype],
    default: torch.dtype,
    shard_bytes: int = 5_000_000_000,
) -> None:
    """Write this rank's (name, whole tensor) pairs; collective.

    Args:
        beside: the tokenizer, its template and what ends an answer.
        config: content of config.json as it was; `beside` says how answers end now.
        dtypes: dtype of each tensor on disk; `default` for those it does not name.
        shard_bytes: a file is closed when it would grow beyond this.

    Raises:
        WeightsError: on every rank, when any rank could not write; what was at `folder` before is
            untouched.
    """
    with ExitStack() as stack:
        problem = _write(
            params, folder, stack, ranks, side_files, config, dtypes, default, shard_bytes
        )
    if problem:
        raise WeightsError(
            f"Writing {folder} failed: {problem}. What was there before is untouched. Make room "
            f"there or give another folder."
        )


def _write(
    params: Iterable[tuple[str, Tensor]],
    folder: Path,
    stack: ExitStack,
    ranks: Ranks,
    side_files: SideFiles,
    config: Mapping[str, Any],
    dtypes: Mapping[str, torch.dtype],
    default: torch.dtype,
    shard_bytes: int,
) -> str:
    """What went wrong first on any rank, the same on all; "" when the folder is in its place."""
    problem, aside = "", folder
    if ranks.rank == 0:
        try:
            aside = stack.enter_context(files.sibling_folder(folder))
        except OSError as error:
            problem = reason(error)
    problem, aside = ranks.share((problem, aside))
    if problem:
        return problem
    shards: list[Shard] = []
    rest = iter(params)
    try:
        shards = _write_shards(rest, aside, ranks.rank, dtypes, default, shard_bytes)
    except FAILURES as error:
        problem = reason(error)
        for _ in rest:  # to make them is collective: the other ranks would wait for this one
            pass
    reports = ranks.gather((problem, shards))
    problem = _first([p for p, _ in reports])
    if not problem and ranks.rank == 0:
        try:
            _finish(
                aside, folder, [shard for _, own in reports for shard in own], side_files, config
            )
        except OSError as error:
            problem = reason(error)
    return _first(ranks.gather(problem))


def _write_shards(
    params: Iterable[tuple[str, Tensor]],
    aside: Path,
    rank: int,
    dtypes: Mapping[str, torch.dtype],
    default: torch.dtype,
    shard_bytes: int,
) -> list[Shard]:
    shards: list[Shard] = []
    batch: dict[str, Tensor] = {}
    size = 0

    def flush() -> None:
        nonlocal batch, size
        if batch:
            path = aside / f"rank{rank:05d}-{len(shards):05d}.safetensors"
            save_tensors(batch, path)
            shards.append(Shard(path.name, tuple(batch), size, entry(path)))
            batch, size = {}, 0

    for name, tensor in params:
        held = torch.empty(tensor.shape, dtype=dtypes.get(name, default))
        held.copy_(tensor)  # a copy: the next tensor may reuse this one's memory
        if size and size + held.nbytes > shard_bytes:
            flush()
        batch[name] = held
        size += held.nbytes
    flush()
    return shards


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """A safetensors file that may be read by whom its folder may: the package gives it to its
    owner alone (0.8).
    """
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(path.parent.stat().st_mode & 0o666)


def _finish(
    aside: Path, folder: Path, shards: list[Shard], side_files: SideFiles, config: Mapping[str, Any]
) -> None:
    """Give the shards their final names, write the index and config, and put the folder in its
    place.
    """
    places: dict[str, str] = {}
    entries: dict[str, Entry] = {}
    for i, shard in enumerate(shards):
        num = len(shards)
        final = SINGLE if num == 1 else f"model-{i + 1:05d}-of-{num:05d}.safetensors"
        os.rename(aside / shard.name, aside / final)
        places |= dict.fromkeys(shard.tensors, final)
        entries[final] = shard.entry
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(shard.size for shard in shards)},
            "weight_map": dict(sorted(places.items())),
        }
        (aside / INDEX).write_text(json.dumps(index, indent=1))
    (aside / "config.json").write_text(json.dumps(side_files.config(config), indent=2) + "\n")
    side_files.write(aside, config)
    manifest.write(aside, manifest.complete(aside, entries))
    put_in_place(aside, folder)


def put_in_place(aside: Path, folder: Path) -> None:
    """Give the finished folder `aside` the name `folder`; a folder there is replaced."""
    for path in aside.iterdir():
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
    old = folder.with_name(f".old_{folder.name}")
    if old.exists() and not folder.exists():  # a kill came between the two names
        os.rename(old, folder)
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.rename(folder, old)
    try:
        os.rename(aside, folder)
    except OSError:
        if old.exists():
            os.rename(old, folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


def reason(error: Exception) -> str:
    """One line on why something could not be written."""
    if (isinstance(error, OSError) and error.errno == errno.ENOSPC) or "No space left" in str(
        error
    ):
        return "no space left on the disk"
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _first(problems: list[str]) -> str:
    return next((problem for problem in problems if problem), "")
