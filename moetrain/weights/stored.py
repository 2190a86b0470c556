"""A Hugging Face folder's tensors by rows, as its files have them. No torch."""

import os
import threading
from collections.abc import Collection
from math import prod
from pathlib import Path

import numpy as np

from moetrain.errors import WeightsError
from moetrain.manifest import Manifest, say_unchecked
from moetrain.models import Model
from moetrain.models.rules import FusedSlice
from moetrain.weights.folder import weight_files
from moetrain.weights.header import SIZES, Stored, broken, read_header
from moetrain.weights.rows import Bytes, file_bytes, num_rows, row_bytes

_BLOCKS = 3  # of experts, that are kept apart


class StoredFolder:
    """A folder of safetensors: one file, or shards with an index. Headers are read at once, data
    when asked for; what is read is checked by the folder's manifest, where there is one. Threads
    may read at the same time.

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
        self._handles: dict[Path, int] = {}
        self._lock = threading.Lock()
        self._blocks: dict[tuple[str, int], Bytes] = {}  # what `_apart` has made
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

    def __del__(self) -> None:
        for handle in self._handles.values():
            os.close(handle)

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
            if not rows or rows[-1 if cut.interleaved else 0] % cut.num_parts:
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
        shape = shape[::-1] if cut.interleaved else shape
        return (shape[0] // cut.num_parts, *shape[1:])

    def dtype_name(self, name: str) -> str:
        cut = self._fused.get(name)
        return self._meta[name if cut is None else cut.key].dtype

    def rows(self, name: str, start: int, stop: int) -> Bytes:
        cut = self._fused.get(name)
        width = row_bytes(self.shape(name), self.dtype_name(name))
        if stop == start or not width:
            return np.empty((stop - start, width), np.uint8)
        if cut is not None and cut.interleaved:
            return self._apart(cut)[cut.part, start:stop]
        path, at = self._first_byte(name)
        return self._bytes(path, at + start * width, (stop - start) * width).reshape(-1, width)

    def _bytes(self, path: Path, at: int, num: int) -> Bytes:
        if self._manifest is None:
            say_unchecked(self.folder)
        flat = file_bytes(self._handle(path), at, num)
        if flat is None:
            raise broken(path, "it became shorter")
        if self._manifest is not None:
            self._manifest.check_read(path, at, flat.data)
        return flat

    def _apart(self, cut: FusedSlice) -> Bytes:
        """[parts, rows, bytes of a row]: an expert's matrices, each by rows. The last ones are
        kept, since gate and up come one after the other, and each in many ranges.
        """
        key = cut.key, cut.expert or 0
        with self._lock:
            if key in self._blocks:
                return self._blocks[key]
        stored = self._meta[cut.key]
        size = SIZES[stored.dtype]
        num = prod(stored.shape[1:]) * size
        flat = self._bytes(self._where[cut.key], stored.start + key[1] * num, num)
        columns = prod(stored.shape[1:-1])
        by_columns = flat.view(f"V{size}").reshape(columns, -1, cut.num_parts)
        apart = np.ascontiguousarray(by_columns.transpose(2, 1, 0)).view(np.uint8)
        with self._lock:
            while len(self._blocks) >= _BLOCKS:
                self._blocks.pop(next(iter(self._blocks)))
            self._blocks[key] = apart
        return apart

    def _first_byte(self, name: str) -> tuple[Path, int]:
        """The file of a tensor, and where its values begin there."""
        cut = self._fused.get(name)
        if cut is None:
            return self._where[name], self._meta[name].start
        stored, shape = self._meta[cut.key], self.shape(name)
        number = (cut.expert or 0) * cut.num_parts + cut.part  # of tensors of this size before it
        size = num_rows(shape) * row_bytes(shape, stored.dtype)
        return self._where[cut.key], stored.start + number * size

    def _handle(self, path: Path) -> int:
        if path not in self._handles:
            self._handles[path] = os.open(path, os.O_RDONLY)
        return self._handles[path]

    def sources(self) -> list[Path]:
        """The files that are read."""
        return sorted(set(self._where.values()))
