"""Dropout whose masks follow from what is dropped, not from a generator that has been used.

Whether a number is kept is a hash of its token (its ids and place since the sequence began), its
column, the module, the step and the seed. So packs, micro-batches, ranks, recomputation and a
resumed run see the same masks, and there is no random state to save. Equal beginnings of sequences
have equal masks within a step.

Legend: t tokens of a pack, m rows of x, n columns of x.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moetrain.ops.packed import Packed, prefixes

# Odd, so that multiplying loses nothing: the finalisers of SplitMix64 and MurmurHash3.
_WIDE = (-4658895280553007687, -7723592293110705685)
_NARROW = (-2048144789, -1028477387)
_GOLDEN = -7046029254386353131


def _spread(number: int) -> int:
    """A number far from its neighbours', as int64 has it."""
    return (number * _GOLDEN + (1 << 63)) % (1 << 64) - (1 << 63)


def _mix64(x: Tensor) -> Tensor:
    """int64 -> int64 whose bits all depend on all bits."""
    for shift, factor in ((30, _WIDE[0]), (27, _WIDE[1])):
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return x ^ ((x >> 31) & ((1 << 33) - 1))


def _folded(x: Tensor) -> Tensor:
    """int64 -> the lower half of its mix, as int32."""
    low = _mix64(x) & 0xFFFFFFFF
    return torch.where(low >= 1 << 31, low - (1 << 32), low).to(torch.int32)


def token_keys(pack: Packed, salt: Sequence[int]) -> Tensor:
    """[t] int64 of a pack on the host: a key for each token, by the tokens up to it and `salt`."""
    salted = torch.tensor(0)
    for number in salt:
        salted = _mix64(salted + _spread(number))
    mixed = _mix64(pack.tokens * _GOLDEN + pack.position_ids)
    sums = torch.cat([mixed.new_zeros(1), mixed.cumsum(0)])  # of int64, which wraps
    starts, ends = pack.cu_seqlens[:-1].long(), pack.cu_seqlens[1:].long()
    before, totals = -sums[starts], sums[ends] - sums[starts]
    shared = prefixes(pack).long()
    before = before + torch.where(shared < 0, 0, totals[shared.clamp(min=0)])
    return _mix64(sums[1:] + before[pack.sequence_ids] + salted)


def kept(keys: Tensor, module: int, columns: range, p: float) -> Tensor:
    """[m, n] bool from keys [m]: False for a share p of the numbers."""
    across = torch.arange(columns.start, columns.stop, device=keys.device)
    x = _folded(keys + _spread(module))[:, None] ^ _folded(across * _GOLDEN + module)
    for shift, factor in ((16, _NARROW[0]), (13, _NARROW[1])):
        x = (x ^ ((x >> shift) & ((1 << (32 - shift)) - 1))) * factor
    return (x & 0xFFFFFF) >= int(p * (1 << 24))


class _Drop(torch.autograd.Function):
    """The mask is made again in the backward pass: it would be as large as x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, keys: Tensor, module: int, first: int, p: float) -> Tensor:
        ctx.save_for_backward(keys)
        ctx.how = module, range(first, first + x.size(-1)), p
        return _scaled(x, keys, *ctx.how)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        (keys,) = ctx.saved_tensors
        return _scaled(grads[0], keys, *ctx.how), None, None, None, None


def _scaled(x: Tensor, keys: Tensor, module: int, columns: range, p: float) -> Tensor:
    keep = kept(keys, module, columns, p).view(x.shape)
    return torch.where(keep, x / (1 - p), 0.0)


def drop(x: Tensor, keys: Tensor, module: int, first: int, p: float) -> Tensor:
    """x [..., n] of m rows in all, whose columns begin at `first` of the whole, with a share p of
    its numbers 0 and the others larger by 1 / (1 - p).
    """
    assert keys.numel() * x.size(-1) == x.numel(), "a key for each row"
    return _Drop.apply(x, keys, module, first, p)  # type: ignore[no-any-return]
