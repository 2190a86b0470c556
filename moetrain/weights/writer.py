"""Writing a Hugging Face model folder from live tensors: every rank writes those that it owns into
files of its own, each as it comes, and the first rank makes the index.

The folder appears whole under its name, or not at all, with a manifest of its files.
"""

import errno
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from moetrain import files, manifest
from moetrain.errors import WeightsError
from moetrain.manifest import Entry, Piece, digest_of, joined
from moetrain.weights.dtypes import TORCH, as_rows
from moetrain.weights.hf_files import SHARD_BYTES, Target, header, shard_names, shards, write_beside
from moetrain.weights.ranks import ALONE, Ranks
from moetrain.weights.rows import num_rows, row_bytes, spans
from moetrain.weights.side_files import SideFiles
from moetrain.weights.stream import put

# A full disk is a SafetensorError, which is no OSError.
FAILURES = (OSError, RuntimeError, SafetensorError)


@dataclass(frozen=True)
class Share:
    """What a rank wrote."""

    files: Mapping[str, Sequence[Target]]
    entries: Mapping[str, Entry]
    tensors: Mapping[str, str]  # digests


def write_hf(
    params: Iterable[tuple[str, Tensor]],
    targets: Sequence[Target],
    folder: Path,
    ranks: Ranks = ALONE,
    *,
    side_files: SideFiles,
    config: Mapping[str, Any],
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write this rank's (name, whole tensor) pairs, one of them in memory at a time; collective.

    Args:
        targets: the same in their order, as they shall be on disk.
        config: content of config.json as it was; `side_files` says how answers end now.
        shard_bytes: no file grows beyond this by a further tensor.

    Raises:
        WeightsError: on every rank, when any rank could not write; what was at `folder` before is
            untouched.
    """
    with ExitStack() as stack:
        problem = _write(params, targets, folder, stack, ranks, side_files, config, shard_bytes)
    if problem:
        raise WeightsError(
            f"Writing {folder} failed: {problem}. What was there before is untouched. Make room "
            f"there or give another folder."
        )


def _write(
    params: Iterable[tuple[str, Tensor]],
    targets: Sequence[Target],
    folder: Path,
    stack: ExitStack,
    ranks: Ranks,
    side_files: SideFiles,
    config: Mapping[str, Any],
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
    groups = shards(targets, shard_bytes) if targets else []
    counts = ranks.gather(len(groups))
    first = sum(counts[: ranks.rank])
    names = shard_names(sum(counts))[first : first + len(groups)]
    share, rest = Share({}, {}, {}), iter(params)
    try:
        share = write_share(rest, aside, dict(zip(names, groups, strict=True)))
    except FAILURES as error:
        problem = reason(error)
        for _ in rest:  # to make them is collective: the other ranks would wait for this one
            pass
    reports = ranks.gather((problem, share))
    problem = _first([p for p, _ in reports])
    if not problem and ranks.rank == 0:
        try:
            _finish(aside, folder, [one for _, one in reports], side_files, config)
        except OSError as error:
            problem = reason(error)
    return _first(ranks.gather(problem))


def write_share(
    params: Iterable[tuple[str, Tensor]], aside: Path, targets: Mapping[str, Sequence[Target]]
) -> Share:
    """Write every tensor at its place in the files of `aside`, which follows from all that come;
    one of them is in memory at a time. Raises what FAILURES names.
    """
    places: dict[str, tuple[str, int, Target]] = {}
    handles: dict[str, int] = {}
    pieces: dict[str, list[Piece]] = {}
    tensors: dict[str, str] = {}
    try:
        for file, group in targets.items():
            handles[file] = os.open(aside / file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
            first = header(group)
            at = len(first)
            files.reserve(handles[file], at + sum(one.num_bytes for one in group))
            put(handles[file], first, 0)
            pieces[file] = [Piece(at, digest_of(first))]
            for one in group:
                places[one.name] = file, at, one
                at += one.num_bytes
        for name, tensor in params:
            file, at, one = places.pop(name)
            written = _write_tensor(handles[file], at, tensor, one)
            pieces[file] += written
            tensors[name] = joined(piece.digest for piece in written)
        assert not places, f"{sorted(places)[:4]} did not come"
    finally:
        for handle in handles.values():
            os.close(handle)
    for entries in pieces.values():
        entries.sort(key=lambda piece: piece.stop)
    return Share(targets, {file: Entry.of(entries) for file, entries in pieces.items()}, tensors)


def _write_tensor(handle: int, at: int, tensor: Tensor, one: Target) -> list[Piece]:
    """Its rows, some at a time, in the dtype that they have on disk."""
    assert tuple(tensor.shape) == one.shape, f"{one.name} is {list(tensor.shape)}"
    columns = one.shape[-1] if len(one.shape) > 1 else 1
    rows = tensor.detach().reshape(num_rows(one.shape), columns)
    width = row_bytes(one.shape, one.dtype_name)
    pieces: list[Piece] = []
    for start, stop in spans(one.shape, one.dtype_name):
        values = rows[start:stop].to("cpu", TORCH[one.dtype_name])
        content = as_rows(values).reshape(-1).data
        put(handle, content, at + start * width)
        pieces.append(Piece(at + stop * width, digest_of(content)))
    return pieces


def _finish(
    aside: Path,
    folder: Path,
    shares: Sequence[Share],
    side_files: SideFiles,
    config: Mapping[str, Any],
) -> None:
    """Write the index, config and manifest, and put the folder in its place."""
    groups = {file: group for share in shares for file, group in share.files.items()}
    write_beside(aside, groups, side_files, config)
    entries = {file: one for share in shares for file, one in share.entries.items()}
    tensors = {name: digest for share in shares for name, digest in share.tensors.items()}
    manifest.write(aside, manifest.complete(aside, entries), tensors)
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
