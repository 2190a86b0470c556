"""Sums, maxima and gathered rows over a group of ranks."""

import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


def add_up(values: Tensor, group: ProcessGroup | None = None) -> Tensor:
    """The sum over the group's ranks (None: all), in place; returns `values`."""
    return _reduce(values, dist.ReduceOp.SUM, group)


def largest(values: Tensor, group: ProcessGroup | None = None) -> Tensor:
    """As `add_up`, elementwise maxima."""
    return _reduce(values, dist.ReduceOp.MAX, group)


def side_by_side(rows: Tensor, group: ProcessGroup) -> Tensor:
    """[n, ...] of every rank of the group -> [size n, ...] in their order."""
    gathered = rows.new_empty(group.size() * rows.size(0), *rows.shape[1:])
    dist.all_gather_into_tensor(gathered, rows.contiguous(), group=group)  # pyright: ignore
    return gathered


def _reduce(values: Tensor, op: dist.ReduceOp.RedOpType, group: ProcessGroup | None) -> Tensor:
    # gloo (torch 2.13) takes memory from a view's first element on, and gives wrong sums silently.
    assert values.is_contiguous(), "a view of strides cannot be reduced in place"
    dist.all_reduce(values, op, group=group)  # pyright: ignore[reportUnknownMemberType]
    return values
