"""Matrix products of many experts at once.

Legend: t rows sorted by expert, e experts, k and n the weight's columns and rows. All local.
"""

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
    unit = ROW_BYTES // x.element_size()
    # Small experts split over tensor ranks and adapters of a low rank have rows that the kernel
    # cannot read: they are made longer with zeros.
    if rest := -k % unit:
        x, weight = F.pad(x, (0, rest)), F.pad(weight, (0, rest))
    if rest := -n % unit:
        weight = F.pad(weight, (0, 0, 0, rest))
    return F.grouped_mm(x, weight.transpose(1, 2), offs=ends)[:, :n]
