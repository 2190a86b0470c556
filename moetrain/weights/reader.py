"""Where weights are read from: safetensors folders, and weights made from scratch, by Hugging Face
name and slice.
"""

import hashlib
from collections.abc import Collection, Mapping
from math import prod
from typing import Protocol

import torch
from torch import Tensor

from moetrain.models import Model
from moetrain.weights.dtypes import TORCH, as_tensor
from moetrain.weights.rows import num_rows, spans
from moetrain.weights.stored import StoredFolder

Slices = tuple[slice, ...]


class Reader(Protocol):
    """Tensors by name; `read` brings only the slice that is asked for."""

    def names(self) -> Collection[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def dtype(self, name: str) -> torch.dtype: ...

    def read(self, name: str, slices: Slices) -> Tensor: ...


class SafetensorsReader(StoredFolder):
    """The same as tensors."""

    def dtype(self, name: str) -> torch.dtype:
        return TORCH[self.dtype_name(name)]

    def read(self, name: str, slices: Slices) -> Tensor:
        shape, dtype = self.shape(name), self.dtype(name)
        sizes = [cut.stop - cut.start for cut in slices]
        if not prod(sizes):
            return torch.empty(sizes, dtype=dtype)
        if len(shape) != 2:  # cut along its first dimension or not at all
            rows = self._tensor(name, 0, num_rows(shape)).reshape(shape)
            return rows[slices]
        first, columns = slices
        if sizes[1] == shape[1]:
            return self._tensor(name, first.start, first.stop)
        result = torch.empty(sizes, dtype=dtype)
        for start, stop in spans((sizes[0], shape[1]), self.dtype_name(name)):
            part = self._tensor(name, first.start + start, first.start + stop)
            result[start:stop] = part[:, columns]
        return result

    def _tensor(self, name: str, start: int, stop: int) -> Tensor:
        """[rows, elements of a row]."""
        return as_tensor(self.rows(name, start, stop), self.dtype_name(name))


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


class Aliased:
    """The tensors of `base`, some of them under a second name too."""

    def __init__(self, base: Reader, names: Mapping[str, str]):
        self.base, self.aliases = base, names

    def __str__(self) -> str:
        return str(self.base)

    def _own(self, name: str) -> str:
        return self.aliases.get(name, name)

    def names(self) -> Collection[str]:
        return {*self.base.names(), *self.aliases}

    def shape(self, name: str) -> tuple[int, ...]:
        return self.base.shape(self._own(name))

    def dtype(self, name: str) -> torch.dtype:
        return self.base.dtype(self._own(name))

    def read(self, name: str, slices: Slices) -> Tensor:
        return self.base.read(self._own(name), slices)
