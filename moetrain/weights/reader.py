"""Where weights are read from: safetensors folders, and weights made from scratch, by Hugging Face
name and slice.
"""

import hashlib
import threading
from collections.abc import Collection, Mapping
from math import prod
from typing import Protocol

import torch
from torch import Tensor

from moetrain.models import Model
from moetrain.weights.dtypes import NAMES, TORCH, as_rows, as_tensor
from moetrain.weights.rows import Bytes, Rows, num_rows, spans
from moetrain.weights.stored import StoredFolder
from moetrain.weights.torch_dist import McoreRows

Slices = tuple[slice, ...]


class Reader(Protocol):
    """Tensors by name; `read` brings only the slice that is asked for."""

    def names(self) -> Collection[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def dtype(self, name: str) -> torch.dtype: ...

    def read(self, name: str, slices: Slices) -> Tensor: ...


class ByRows:
    """Tensors and slices of what is read by rows."""

    def dtype(self: Rows, name: str) -> torch.dtype:
        return TORCH[self.dtype_name(name)]

    def read(self: Rows, name: str, slices: Slices) -> Tensor:
        shape, dtype_name = self.shape(name), self.dtype_name(name)
        sizes = [cut.stop - cut.start for cut in slices]
        if not prod(sizes):
            return torch.empty(sizes, dtype=TORCH[dtype_name])
        if len(shape) != 2:  # cut along its first dimension or not at all
            return as_tensor(self.rows(name, 0, num_rows(shape)), dtype_name).reshape(shape)[slices]
        first, columns = slices
        if sizes[1] == shape[1]:
            return as_tensor(self.rows(name, first.start, first.stop), dtype_name)
        result = torch.empty(sizes, dtype=TORCH[dtype_name])
        for start, stop in spans((sizes[0], shape[1]), dtype_name):
            rows = self.rows(name, first.start + start, first.start + stop)
            result[start:stop] = as_tensor(rows, dtype_name)[:, columns]
        return result


class RowsReader(ByRows):
    """Any rows as tensors."""

    def __init__(self, rows: Rows):
        self.base = rows
        self.names, self.shape = rows.names, rows.shape
        self.dtype_name, self.rows = rows.dtype_name, rows.rows

    def __str__(self) -> str:
        return str(self.base)


class SafetensorsReader(ByRows, StoredFolder):
    """A folder of safetensors as tensors."""


class McoreReader(ByRows, McoreRows):
    """A Megatron checkpoint as tensors."""


class ReaderRows:
    """Tensors of a reader by rows. One thread reads at a time: readers need not take more."""

    def __init__(self, reader: Reader):
        self.reader = reader
        self.names, self.shape = reader.names, reader.shape
        self._lock = threading.Lock()

    def __str__(self) -> str:
        return str(self.reader)

    def dtype_name(self, name: str) -> str:
        return NAMES[self.reader.dtype(name)]

    def rows(self, name: str, start: int, stop: int) -> Bytes:
        shape = self.shape(name)
        with self._lock:
            if len(shape) < 2:
                whole = self.reader.read(name, tuple(slice(0, n) for n in shape))
                return as_rows(whole.reshape(-1, 1)[start:stop])
            cut = (slice(start, stop), *(slice(0, n) for n in shape[1:]))
            return as_rows(self.reader.read(name, cut).reshape(stop - start, -1))


class RandomReader:
    """Weights from scratch, the same at every layout: each tensor has a generator of its own,
    seeded by its name.

    Matrices are normal(0, std) in fp32, norms ones, biases zeros.
    """

    def __init__(self, model: Model, seed: int, std: float):
        self.seed, self.std = seed, std
        self._shapes = {
            key: shape
            for rule in model.table.values()
            for key, shape in zip(rule.hf, rule.hf_shapes, strict=True)
        }

    def __str__(self) -> str:
        return f"weights made from seed {self.seed}"

    def names(self) -> Collection[str]:
        return self._shapes.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        return torch.float32

    def read(self, name: str, slices: Slices) -> Tensor:
        shape = self._shapes[name]
        if name.endswith("norm.weight"):
            return torch.ones(shape)[slices]
        if name.endswith(".bias"):
            return torch.zeros(shape)[slices]
        return torch.empty(shape).normal_(0.0, self.std, generator=seeded(self.seed, name))[slices]


def seeded(seed: int, name: str) -> torch.Generator:
    """A tensor's own generator."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


class Joined:
    """The tensors of `base`, and those that it lacks from other readers, by name."""

    def __init__(self, base: Reader, others: Mapping[str, Reader]):
        self.base, self.others = base, others

    def __str__(self) -> str:
        return str(self.base)

    def _of(self, name: str) -> Reader:
        return self.others.get(name, self.base)

    def names(self) -> Collection[str]:
        return {*self.base.names(), *self.others}

    def shape(self, name: str) -> tuple[int, ...]:
        return self._of(name).shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return self._of(name).dtype(name)

    def read(self, name: str, slices: Slices) -> Tensor:
        return self._of(name).read(name, slices)
