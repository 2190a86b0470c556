"""Ranges of rows of Hugging Face tensors: the unit in which weights are converted, so that no
process holds a tensor, let alone a model. No torch.

A row is the last dimension; of a vector each element is one. Rows are bytes as safetensors has them
(little-endian, row-major).
"""

import mmap
import os
from collections.abc import Collection, Iterator, Mapping
from math import prod
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from moetrain.weights.header import SIZES

type Bytes = NDArray[np.uint8]

_MAPPED = 1 << 24  # bytes; more take no memory of the process, fewer are copied sooner than mapped
SPAN = 1 << 22  # bytes of the rows that are moved, hashed and compared at a time


class Rows(Protocol):
    """Tensors by name, read by ranges of rows."""

    def names(self) -> Collection[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def dtype_name(self, name: str) -> str:
        """As safetensors calls it: BF16, F32, ..."""
        ...

    def rows(self, name: str, start: int, stop: int) -> Bytes:
        """[stop - start, bytes of a row], rows [start, stop); not to be written into."""
        ...


def file_bytes(handle: int, start: int, length: int) -> Bytes | None:
    """Bytes of a file, not to be written into; None where it is shorter."""
    if start + length > os.fstat(handle).st_size:
        return None
    if length > _MAPPED:
        skipped = start % mmap.ALLOCATIONGRANULARITY
        flags = mmap.MAP_SHARED | mmap.MAP_POPULATE
        window = mmap.mmap(handle, skipped + length, flags, mmap.PROT_READ, offset=start - skipped)
        return np.frombuffer(window, np.uint8, length, skipped)
    content = np.empty(length, np.uint8)
    left = memoryview(content)
    while left:
        num = os.preadv(handle, [left], start)
        if not num:  # it has just become shorter
            return None
        left, start = left[num:], start + num
    return content


def num_rows(shape: tuple[int, ...]) -> int:
    return prod(shape[:-1]) if len(shape) > 1 else prod(shape)


def row_bytes(shape: tuple[int, ...], dtype_name: str) -> int:
    return (shape[-1] if len(shape) > 1 else 1) * SIZES[dtype_name]


def spans(shape: tuple[int, ...], dtype_name: str, size: int = SPAN) -> Iterator[tuple[int, int]]:
    """Ranges of rows that cover a tensor, each of `size` bytes at most unless one row has more."""
    width, total = row_bytes(shape, dtype_name), num_rows(shape)
    step = max(1, size // width) if width else max(1, total)
    for start in range(0, total, step):
        yield start, min(start + step, total)


def span_rows(shape: tuple[int, ...], dtype_name: str) -> int:
    """The rows of a whole span."""
    return next((stop for _, stop in spans(shape, dtype_name)), 1)


class Renamed:
    """Some tensors of `base` under other names; each new name's old one."""

    def __init__(self, base: Rows, names: Mapping[str, str]):
        self.base, self.old = base, names

    def __str__(self) -> str:
        return str(self.base)

    def names(self) -> Collection[str]:
        return self.old.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return self.base.shape(self.old[name])

    def dtype_name(self, name: str) -> str:
        return self.base.dtype_name(self.old[name])

    def rows(self, name: str, start: int, stop: int) -> Bytes:
        return self.base.rows(self.old[name], start, stop)


class Converted:
    """The same values in other dtypes; tensors that `dtype_names` leaves out as they are."""

    def __init__(self, base: Rows, dtype_names: Mapping[str, str]):
        self.base, self._wanted = base, dtype_names
        self.names, self.shape = base.names, base.shape

    def __str__(self) -> str:
        return str(self.base)

    def dtype_name(self, name: str) -> str:
        return self._wanted.get(name) or self.base.dtype_name(name)

    def rows(self, name: str, start: int, stop: int) -> Bytes:
        values = self.base.rows(name, start, stop)
        old, new = self.base.dtype_name(name), self.dtype_name(name)
        return values if old == new else cast(values, old, new)


def cast(rows: Bytes, old: str, new: str) -> Bytes:
    """The values of `rows` in another dtype, rounded to nearest."""
    from moetrain.weights.dtypes import TORCH, as_rows, as_tensor

    return as_rows(as_tensor(rows, old).to(TORCH[new]))


def readable(size: float) -> str:
    """Bytes for people."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"
