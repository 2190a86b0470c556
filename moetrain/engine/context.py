"""Context parallelism: which tokens of a pack a rank holds, and gathering them back.

A pack of t tokens is cut into 2*cp equal chunks; rank r holds chunks r and 2*cp-1-r, so that causal
attention costs every rank about the same. Legend: c = t/cp local tokens.
"""

from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from moetrain.ops.reduce import add_up, side_by_side


def local_runs(t: int, cp_rank: int, cp_size: int) -> list[tuple[int, int]]:
    """The [start, end) ranges of the global pack that this rank holds, in their local order."""
    if cp_size == 1:
        return [(0, t)]
    chunk, rest = divmod(t, 2 * cp_size)
    assert rest == 0, f"{t} tokens do not divide into {2 * cp_size} chunks"
    return [(i * chunk, (i + 1) * chunk) for i in (cp_rank, 2 * cp_size - 1 - cp_rank)]


def take_local(x: Tensor, cp_rank: int, cp_size: int, dim: int = 0) -> Tensor:
    """This rank's tokens of a global tensor: t becomes c along `dim`."""
    if cp_size == 1:
        return x
    return torch.cat(
        [x.narrow(dim, a, b - a) for a, b in local_runs(x.size(dim), cp_rank, cp_size)], dim
    )


def _restore_order(gathered: Tensor, cp_size: int) -> Tensor:
    """[cp, c, ...] in rank order -> [t, ...] in the pack's order."""
    halves = gathered.view(cp_size, 2, gathered.size(1) // 2, *gathered.shape[2:])
    return torch.cat([halves[:, 0].flatten(0, 1), halves[:, 1].flip(0).flatten(0, 1)])


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup, reduce_grad: bool) -> Tensor:
        ctx.group, ctx.reduce_grad = group, reduce_grad
        out = side_by_side(x, group)
        return _restore_order(out.view(group.size(), *x.shape), group.size())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        grad = grads[0].contiguous()
        if ctx.reduce_grad:
            # An all-reduce and a slice: gloo has no reduce-scatter of unequal dtypes, and K and V
            # are small next to Q.
            grad = grad.clone()
            add_up(grad, ctx.group)
        return take_local(grad, ctx.group.rank(), ctx.group.size()), None, None


def gather(x: Tensor, group: ProcessGroup, *, reduce_grad: bool) -> Tensor:
    """[c, ...] of every rank -> [t, ...] in the pack's order on every rank.

    `reduce_grad`: True where ranks use the result differently (K and V: their gradients add up);
    False where every rank goes on with the same computation (log-probs into a loss), so that each
    keeps its own slice of one gradient.
    """
    if group.size() == 1:
        return x
    return _Gather.apply(x, group, reduce_grad)  # type: ignore[no-any-return]
