"""Writing a Hugging Face model folder: every rank writes the tensors it owns, the first rank makes
the index.

The folder appears whole under its name, or not at all.
"""

import errno
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from moetrain.errors import WeightsError
from moetrain.weights.beside import Beside
from moetrain.weights.folder import INDEX, SINGLE

# A full disk is a SafetensorError, which is no OSError.
FAILURES = (OSError, RuntimeError, SafetensorError)


def write_hf(
    params: Iterable[tuple[str, Tensor]],
    folder: Path,
    *,
    beside: Beside,
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
    rank = dist.get_rank() if dist.is_initialized() else 0
    aside = folder.with_name(f".writing_{folder.name}")
    try:
        problem = _write(params, folder, aside, rank, beside, config, dtypes, default, shard_bytes)
    except BaseException:
        if rank == 0:
            shutil.rmtree(aside, ignore_errors=True)
        raise
    if problem:
        if rank == 0:
            shutil.rmtree(aside, ignore_errors=True)
        raise WeightsError(
            f"Writing {folder} failed: {problem}. What was there before is untouched. Make room "
            f"there or give another folder."
        )


def _write(
    params: Iterable[tuple[str, Tensor]],
    folder: Path,
    aside: Path,
    rank: int,
    beside: Beside,
    config: Mapping[str, Any],
    dtypes: Mapping[str, torch.dtype],
    default: torch.dtype,
    shard_bytes: int,
) -> str:
    """What went wrong first on any rank, the same on all; "" when the folder is in its place."""
    problem = ""
    if rank == 0:
        try:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
        except OSError as error:
            problem = reason(error)
    problem = _first(_gather(problem))
    if problem:
        return problem
    files: dict[str, list[str]] = {}
    total = 0
    rest = iter(params)
    try:
        files, total = _write_shards(rest, aside, rank, dtypes, default, shard_bytes)
    except FAILURES as error:
        problem = reason(error)
        for _ in rest:  # to make them is collective: the other ranks would wait for this one
            pass
    reports: list[tuple[str, dict[str, list[str]], int]] = _gather((problem, files, total))
    problem = _first([p for p, _, _ in reports])
    if not problem and rank == 0:
        try:
            _finish(aside, folder, reports, beside, config)
        except OSError as error:
            problem = reason(error)
    return _first(_gather(problem))


def _write_shards(
    params: Iterable[tuple[str, Tensor]],
    aside: Path,
    rank: int,
    dtypes: Mapping[str, torch.dtype],
    default: torch.dtype,
    shard_bytes: int,
) -> tuple[dict[str, list[str]], int]:
    files: dict[str, list[str]] = {}
    batch: dict[str, Tensor] = {}
    size = total = 0

    def flush() -> None:
        nonlocal batch, size
        if batch:
            name = f"rank{rank:05d}-{len(files):05d}.safetensors"
            save_file(batch, aside / name, metadata={"format": "pt"})
            files[name] = list(batch)
            batch, size = {}, 0

    for name, tensor in params:
        held = torch.empty(tensor.shape, dtype=dtypes.get(name, default))
        held.copy_(tensor)  # a copy: the next tensor may reuse this one's memory
        if size and size + held.nbytes > shard_bytes:
            flush()
        batch[name] = held
        size += held.nbytes
        total += held.nbytes
    flush()
    return files, total


def _finish(
    aside: Path,
    folder: Path,
    reports: list[tuple[str, dict[str, list[str]], int]],
    beside: Beside,
    config: Mapping[str, Any],
) -> None:
    """Give the shards their final names, write the index and config, and put the folder in its
    place.
    """
    written = [(name, tensors) for _, files, _ in reports for name, tensors in files.items()]
    places: dict[str, str] = {}
    for i, (name, tensors) in enumerate(written):
        final = (
            SINGLE if len(written) == 1 else f"model-{i + 1:05d}-of-{len(written):05d}.safetensors"
        )
        os.rename(aside / name, aside / final)
        places |= dict.fromkeys(tensors, final)
    if len(written) > 1:
        index = {
            "metadata": {"total_size": sum(size for _, _, size in reports)},
            "weight_map": dict(sorted(places.items())),
        }
        (aside / INDEX).write_text(json.dumps(index, indent=1))
    (aside / "config.json").write_text(json.dumps(beside.config(config), indent=2) + "\n")
    beside.write(aside, config)
    put_in_place(aside, folder)


def put_in_place(aside: Path, folder: Path) -> None:
    """Give the finished folder `aside` the name `folder`; a folder there is replaced."""
    for path in aside.iterdir():
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
    old = folder.with_name(f".old_{folder.name}")
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


def _gather(value: Any) -> list[Any]:
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, value)
    return everyone


def _first(problems: list[str]) -> str:
    return next((problem for problem in problems if problem), "")
