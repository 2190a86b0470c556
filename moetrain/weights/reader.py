"""Where weights are read from: safetensors folders, and weights made from scratch, by Hugging Face
name and slice.
"""

import hashlib
from collections.abc import Collection, Mapping
from math import prod
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from moetrain.errors import WeightsError
from moetrain.manifest import Manifest, say_unchecked
from moetrain.models import Model
from moetrain.models.rules import FusedSlice
from moetrain.weights.folder import weight_files
from moetrain.weights.header import Stored, open_file, read_header

Slices = tuple[slice, ...]


class Reader(Protocol):
    """Tensors by name; `read` brings only the slice that is asked for."""

    def names(self) -> Collection[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def dtype(self, name: str) -> torch.dtype: ...

    def read(self, name: str, slices: Slices) -> Tensor: ...


class SafetensorsReader:
    """A folder of safetensors: one file, or shards with an index. Headers are read at once, data
    when asked for; what is read is checked by the folder's manifest, where there is one.

    Args:
        folder: holds model.safetensors, or model.safetensors.index.json and its shards.
        model: present transformers-5 fused experts under the table's per-expert names.

    Raises:
        WeightsError: what `weight_files` and `read_header` refuse, a file that is not as it was
            written, a tensor in two files, or fused experts that stand there one by one too or are
            not as many as `model` has.
    """

    def __init__(self, folder: Path, model: Model | None = None):
        self.folder = Path(folder)
        self._where: dict[str, Path] = {}
        self._meta: dict[str, Stored] = {}
        self._open: dict[Path, Any] = {}
        self._manifest = Manifest.of(self.folder)
        if self._manifest is not None:
            self._manifest.all_there()
        for path, names in weight_files(self.folder).items():
            header = read_header(path, self._manifest)
            for name in names or ():
                if name not in header:
                    raise WeightsError(
                        f"{path}: the index promises {name}, which is not in it. Fetch the file "
                        f"again."
                    )
            for name, entry in header.items():  # whether the index names it or not
                if name in self._where:
                    raise WeightsError(
                        f"{self.folder}: {self._where[name].name} and {path.name} both hold {name}."
                        f" Copy the model again."
                    )
                self._where[name] = path
                self._meta[name] = entry
        self._fused: dict[str, FusedSlice] = {}
        if model is not None:
            slices = model.fused_slices
            self._fused = {name: cut for name, cut in slices.items() if cut.key in self._where}
            self._check_fused(model.num_experts)
        self._hidden = {cut.key for cut in self._fused.values()}

    def __str__(self) -> str:
        return str(self.folder)

    def _check_fused(self, num_experts: int) -> None:
        """By its per-expert names alone a fused tensor with too many experts would look right."""
        for name, cut in self._fused.items():
            if name in self._where:
                raise WeightsError(
                    f"{self.folder} holds {cut.key} and {name}, two tensors for one weight. Remove"
                    f" one of them."
                )
            shape = self._meta[cut.key].shape
            rows = shape if cut.expert is None else shape[1:]
            if not rows or rows[0] % cut.num_parts:
                raise WeightsError(
                    f"{self.folder}: {cut.key} is {list(shape)}, which does not hold {name}. Is "
                    f"config.json the one of these weights?"
                )
            if cut.expert is not None and shape[0] != num_experts:
                raise WeightsError(
                    f"{self.folder}: {cut.key} is {list(shape)}, config.json asks for "
                    f"{num_experts} experts. Check the number of experts in config.json."
                )

    def names(self) -> Collection[str]:
        return (self._where.keys() - self._hidden) | self._fused.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        cut = self._fused.get(name)
        if cut is None:
            return self._meta[name].shape
        shape = self._meta[cut.key].shape
        shape = shape if cut.expert is None else shape[1:]
        return (shape[0] // cut.num_parts, *shape[1:])

    def dtype(self, name: str) -> torch.dtype:
        cut = self._fused.get(name)
        return self._meta[name if cut is None else cut.key].dtype

    def read(self, name: str, slices: Slices) -> Tensor:
        cut = self._fused.get(name)
        if cut is None:
            return self._slice(name, slices)
        rows = self.shape(name)[0]
        start = rows * cut.part
        shifted: tuple[slice | int, ...] = (
            slice(slices[0].start + start, slices[0].stop + start),
            *slices[1:],
        )
        return self._slice(cut.key, shifted if cut.expert is None else (cut.expert, *shifted))

    def _slice(self, name: str, slices: tuple[slice | int, ...]) -> Tensor:
        path, stored = self._where[name], self._meta[name]
        if self._manifest is None:
            say_unchecked(self.folder)
        if path not in self._open:
            self._open[path] = open_file(path, None)
        sizes = [s.stop - s.start for s in slices if isinstance(s, slice)]
        if not prod(sizes):
            return torch.empty(sizes, dtype=stored.dtype)
        if self._manifest is not None:
            self._manifest.check(path, *_bytes_of(stored, slices))
        if not stored.shape:
            return self._open[path].get_tensor(name)  # type: ignore[no-any-return]
        return self._open[path].get_slice(name)[slices]  # type: ignore[no-any-return]


def _bytes_of(stored: Stored, slices: tuple[slice | int, ...]) -> tuple[int, int]:
    """Where a slice lies in the file: from its first byte to behind its last."""
    first = last = 0  # numbers of elements
    for size, cut in zip(stored.shape, slices, strict=True):
        low, high = (cut.start, cut.stop - 1) if isinstance(cut, slice) else (cut, cut)
        first, last = first * size + low, last * size + high
    width = stored.dtype.itemsize
    return stored.start + first * width, stored.start + (last + 1) * width


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
