"""Recurrences over long vectors without a loop over their elements. Legend: t elements."""

import math

import torch
from torch import Tensor

FEW = 64  # elements that a plain loop is as quick with
WIDEST = 256  # elements of a row


def decayed_sums(x: Tensor, decay: Tensor) -> Tensor:
    """[t]: y_i = x_i + decay_i y_{i+1}, y_t = 0. Stable where |decay| <= 1: nothing is divided.

    The vector is cut into rows, which are all gone through at once; what comes into a row from the
    next is the same recurrence over the rows' first elements.
    """
    if x.numel() <= FEW:
        return _one_by_one(x, decay)
    width = min(math.isqrt(x.numel() - 1) + 1, WIDEST)
    rows = -(-x.numel() // width)
    missing = rows * width - x.numel()
    # [width, rows]: neighbours in a row are neighbours in the first dimension.
    inside = torch.cat([x, x.new_zeros(missing)]).view(rows, width).t().contiguous()
    through = torch.cat([decay, decay.new_zeros(missing)]).view(rows, width).t().contiguous()
    for i in range(width - 2, -1, -1):
        inside[i].addcmul_(through[i], inside[i + 1])
        through[i].mul_(through[i + 1])
    firsts = decayed_sums(inside[0], through[0])
    coming = torch.cat([firsts[1:], firsts.new_zeros(1)])
    return inside.addcmul_(through, coming).t().reshape(-1)[: x.numel()]


def _one_by_one(x: Tensor, decay: Tensor) -> Tensor:
    out = torch.empty_like(x)
    running = x.new_zeros(())
    for i in range(x.numel() - 1, -1, -1):
        running = x[i] + decay[i] * running
        out[i] = running
    return out
