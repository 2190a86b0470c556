"""Matrix products of many experts at once.

Legend: t rows sorted by expert, e experts, k and n the weight's columns and rows. All local.
"""

from itertools import pairwise
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

# torch.nn.functional.grouped_mm reads rows of a multiple of so many bytes (torch 2.13, CPU too).
ROW_BYTES = 16


def grouped_linear(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Rows of `x [t, k]` times the transposed weight of their expert, `weight [e, n, k]` -> [t, n].

    `ends [e]` int32 says where each expert's rows end, the last at t. Any floating dtype, the same
    for both; differentiable in both.
    """
    if x.size(0) == 0:
        # Nothing arrived; the weight has its gradient all the same, of zeros, since the
        # data-parallel buckets wait for every weight's.
        return x @ weight[0].T
    n, k = weight.shape[1:]
    size = x.element_size()
    if n * size % ROW_BYTES == 0 and k * size % ROW_BYTES == 0:
        return F.grouped_mm(x, weight.transpose(1, 2), offs=ends)
    # Rows that the kernel cannot read, as small experts split over tensor ranks have: one by one.
    bounds: list[int] = [0, *cast(Any, ends).tolist()]
    return torch.cat([x[a:b] @ weight[i].T for i, (a, b) in enumerate(pairwise(bounds))])
