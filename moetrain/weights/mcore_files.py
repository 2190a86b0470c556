"""The files of a Megatron checkpoint made of Hugging Face tensors: each chunk is a run of rows of
one of them, so that rows are copied as they lie. No torch.
"""

import json
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moetrain.models import Model, Rule
from moetrain.models.sharding import Piece
from moetrain.weights.blobs import Blob, object_blob, tensor_blob
from moetrain.weights.hf_files import SHARD_BYTES
from moetrain.weights.mcore_layout import Place, Style, place
from moetrain.weights.rows import Rows, span_rows
from moetrain.weights.stream import Plan, Task, runs
from moetrain.weights.torch_index import INDEX, Chunk, Global, Index, Value, write_index

# What Megatron reads on every rank besides the tensors (0.19); here nothing.
COMMON_KEY, COMMON = "common_state/shard_0_1", [{}]


def dtype_names(rows: Rows, model: Model, style: Style) -> dict[str, str]:
    """Hugging Face name -> dtype in a checkpoint, whose tensors have one each: where parts of one
    differ, fp32 holds all of them.
    """
    together: dict[str, set[str]] = {}
    for rule in model.table.values():
        key = place(rule, model, style).key
        together.setdefault(key, set()).update(rows.dtype_name(name) for name in rule.hf)
    result: dict[str, str] = {}
    for rule in model.table.values():
        dtypes = together[place(rule, model, style).key]
        for name in rule.hf:
            result[name] = next(iter(dtypes)) if len(dtypes) == 1 else "F32"
    return result


@dataclass
class _Files:
    """Files that are planned from their first byte to their last."""

    shard_bytes: int
    sizes: dict[str, int] = field(default_factory=dict[str, int])
    tasks: list[Task] = field(default_factory=list[Task])
    chunks: dict[str, list[Chunk]] = field(default_factory=dict[str, list[Chunk]])

    def room(self, size: int) -> tuple[str, int]:
        """(file, first byte) of the next `size` bytes."""
        name = f"__0_{max(0, len(self.sizes) - 1)}.distcp"
        if self.sizes.get(name, 0) + size > self.shard_bytes and self.sizes.get(name):
            name = f"__0_{len(self.sizes)}.distcp"
        start = self.sizes.get(name, 0)
        self.sizes[name] = start + size
        return name, start

    def add(self, at: Place, row: int, around: Blob, shape: tuple[int, ...], **task: Any) -> None:
        """A chunk: what lies at `row` of a parameter."""
        size = around.size
        file, start = self.room(size)
        offsets = (*at.lead, row, *[0] * (len(shape) - 1))
        sizes = (*[1] * len(at.lead), *shape)
        self.chunks.setdefault(at.key, []).append(Chunk(offsets, sizes, file, start, size))
        self.tasks.append(Task(file, start, **task))


def plan(
    rows: Rows,
    model: Model,
    style: Style,
    common: Any = COMMON,
    nothing: Iterable[str] = (),
    shard_bytes: int = SHARD_BYTES,
) -> tuple[Plan, Index]:
    """Of a checkpoint with all of a model's weights, and the index that goes with it.

    Args:
        rows: has the dtypes of `dtype_names`.
        common: what goes under COMMON_KEY.
        nothing: keys under which there is a None, which is stored once.
    """
    files = _Files(shard_bytes)
    content = object_blob(common)
    first, start = files.room(len(content))
    files.tasks.append(Task(first, start, content))
    values = {COMMON_KEY: Value(first, start, len(content))}
    if keys := list(nothing):
        content = object_blob([None])
        file, start = files.room(len(content))
        files.tasks.append(Task(file, start, content))
        values |= dict.fromkeys(keys, Value(file, start, len(content)))
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {}
    for rule in model.table.values():
        at = place(rule, model, style)
        shapes[at.key] = rows.dtype_name(rule.hf[0]), (*at.lead_shape, *at.shape)
        for piece in at.pieces:
            _add_rows(files, rows, rule, at, piece)
        _add_padding(files, rows.dtype_name(rule.hf[0]), at)
        for part, name in enumerate(rule.hf):
            if not _are_whole_spans(rows, name, at, part):
                whole = sum(piece.length for piece in at.pieces if piece.part == part)
                files.tasks.append(Task("", 0, b"", name, 0, whole, is_hashed=True))
    tensors = {key: Global(*shape, tuple(files.chunks[key])) for key, shape in shapes.items()}
    return Plan(files.sizes, tuple(files.tasks)), Index(tensors, values)


def _add_rows(files: _Files, rows: Rows, rule: Rule, at: Place, piece: Piece) -> None:
    name, rest = rule.hf[piece.part], at.shape[1:]
    is_hashed = _are_whole_spans(rows, name, at, piece.part)
    stop = piece.hf_start + piece.length
    for low, high in runs(rows.shape(name), rows.dtype_name(name), piece.hf_start, stop):
        shape = (high - low, *rest)
        blob = tensor_blob(rows.dtype_name(name), (*[1] * len(at.lead), *shape))
        row = piece.local_start + low - piece.hf_start
        task: dict[str, Any] = dict(fixed=blob.prefix, tensor=name, low=low, high=high, blob=blob)
        files.add(at, row, blob, shape, is_hashed=is_hashed, **task)


def _are_whole_spans(rows: Rows, name: str, at: Place, part: int) -> bool:
    """Whether the pieces of a tensor begin where its spans do, so that they can be hashed as the
    tensor is.
    """
    step = span_rows(rows.shape(name), rows.dtype_name(name))
    return all(piece.hf_start % step == 0 for piece in at.pieces if piece.part == part)


def _add_padding(files: _Files, dtype_name: str, at: Place) -> None:
    """The zero rows of a vocabulary."""
    rows = at.shape[0] - sum(piece.length for piece in at.pieces)
    if not rows:
        return
    shape = (rows, *at.shape[1:])
    blob = tensor_blob(dtype_name, (*[1] * len(at.lead), *shape))
    zeros = bytes(blob.num_bytes)
    fixed = blob.prefix + zeros + blob.suffix(zlib.crc32(zeros))
    files.add(at, at.shape[0] - rows, blob, shape, fixed=fixed)


def write_notes(folder: Path, index: Index, state: Mapping[str, Any]) -> None:
    """What goes beside the data. Raises OSError."""
    write_index(folder / INDEX, index)
    backend = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
    (folder / "metadata.json").write_text(json.dumps(backend))
    (folder / "state.json").write_text(json.dumps(dict(state)))
