"""A Megatron checkpoint's tensors by Hugging Face name and rows, at whatever layout it was written.
No torch, no process group, no model in memory.
"""

import errno
import io
import os
import re
import threading
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from math import prod
from pathlib import Path

import numpy as np

from moetrain import manifest
from moetrain.errors import CheckpointError
from moetrain.manifest import Manifest, say_unchecked
from moetrain.models import Model, Rule
from moetrain.models.rules import EMBEDDING, VALUE_HEAD
from moetrain.models.sharding import Vocab
from moetrain.weights.blobs import TORCH_NAMES, tensor_blob, tensor_of
from moetrain.weights.header import SIZES
from moetrain.weights.mcore_layout import Place, place, style_of
from moetrain.weights.megatron_lm import LOCAL_NAMES
from moetrain.weights.rows import Bytes, file_bytes, spans
from moetrain.weights.torch_index import INDEX, Chunk, Global, read_index

DATA = ".distcp"

# What a training checkpoint holds beside weights: the optimizer's state (`chained_0.optimizer...`
# where there are two), the reference of a KL, random generators, what fp8 needs.
_OF_TRAINING = re.compile(
    r"(chained_\d+\.)?optimizer\.|reference\.|(rng|rerun)_state|.*_extra_state"
)


def is_weight(key: str) -> bool:
    """Whether a tensor of a checkpoint is one of the model's."""
    return _OF_TRAINING.match(key) is None


