"""What a weight file is known by, without reading it to the last byte: 470 GB would take longer
than a run's first hour. A part of a model that was trained has changed nearly everywhere, so a look
into every tensor sees it.
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

SPOT, STRIDE = 1 << 12, 1 << 24  # bytes of a look, and of a tensor between two looks


def file_digest(path: Path) -> str:
    """By name, size, header and a look into every tensor; a file that is no safetensors has no
    tensors to find: by looks and the time it was written. Raises OSError.
    """
    stat = path.stat()
    parts = f"{path.name} {stat.st_size}"
    if path.suffix != ".safetensors":
        parts += f" {stat.st_mtime_ns}"
    digest = hashlib.sha256(parts.encode())
    with path.open("rb") as file:
        for start, end in _spots(path, file, stat.st_size):
            file.seek(start)
            digest.update(file.read(end - start))
    return digest.hexdigest()


def _spots(path: Path, file: BinaryIO, size: int) -> Iterator[tuple[int, int]]:
    """(first byte, one behind the last) of every look."""
    if path.suffix != ".safetensors":
        yield from _within(0, size)
        return
    begin = 8 + int.from_bytes(file.read(8), "little")
    header = json.loads(file.read(begin - 8))
    yield 0, begin
    for name, entry in header.items():
        if name != "__metadata__":
            first, last = entry["data_offsets"]
            yield from _within(begin + first, begin + last)


def _within(start: int, end: int) -> Iterator[tuple[int, int]]:
    """Looks into [start, end), the first in the middle of the first stride."""
    for part in range(start, end, STRIDE):
        stop = min(part + STRIDE, end)
        at = max(part, (part + stop - SPOT) // 2)
        yield at, min(at + SPOT, stop)
