"""The files of a Hugging Face folder: where each tensor goes, before any is read. No torch."""

import json
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from moetrain.weights.folder import CONFIG, INDEX, SINGLE
from moetrain.weights.header import SIZES
from moetrain.weights.rows import Rows, num_rows, row_bytes
from moetrain.weights.side_files import SideFiles
from moetrain.weights.stream import Plan, Task, runs

SHARD_BYTES = 5_000_000_000


@dataclass(frozen=True, slots=True)
class Target:
    """A tensor to write."""

    name: str
    dtype_name: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) * SIZES[self.dtype_name]


def targets(rows: Rows, names: Iterable[str]) -> list[Target]:
    """What a source holds."""
    return [Target(name, rows.dtype_name(name), rows.shape(name)) for name in names]


def shards(given: Iterable[Target], shard_bytes: int) -> list[list[Target]]:
    """The tensors of each file, in the order in which they lie there: a file takes tensors as they
    come until it would grow beyond `shard_bytes`, and has the widest dtypes first, as safetensors
    orders them, so that all are aligned.
    """
    groups: list[list[Target]] = [[]]
    size = 0
    for one in given:
        if groups[-1] and size + one.num_bytes > shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append(one)
        size += one.num_bytes
    for group in groups:
        group.sort(key=lambda one: (-SIZES[one.dtype_name], one.name))
    return groups


def shard_names(num: int) -> list[str]:
    """The files' names."""
    if num == 1:
        return [SINGLE]
    return [f"model-{i + 1:05d}-of-{num:05d}.safetensors" for i in range(num)]


def header(group: Iterable[Target]) -> bytes:
    """What a file begins with."""
    content: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for one in group:
        stop = at + one.num_bytes
        places = {"dtype": one.dtype_name, "shape": list(one.shape), "data_offsets": [at, stop]}
        content[one.name] = places
        at = stop
    text = json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def plan(files: Mapping[str, Sequence[Target]]) -> Plan:
    """Of these files."""
    sizes: dict[str, int] = {}
    tasks: list[Task] = []
    for file, group in files.items():
        first = header(group)
        tasks.append(Task(file, 0, fixed=first))
        at = len(first)
        for one in group:
            tasks += _tensor_tasks(file, at, one)
            at += one.num_bytes
        sizes[file] = at
    return Plan(sizes, tuple(tasks))


def _tensor_tasks(file: str, start: int, one: Target) -> Iterator[Task]:
    width = row_bytes(one.shape, one.dtype_name)
    for low, high in runs(one.shape, one.dtype_name, 0, num_rows(one.shape)):
        yield Task(file, start + low * width, b"", one.name, low, high, is_hashed=True)


def write_beside(
    folder: Path,
    files: Mapping[str, Sequence[Target]],
    side_files: SideFiles,
    config: Mapping[str, Any],
) -> None:
    """The index, config.json and what `side_files` has. Raises OSError, WeightsError."""
    write_index(folder, files)
    (folder / CONFIG).write_text(json.dumps(side_files.config(config), indent=2) + "\n")
    side_files.write(folder, config)


def write_index(folder: Path, files: Mapping[str, Sequence[Target]]) -> None:
    """The index, where there is more than one file. Raises OSError."""
    if len(files) == 1:
        return
    places = {one.name: file for file, group in files.items() for one in group}
    total = sum(one.num_bytes for group in files.values() for one in group)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=1))