class TorchDist:
    """The tensors of a checkpoint, as it names them. What is read is checked by its manifest, where
    there is one. Threads may read at the same time.

    Raises CheckpointError of `read_index`; DamageError for what is not as it was written.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._handles: dict[str, int] = {}
        self._manifest = Manifest.of(folder)
        if self._manifest is not None:
            self._manifest.all_there()
            manifest.check(folder, (n for n in self._manifest.files if not n.endswith(DATA)))
        self.index = read_index(folder)
        for value in self.index.values.values():
            self._check(value.file, value.start, value.start + value.length)
        for name in sorted({chunk.file for t in self.index.tensors.values() for chunk in t.chunks}):
            if not (folder / name).is_file():
                raise CheckpointError(f"{folder / name} is missing. Copy the checkpoint again.")
        self._starts: dict[Chunk, int] = {}
        self._by_lead: dict[str, dict[tuple[int, ...], list[Chunk]]] = {}
        self._lock = threading.Lock()

    def __str__(self) -> str:
        return str(self.folder)

    def __del__(self) -> None:
        for handle in getattr(self, "_handles", {}).values():
            os.close(handle)

    def rows(self, key: str, lead: tuple[int, ...], start: int, stop: int) -> Bytes:
        """[stop - start, bytes of a row]: rows of the matrix (elements of the vector) at `lead` of
        the first axes of a tensor.
        """
        tensor = self.index.tensors[key]
        width = SIZES[tensor.dtype_name]
        columns = tensor.shape[-1] if len(tensor.shape) - len(lead) > 1 else 1
        result: Bytes | None = None
        covered = 0
        corners: set[tuple[int, int]] = set()  # that an odd number of the parts has
        for chunk in self._chunks(key, tensor, lead):
            low, high, left, right = _box(chunk, len(lead))
            first, last = max(low, start), min(high, stop)
            if first < last:
                part = self._read(key, tensor, chunk, lead, first - low, last - low)
                covered += (last - first) * (right - left)
                corners ^= {(row, at) for row in (first, last) for at in (left, right)}
                if covered == (stop - start) * columns and result is None:
                    return part  # as it lies in the file
                if result is None:
                    result = np.zeros((stop - start, columns * width), np.uint8)
                result[first - start : last - start, left * width : right * width] = part
        size = (stop - start) * columns
        # Rectangles fill one without overlaps where areas add up and inner corners meet in pairs.
        outer = {(row, at) for row in (start, stop) for at in (0, columns)}
        if covered != size or (size and corners != outer):
            what = "only in part" if covered < size else "more than once"
            raise CheckpointError(
                f"{self.folder}: {key} is there {what}. Copy the checkpoint again."
            )
        return np.empty((0, columns * width), np.uint8) if result is None else result

    def _chunks(self, key: str, tensor: Global, lead: tuple[int, ...]) -> list[Chunk]:
        """Those that hold something at `lead`."""
        with self._lock:
            if key not in self._by_lead:
                by_lead: dict[tuple[int, ...], list[Chunk]] = {}
                for chunk in tensor.chunks:
                    sizes = chunk.sizes[: len(lead)]
                    for at in np.ndindex(*sizes):
                        where = tuple(o + i for o, i in zip(chunk.offsets, at, strict=False))
                        by_lead.setdefault(where, []).append(chunk)
                self._by_lead[key] = by_lead
            return self._by_lead[key].get(lead, [])

    def _read(
        self, key: str, tensor: Global, chunk: Chunk, lead: tuple[int, ...], low: int, high: int
    ) -> Bytes:
        """Rows [low, high) of a chunk, at `lead` of the whole tensor."""
        _, _, left, right = _box(chunk, len(lead))
        row, rest = 0, chunk.sizes[len(lead) :]
        for at, offset, size in zip(lead, chunk.offsets, chunk.sizes, strict=False):
            row = row * size + at - offset
        first = row * rest[0] + low
        width = (right - left) * SIZES[tensor.dtype_name]
        path = self.folder / chunk.file
        start = chunk.start + self._values(key, tensor, chunk) + first * width
        flat = file_bytes(self._handle(path), start, (high - low) * width)
        if flat is None:
            raise CheckpointError(f"{path} is truncated. Copy the checkpoint again.")
        if self._manifest is not None:
            self._manifest.check_read(path, start, flat.data)
        return flat.reshape(-1, width)

    def _values(self, key: str, tensor: Global, chunk: Chunk) -> int:
        """Where in its blob the values of a chunk begin, which are checked as they are read; what
        stands around them is checked here.
        """
        if chunk not in self._starts:
            usual = self._usual_start(tensor, chunk)
            self._starts[chunk] = usual or self._start_in_archive(key, tensor, chunk)
        return self._starts[chunk]

    def _start_in_archive(self, key: str, tensor: Global, chunk: Chunk) -> int:
        path = self.folder / chunk.file
        window = _Window(self._handle(path), chunk.start, chunk.length)
        try:
            header = tensor_of(io.BufferedReader(window, 1 << 12))
        except (ValueError, OSError) as error:
            raise CheckpointError(
                f"{path}: a part of {key} is {error}. Copy the checkpoint again."
            ) from None
        if (header.dtype_name, header.shape) != (tensor.dtype_name, chunk.sizes):
            raise CheckpointError(
                f"{path}: a part of {key} is {header.dtype_name} {list(header.shape)}, {INDEX}"
                f" says {tensor.dtype_name} {list(chunk.sizes)}. Copy the checkpoint again."
            )
        values = chunk.start + header.start
        self._check(chunk.file, chunk.start, values)
        self._check(chunk.file, values + header.num_bytes, chunk.start + chunk.length)
        return header.start

    def _usual_start(self, tensor: Global, chunk: Chunk) -> int | None:
        """The same if all around the values is, byte by byte, as this package writes it, else None:
        comparing takes less time than reading an archive.
        """
        num_bytes = prod(chunk.sizes) * SIZES[tensor.dtype_name]
        if tensor.dtype_name not in TORCH_NAMES or not num_bytes < chunk.length < 1 << 32:
            return None
        blob = tensor_blob(tensor.dtype_name, chunk.sizes)
        if chunk.length != blob.size:
            return None
        path = self.folder / chunk.file
        handle, end = self._handle(path), len(blob.prefix) + blob.num_bytes
        prefix = os.pread(handle, len(blob.prefix), chunk.start)
        suffix = os.pread(handle, blob.size - end, chunk.start + end)
        if not blob.is_around(prefix, suffix):
            return None
        if self._manifest is None:
            say_unchecked(self.folder)
        else:
            self._manifest.check_read(path, chunk.start, memoryview(prefix))
            self._manifest.check_read(path, chunk.start + end, memoryview(suffix))
        return len(prefix)

    def _check(self, file: str, start: int, stop: int) -> None:
        if self._manifest is None:
            say_unchecked(self.folder)
        else:
            self._manifest.check(self.folder / file, start, stop)

    def _handle(self, path: Path) -> int:
        with self._lock:
            if path.name not in self._handles:
                try:
                    self._handles[path.name] = os.open(path, os.O_RDONLY)
                except OSError as error:
                    raise CheckpointError(
                        f"{path}: {error.strerror}. Copy the checkpoint again."
                    ) from None
            return self._handles[path.name]


def _box(chunk: Chunk, num_lead: int) -> tuple[int, int, int, int]:
    """(first row, one behind the last, first column, one behind the last)."""
    offsets, sizes = chunk.offsets[num_lead:], chunk.sizes[num_lead:]
    if len(sizes) == 1:
        return offsets[0], offsets[0] + sizes[0], 0, 1
    return offsets[0], offsets[0] + sizes[0], offsets[1], offsets[1] + sizes[1]


class _Window(io.RawIOBase):
    """A part of a file, as a file."""

    def __init__(self, handle: int, start: int, length: int):
        self._handle, self._start, self._length, self._at = handle, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        at = (0, self._at, self._length)[whence] + offset
        if at < 0:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))  # as a file does
        self._at = at
        return at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        room = max(0, min(len(buffer), self._length - self._at))
        content = os.pread(self._handle, room, self._start + self._at)
        buffer[: len(content)] = content
        self._at += len(content)
        return len(content)


def _check_vocabulary(folder: Path, key: str, rows: int, vocab_size: int) -> None:
    if rows < vocab_size:
        raise CheckpointError(
            f"{folder}: {key} has {rows} rows, fewer than its config's vocab_size of {vocab_size}:"
            f" Megatron-LM keeps the tokenizer's tokens and some padding. Give a config with a"
            f" vocab_size of at most {rows}."
        )


class McoreRows:
    """A checkpoint under Hugging Face names.

    Args:
        table: the weights that it holds: the model's, or those of an adapter of it.

    Raises:
        CheckpointError: a tensor is of another shape than the model's, or the model has no
            parameter for it.
    """

    def __init__(self, folder: Path, model: Model, table: Mapping[str, Rule] | None = None):
        self.source = TorchDist(folder)
        tensors = self.source.index.tensors
        style = style_of(tensors) if table is None else "by_layer"
        self._places: dict[str, tuple[Place, int]] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        for rule in (model.table if table is None else table).values():
            at = place(rule, model, style)
            if at.key not in tensors and rule.saved in LOCAL_NAMES:
                at = place(replace(rule, saved=LOCAL_NAMES[rule.saved]), model, style)
            tensor = tensors.get(at.key)
            if tensor is None:
                continue  # who wants it says so
            wanted = (*at.lead_shape, *at.shape)
            shape = tensor.shape
            if isinstance(rule.sharding, Vocab) and len(shape) == len(wanted):  # other padding
                vocab = rule.sharding.shape[0]
                _check_vocabulary(folder, at.key, shape[0], vocab)
                wanted = (max(rule.sharding.shape[0], shape[0]), *wanted[1:])
            if shape != wanted:
                raise CheckpointError(
                    f"{folder}: {at.key} is {list(shape)}, its config asks for {list(wanted)}. Is"
                    f" it the one of this checkpoint?"
                )
            if isinstance(rule.sharding, Vocab):
                self._check_padding(at, tensor, rule.sharding.shape[0])
            for part, (key, hf_shape) in enumerate(zip(rule.hf, rule.hf_shapes, strict=True)):
                self._places[key] = at, part
                self._shapes[key] = hf_shape
        self._check_all_used(tensors)

    def __str__(self) -> str:
        return str(self.source)

    def _check_padding(self, at: Place, tensor: Global, vocab: int) -> None:
        """What no Hugging Face tensor has is read here, so that damage to it is seen."""
        for low, high in spans((tensor.shape[0] - vocab, *tensor.shape[1:]), tensor.dtype_name):
            self.source.rows(at.key, at.lead, vocab + low, vocab + high)

    def _check_all_used(self, tensors: Mapping[str, Global]) -> None:
        used = {at.key for at, _ in self._places.values()}
        extra = [
            key for key in sorted(tensors.keys() - used) if is_weight(key) and key != VALUE_HEAD
        ]
        if extra:
            raise CheckpointError(
                f"{self}: {len(extra)} tensors belong to no parameter of this model: "
                f"{', '.join(extra[:4])}. Is its config the one of this checkpoint?"
            )

    @property
    def num_embeddings(self) -> int:
        """With padding."""
        at, _ = self._places[EMBEDDING]
        return self.source.index.tensors[at.key].shape[0]

    def names(self) -> Collection[str]:
        return self._places.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def dtype_name(self, name: str) -> str:
        return self.source.index.tensors[self._places[name][0].key].dtype_name

    def rows(self, name: str, start: int, stop: int) -> Bytes:
        at, _ = self._places[name]
        parts = [
            self.source.rows(at.key, at.lead, low, high)
            for low, high in self._runs(name, start, stop)
        ]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _runs(self, name: str, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Where rows [start, stop) lie in the checkpoint's tensor, in their order."""
        at, part = self._places[name]
        for piece in at.pieces:
            if piece.part == part:
                low = max(start, piece.hf_start)
                high = min(stop, piece.hf_start + piece.length)
                if low < high:
                    shift = piece.local_start - piece.hf_start
                    yield low + shift, high + shift

    def sources(self) -> list[Path]:
        """The files that are read."""
        files = {chunk.file for t in self.source.index.tensors.values() for chunk in t.chunks}
        return sorted(self.source.folder / name for name in (*files, INDEX))
