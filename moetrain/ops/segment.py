"""Reductions over the sequences of a pack. Legend: t tokens, n sequences; cu_seqlens `[n+1]` int32
may live on the host.
"""

import torch
from torch import Tensor


def segment_sum(values: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Sum of `[t]` floating values over each sequence: `[n]`, same dtype, 0 for an empty one.
    Differentiable and deterministic.
    """
    assert values.dim() == 1 and values.numel() == int(cu_seqlens[-1])
    lengths = cu_seqlens.diff().to(device=values.device, dtype=torch.int64)
    return torch.segment_reduce(values, "sum", lengths=lengths, initial=0.0)
