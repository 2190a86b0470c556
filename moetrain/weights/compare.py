"""Whether two folders hold the same weights, some rows of a pair of tensors at a time. No torch,
unless values differ.
"""

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moetrain.models import Model
from moetrain.models.rules import EMBEDDING, HEAD
from moetrain.weights.header import SIZES
from moetrain.weights.opening import config_for, open_model, open_weights_of
from moetrain.weights.rows import Bytes, Renamed, Rows, num_rows, row_bytes, spans
from moetrain.weights.stream import Report, in_threads

type Adapters = tuple[Path | None, Path | None]  # PEFT folders, of either side
NO_ADAPTERS: Adapters = (None, None)


_LIBC = ctypes.CDLL(None)
_LIBC.memcmp.argtypes = ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t


@dataclass(frozen=True)
class Difference:
    """One tensor that is not the same in both folders."""

    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


@dataclass(frozen=True)
class _Part:
    """What differs in a range of rows of one tensor."""

    name: str
    count: int
    first: int  # number of the element
    gap: float  # the largest


def compare(
    a: Path,
    b: Path,
    workers: int = 1,
    report: Report | None = None,
    config: Path | None = None,
    adapters: Adapters = NO_ADAPTERS,
) -> Iterator[Difference]:
    """Yield a Difference for every tensor that is missing on a side or differs in shape, dtype or
    any bit. Fused experts are compared with those of a folder that has them one by one, a tied
    model's embedding with an lm_head of the other, and what no parameter is made of (old rotary
    buffers) may be on one side alone.

    Args:
        a, b: Hugging Face folders or Megatron checkpoints.
        report: called with (bytes compared, bytes of all), if given.
        config: of a checkpoint of Megatron-LM's; by default that of the other folder.
        adapters: merged into them as they are read.
    """
    (first, model), (second, other) = (
        _opened(a, config or b, adapters[0]),
        _opened(b, config or a, adapters[1]),
    )
    ignored, also_ignored = (m.ignored_keys if m else frozenset[str]() for m in (model, other))
    first, second = _with_head(first, model, second), _with_head(second, other, first)
    names = set(first.names()) | set(second.names())
    names -= (ignored | also_ignored) & (set(first.names()) ^ set(second.names()))
    alike: list[str] = []
    for name in sorted(names):
        reason = _unlike(first, second, name, a, b)
        if reason:
            yield Difference(name, reason)
        else:
            alike.append(name)
    differing: dict[str, list[_Part]] = {}
    for part in _parts(first, second, alike, workers, report):
        differing.setdefault(part.name, []).append(part)
    for name in sorted(differing):
        yield Difference(name, _reason(differing[name], first.shape(name)))


def _opened(path: Path, config: Path, adapter: Path | None) -> tuple[Rows, Model | None]:
    if adapter is None:
        return open_weights_of(path, config)
    opened = open_model(path, config_for(path, config), adapter)
    return opened.rows, opened.model


def _unlike(first: Rows, second: Rows, name: str, a: Path, b: Path) -> str:
    """Why two tensors cannot be compared, "" where they can."""
    if name not in second.names():
        return f"only in {a}"
    if name not in first.names():
        return f"only in {b}"
    if first.shape(name) != second.shape(name):
        return f"shape {list(first.shape(name))} against {list(second.shape(name))}"
    if first.dtype_name(name) != second.dtype_name(name):
        return f"{first.dtype_name(name)} against {second.dtype_name(name)}"
    return ""


def _parts(
    first: Rows, second: Rows, names: list[str], workers: int, report: Report | None
) -> Iterator[_Part]:
    """What differs, in ranges of rows that are compared in threads."""

    def look(job: tuple[str, int, int]) -> _Part | None:
        name, start, stop = job
        x, y = first.rows(name, start, stop), second.rows(name, start, stop)
        return None if _are_equal(x, y) else _part(name, start, x, y, first)

    def jobs() -> Iterator[tuple[str, int, int]]:
        for name in names:
            for start, stop in spans(first.shape(name), first.dtype_name(name)):
                yield name, start, stop

    size = {name: row_bytes(first.shape(name), first.dtype_name(name)) for name in names}
    total = sum(size[name] * num_rows(first.shape(name)) for name in names)
    done = 0
    for (name, start, stop), part in in_threads(look, jobs(), workers):
        if part is not None:
            yield part
        done += size[name] * (stop - start)
        if report is not None:
            report(done, total)


def _are_equal(x: Bytes, y: Bytes) -> bool:
    """Whether two ranges of as many rows have the same bytes: by memcmp, which takes a third of the
    time of numpy's comparison and lets other threads run meanwhile.
    """
    x, y = np.ascontiguousarray(x), np.ascontiguousarray(y)
    assert x.nbytes == y.nbytes
    return not _LIBC.memcmp(x.ctypes.data, y.ctypes.data, x.nbytes)


def _part(name: str, start: int, x: Bytes, y: Bytes, rows: Rows) -> _Part:
    width = SIZES[rows.dtype_name(name)]
    differ = (x != y).reshape(-1, width).any(1)
    per_row = x.shape[1] // width
    first = start * per_row + int(differ.argmax())
    return _Part(name, int(differ.sum()), first, _gap(x, y, rows.dtype_name(name), differ))


def _gap(x: Bytes, y: Bytes, dtype_name: str, differ: np.ndarray) -> float:
    """The largest distance of two values that differ."""
    import torch

    from moetrain.weights.dtypes import as_tensor

    mask = torch.from_numpy(differ)
    a, b = (as_tensor(rows, dtype_name).flatten()[mask].double() for rows in (x, y))
    return float((a - b).abs().max())


def _reason(parts: list[_Part], shape: tuple[int, ...]) -> str:
    count = sum(part.count for part in parts)
    first = min(part.first for part in parts)
    index = [int(i) for i in np.unravel_index(first, shape)] if shape else []
    gap = max(part.gap for part in parts)
    total = int(np.prod(shape)) if shape else 1
    return f"{count / total:.2%} of values differ, by up to {gap:.3g}, the first at {index}"


def _with_head(rows: Rows, model: Model | None, other: Rows) -> Rows:
    """A tied model with its embedding as lm_head too, where the other one has an lm_head."""
    held = rows.names()
    if model is None or not model.heads.tied or HEAD in held or HEAD not in other.names():
        return rows
    return Renamed(rows, {**{name: name for name in held}, HEAD: EMBEDDING})
