"""How one Megatron tensor is made of Hugging Face tensors, at any tensor-parallel rank.

Legend: h hidden, f feed-forward, d head_dim, g key/value groups, q queries per group, v vocabulary.
HF tensors are global; a Megatron tensor here is one rank's local shard. Values are copied, never
computed, so every sharding is exact and invertible in any dtype.

A sharding says one thing, its `pieces`: which rows (or columns) of which HF tensor lie where in the
local tensor. Slices to read, packing, unpacking and shapes follow from it, and so cannot disagree.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from moetrain.errors import LayoutError

if TYPE_CHECKING:
    from torch import Tensor

type Shape = tuple[int, ...]
type Slices = tuple[slice, ...]

# Megatron's make_vocab_size_divisible_by: each tensor-parallel rank holds a multiple of these rows.
VOCAB_MULTIPLE = 128


@dataclass(frozen=True, slots=True)
class Piece:
    """`length` rows of HF tensor number `part`, from `hf_start` there to `local_start` here."""

    part: int
    hf_start: int
    local_start: int
    length: int


@dataclass(frozen=True)
class Sharding(ABC):
    """`shape` is the global shape of the (first) HF tensor.

    `dim` is the dimension along which tensor-parallel ranks split the HF tensors: their parts,
    concatenated along it in rank order, are the HF tensor. None: every rank holds the whole.
    """

    shape: Shape
    dim: ClassVar[int | None] = 0
    num_parts: ClassVar[int] = 1

    @abstractmethod
    def pieces(self, tp_rank: int, tp_size: int) -> tuple[Piece, ...]:
        """Where everything lies along `dim` (0 when replicated), in local order, none empty.

        The pieces of one part are consecutive in its HF tensor. Raises LayoutError when `tp_size`
        does not divide.
        """

    def hf_shapes(self) -> tuple[Shape, ...]:
        """The global shape of each HF tensor."""
        return (self.shape,) * self.num_parts

    def local_shape(self, tp_rank: int, tp_size: int) -> Shape:
        """The shape of the local Megatron tensor, padding included."""
        shape = list(self.hf_shapes()[0])
        shape[self.dim or 0] = sum(piece.length for piece in self.pieces(tp_rank, tp_size))
        return tuple(shape)

    def saved(self, tp_rank: int, tp_size: int) -> tuple[tuple[int, int, int], ...]:
        """(local start, start in a checkpoint's global tensor, length) of each run along `dim`:
        ranks' tensors one behind the other, padding included.
        """
        length = self.local_shape(tp_rank, tp_size)[self.dim or 0]
        return ((0, 0 if self.dim is None else tp_rank * length, length),)

    def parts(self, tp_rank: int, tp_size: int) -> tuple[Slices, ...]:
        """What this rank needs of each HF tensor: a slice, start and stop given, per dimension.

        Where it needs nothing, slice(0, 0) along `dim`.
        """
        pieces = self.pieces(tp_rank, tp_size)
        result: list[Slices] = []
        for part, shape in enumerate(self.hf_shapes()):
            part_pieces = [piece for piece in pieces if piece.part == part]
            start = part_pieces[0].hf_start if part_pieces else 0
            stop = part_pieces[-1].hf_start + part_pieces[-1].length if part_pieces else 0
            slices = [slice(0, size) for size in shape]
            slices[self.dim or 0] = slice(start, stop)
            result.append(tuple(slices))
        return tuple(result)

    def pack(self, parts: tuple[Tensor, ...], tp_rank: int, tp_size: int) -> Tensor:
        """The local Megatron tensor from what `parts` cut out of the HF tensors.

        dtype and device are those of the parts; it may share their memory.
        """
        dim = self.dim or 0
        shape = self.local_shape(tp_rank, tp_size)
        pieces = self.pieces(tp_rank, tp_size)
        if len(pieces) == 1 and pieces[0].length == shape[dim]:
            return parts[pieces[0].part]
        slices = self.parts(tp_rank, tp_size)
        local = parts[0].new_zeros(shape)
        for piece in pieces:
            start = piece.hf_start - slices[piece.part][dim].start
            source = parts[piece.part].narrow(dim, start, piece.length)
            local.narrow(dim, piece.local_start, piece.length).copy_(source)
        return local

    def unpack(self, local: Tensor, tp_rank: int, tp_size: int) -> tuple[Tensor, ...]:
        """The HF tensors' parts from the local tensor, padding dropped; they may be views of it."""
        dim = self.dim or 0
        pieces = self.pieces(tp_rank, tp_size)
        result: list[Tensor] = []
        for part, slices in enumerate(self.parts(tp_rank, tp_size)):
            part_pieces = [piece for piece in pieces if piece.part == part]
            if len(part_pieces) == 1:
                result.append(local.narrow(dim, part_pieces[0].local_start, part_pieces[0].length))
                continue
            tensor = local.new_empty([cut.stop - cut.start for cut in slices])
            for piece in part_pieces:
                source = local.narrow(dim, piece.local_start, piece.length)
                start = piece.hf_start - slices[dim].start
                tensor.narrow(dim, start, piece.length).copy_(source)
            result.append(tensor)
        return tuple(result)


def _share(size: int, tp_rank: int, tp_size: int, what: str) -> tuple[int, int]:
    """(start, length) of a rank's equal share of `size`."""
    if size % tp_size:
        raise LayoutError(
            f"{size} {what} do not divide by tensor-parallel size {tp_size}; "
            f"take a divisor of {size}"
        )
    length = size // tp_size
    return tp_rank * length, length


@dataclass(frozen=True)
class Copy(Sharding):
    """The whole tensor on every rank: norms, router."""

    dim = None

    def pieces(self, tp_rank: int, tp_size: int) -> tuple[Piece, ...]:
        return (Piece(0, 0, 0, self.shape[0]),)


@dataclass(frozen=True)
class Rows(Sharding):
    """The first dimension in equal shares: a number for each attention head."""

    def pieces(self, tp_rank: int, tp_size: int) -> tuple[Piece, ...]:
        start, length = _share(self.shape[0], tp_rank, tp_size, "rows")
        return (Piece(0, start, 0, length),)


@dataclass(frozen=True)
class Stack(Sharding):
    """`count` tensors [r, in], one above the other on every rank: the A of each matrix of QKV or
    GateUp.
    """

    count: int = 2
    dim = None

    def hf_shapes(self) -> tuple[Shape, ...]:
        return super().hf_shapes() * self.count

    def pieces(self, tp_rank: int, tp_size: int) -> tuple[Piece, ...]:
        rows = self.shape[0]
        return tuple(Piece(part, 0, part * rows, rows) for part in range(self.count))


@dataclass(frozen=True)
class Cols(Sharding):
    """Row-parallel: the input dimension, dim 1 of [out, in], in equal shares."""

    dim = 1

    def pieces(self, tp_rank: int, tp_size: int) -> tuple[Piece, ...]:
        start, length = _share(self.shape[1], tp_rank, tp_size, "columns")
        return (Piece(0, start, 0, length),)


@dataclass(frozen=True)
class GateUp(Sharding):
    """Two [f, h] -> [2 f/tp, h]: in every rank its share of the gate, then its share of up.

    What the `torch.chunk` in Megatron's `MLP.forward` takes apart.
    """

    num_parts = 2

    def pieces(self, tp_rank: int, tp_size: int) -> tuple[Piece, ...]:
        start, length = _share(self.shape[0], tp_rank, tp_size, "rows")
        return (Piece(0, start, 0, length), Piece(1, start, length, length))

    def saved(self, tp_rank: int, tp_size: int) -> tuple[tuple[int, int, int], ...]:
        """A checkpoint holds the gate of all ranks, then up of all."""
        return tuple(
            (piece.local_start, piece.part * self.shape[0] + piece.hf_start, piece.length)
            for piece in self.pieces(tp_rank, tp_size)
        )


@dataclass(frozen=True)
class Vocab(Sharding):
    """[v, h], padded with zero rows to `padded_rows(v, tp)`, in equal shares.

    The last ranks may hold padding alone.
    """

    def pieces(self, tp_rank: int, tp_size: int) -> tuple[Piece, ...]:
        vocab = self.shape[0]
        length = padded_rows(vocab, tp_size) // tp_size
        start = tp_rank * length
        real = min(start + length, vocab) - start
        return (Piece(0, start, 0, real),) if real > 0 else ()

    def local_shape(self, tp_rank: int, tp_size: int) -> Shape:
        return (padded_rows(self.shape[0], tp_size) // tp_size, *self.shape[1:])


def padded_rows(vocab: int, tp_size: int) -> int:
    """The vocabulary rows that Megatron holds over `tp_size` ranks together."""
    multiple = VOCAB_MULTIPLE * tp_size
    return -(-vocab // multiple) * multiple


@dataclass(frozen=True)
class QKV(Sharding):
    """[g q d, h], [g d, h], [g d, h] -> [g (q+2) d / tp, h]: each group's queries, key, value.

    `shape` is that of the queries. With more ranks than groups Megatron still cuts those packed
    rows into equal runs, wherever that falls (even within a head), and gathers them in
    `get_query_key_value_tensors`: no group is stored twice, and a rank may hold no row of the
    queries, the keys or the values.
    """

    groups: int
    head_dim: int
    num_parts = 3

    def hf_shapes(self) -> tuple[Shape, ...]:
        keys = (self.groups * self.head_dim, *self.shape[1:])
        return self.shape, keys, keys

    def pieces(self, tp_rank: int, tp_size: int) -> tuple[Piece, ...]:
        heads = self.shape[0] // self.head_dim
        _share(heads, tp_rank, tp_size, "attention heads")
        if self.groups % tp_size and tp_size % self.groups:
            raise LayoutError(
                f"tensor-parallel size {tp_size} is neither a divisor nor a multiple of the "
                f"{self.groups} key/value heads"
            )
        queries = heads // self.groups * self.head_dim  # rows of one group
        group_rows = queries + 2 * self.head_dim
        low, length = _share(self.groups * group_rows, tp_rank, tp_size, "rows of linear_qkv")
        high = low + length
        result: list[Piece] = []
        for group in range(low // group_rows, -(-high // group_rows)):
            begin = group * group_rows  # of this part of this group, in the packed rows
            for part, rows in enumerate((queries, self.head_dim, self.head_dim)):
                start, stop = max(begin, low), min(begin + rows, high)
                if start < stop:
                    hf_start = group * rows + start - begin
                    result.append(Piece(part, hf_start, start - low, stop - start))
                begin += rows
        return tuple(result)
