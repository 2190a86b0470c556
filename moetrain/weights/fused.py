"""Tensors as the files of some families have them (gpt-oss): all experts of a layer as one, an
expert's matrix as [in, out] with the rows of the table's matrices in turn. `StoredFolder` takes
them apart, this puts them together. Of other families everything stays as it is.
"""

import threading
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from moetrain.models import Rule
from moetrain.models.rules import FusedSlice, fused_slices
from moetrain.models.sharding import Shape
from moetrain.weights.header import SIZES
from moetrain.weights.rows import Bytes, Rows, num_rows

if TYPE_CHECKING:
    from torch import Tensor

type Table = Mapping[str, Rule]


def groups(table: Table) -> dict[str, list[Rule]]:
    """Name in the files -> the rules of what such a tensor holds, expert by expert."""
    found: dict[str, list[Rule]] = {}
    for rule in table.values():
        if rule.interleaved and rule.fused is not None:
            found.setdefault(rule.fused, []).append(rule)
    return found


def matrix_in(whole: "Tensor", cut: FusedSlice) -> "Tensor":
    """Where a tensor of the table lies in a fused one, as a view."""
    if cut.expert is not None:
        whole = whole[cut.expert]
    if cut.interleaved:
        part = whole[..., cut.part :: cut.num_parts]
        return part.mT if part.dim() > 1 else part
    rows = whole.shape[0] // cut.num_parts
    return whole[rows * cut.part : rows * (cut.part + 1)]


def file_names(table: Table, names: Iterable[str]) -> dict[str, str]:
    """These names of the table as the files have them, in their order, each with the first of the
    table's that lies there.
    """
    fused = {key: name for name, rules in groups(table).items() for r in rules for key in r.hf}
    result: dict[str, str] = {}
    for name in names:
        result.setdefault(fused.get(name, name), name)
    return result


def file_shapes(table: Table, shapes: Mapping[str, Shape]) -> dict[str, Shape]:
    """Of whole tensors by the table's names -> by the files', in their order."""
    fused = groups(table)
    return {
        name: file_shape(fused[name]) if name in fused else shapes[first]
        for name, first in file_names(table, shapes).items()
    }


def file_shape(rules: Sequence[Rule]) -> Shape:
    """Of a tensor that is put together: [experts, in, out], or [experts, out]."""
    shape = rules[0].hf_shapes[0]
    return (len(rules), *shape[:0:-1], shape[0] * len(rules[0].hf))


def with_all_experts(names: Collection[str], table: Table) -> set[str]:
    """Of the table's names these, and those that lie in a tensor with one of them."""
    fused = {table[name].fused for name in names if table[name].interleaved}
    return {*names, *(n for n, rule in table.items() if rule.interleaved and rule.fused in fused)}


def put_together(
    tensors: "Iterable[tuple[str, Tensor]]", table: Table
) -> "Iterator[tuple[str, Tensor]]":
    """Whole tensors by the table's names, in its order -> as the files have them. One that is put
    together is yielded with its last part, and is held until then.
    """
    fused = groups(table)
    where = {
        key: cut for rules in fused.values() for rule in rules for key, cut in fused_slices(rule)
    }
    held: dict[str, Tensor] = {}
    missing: dict[str, int] = {}
    for key, tensor in tensors:
        if key not in where:
            yield key, tensor
            continue
        cut = where[key]
        name, rules = cut.key, fused[cut.key]
        if name not in held:
            held[name] = tensor.new_empty(file_shape(rules))
            missing[name] = sum(len(rule.hf) for rule in rules)
        matrix_in(held[name], cut).copy_(tensor)
        missing[name] -= 1
        if not missing[name]:
            yield name, held.pop(name)
    assert not held, f"{sorted(held)[:4]} lack experts"


class PutTogether:
    """The same of what is read by rows. Threads may read at the same time."""

    def __init__(self, base: Rows, table: Table):
        self.base, self._groups = base, groups(table)
        self._inside = {key for rules in self._groups.values() for rule in rules for key in rule.hf}
        self._lock = threading.Lock()
        self._last: tuple[tuple[str, int], Bytes] | None = None

    def __str__(self) -> str:
        return str(self.base)

    def names(self) -> Collection[str]:
        return (set(self.base.names()) - self._inside) | self._groups.keys()

    def shape(self, name: str) -> Shape:
        rules = self._groups.get(name)
        return self.base.shape(name) if rules is None else file_shape(rules)

    def dtype_name(self, name: str) -> str:
        rules = self._groups.get(name)
        return self.base.dtype_name(name if rules is None else rules[0].hf[0])

    def rows(self, name: str, start: int, stop: int) -> Bytes:
        if name not in self._groups:
            return self.base.rows(name, start, stop)
        shape, size = self.shape(name), SIZES[self.dtype_name(name)]
        if len(shape) == 2:  # biases: a row is all of an expert's
            whole = [self._expert(name, expert)[0] for expert in range(start, stop)]
            return np.stack(whole) if whole else np.empty((0, shape[-1] * size), np.uint8)
        pieces: list[Bytes] = [np.empty((0, shape[-1] * size), np.uint8)]
        while start < stop:
            expert, first = divmod(start, shape[1])
            last = min(shape[1], first + stop - start)
            pieces.append(self._expert(name, expert)[first:last])
            start += last - first
        return np.concatenate(pieces)

    def _expert(self, name: str, expert: int) -> Bytes:
        """[in, bytes of a row] of one expert; of a bias [1, ...]. The last one is kept."""
        with self._lock:
            if self._last is not None and self._last[0] == (name, expert):
                return self._last[1]
        rule = self._groups[name][expert]
        kind = f"V{SIZES[self.dtype_name(name)]}"
        parts = [
            np.ascontiguousarray(self.base.rows(key, 0, num_rows(self.base.shape(key)))).view(kind)
            for key in rule.hf
        ]
        together = np.ascontiguousarray(np.stack(parts).transpose(2, 1, 0))
        made = together.reshape(len(together), -1).view(np.uint8)
        with self._lock:
            self._last = (name, expert), made
        return made
