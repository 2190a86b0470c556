"""What a weight file is known by, without reading it to the last byte: 470 GB would take longer
than a run's first hour. A part of a model that was trained has changed nearly everywhere, so a look
into every tensor sees it.
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path

from moetrain.manifest import Manifest
from moetrain.weights.header import read_header

SPOT, STRIDE = 1 << 12, 1 << 24  # bytes of a look, and of a tensor between two looks


def file_digest(path: Path) -> str:
    """By name, size, header and a look into every tensor; a file that is no safetensors has no
    tensors to find: by looks and the time it was written.

    Raises OSError; WeightsError and DamageError of a header as `read_header` does.
    """
    stat = path.stat()
    parts = f"{path.name} {stat.st_size}"
    if path.suffix != ".safetensors":
        parts += f" {stat.st_mtime_ns}"
    digest = hashlib.sha256(parts.encode())
    with path.open("rb") as file:
        for start, end in _spots(path, stat.st_size):
            file.seek(start)
            digest.update(file.read(end - start))
    return digest.hexdigest()


def _spots(path: Path, size: int) -> Iterator[tuple[int, int]]:
    """(first byte, one behind the last) of every look."""
    if path.suffix != ".safetensors":
        yield from _within(0, size)
        return
    tensors = read_header(path, Manifest.of(path.parent)).values()
    yield 0, min((one.start for one in tensors), default=size)
    for one in tensors:
        yield from _within(one.start, one.start + one.num_bytes)


def _within(start: int, end: int) -> Iterator[tuple[int, int]]:
    """Looks into [start, end), the first in the middle of the first stride."""
    for part in range(start, end, STRIDE):
        stop = min(part + STRIDE, end)
        at = max(part, (part + stop - SPOT) // 2)
        yield at, min(at + SPOT, stop)
