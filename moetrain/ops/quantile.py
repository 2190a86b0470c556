"""A quantile of values that lie on several ranks, without bringing them together."""

import math
from collections.abc import Callable

import torch
from torch import Tensor


def quantile(values: Tensor, q: float, total: Callable[[Tensor], Tensor]) -> float:
    """As torch.quantile, interpolated linearly, of the fp32 values [m] >= 0 of all ranks; those
    below 0 count as 0. `total` sums over the ranks; 0 where nobody has a value. Collective.

    Floats from 0 on are ordered as their bits are, so 31 halvings find one exactly.
    """
    bits = values.float().clamp(min=0).view(torch.int32).cpu()
    num = int(total(torch.tensor([bits.numel()]))[0])
    if not num:
        return 0.0
    place = q * (num - 1)
    wanted = torch.tensor([math.floor(place), math.ceil(place)])
    low, high = torch.zeros(2, dtype=torch.int64), torch.full((2,), 2**31 - 1)
    while bool((low < high).any()):
        middle = (low + high) // 2
        below = total(torch.stack([(bits <= one).sum() for one in middle]))
        low, high = (
            torch.where(below > wanted, low, middle + 1),
            torch.where(below > wanted, middle, high),
        )
    ends = low.to(torch.int32).view(torch.float32)
    return float(torch.lerp(ends[0], ends[1], place - math.floor(place)))
