"""Reductions over the sequences of a pack. Legend: t tokens, n sequences; cu_seqlens `[n+1]` int32
may live on the host.
"""

import torch
from torch import Tensor


def segment_lengths(cu_seqlens: Tensor, device: torch.device | None = None) -> Tensor:
    """`[n]` int64 tokens of each sequence, on `device` (default: where cu_seqlens is)."""
    return cu_seqlens.diff().to(device=device, dtype=torch.int64)


def segment_ids(cu_seqlens: Tensor, device: torch.device | None = None) -> Tensor:
    """`[t]` int64 index of the sequence that each token belongs to."""
    lengths = segment_lengths(cu_seqlens)
    return torch.repeat_interleave(
        torch.arange(lengths.numel(), device=lengths.device), lengths
    ).to(device)


def segment_sum(values: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Sum of `[t]` floating values over each sequence: `[n]`, same dtype, 0 for an empty one.
    Differentiable and deterministic.
    """
    assert values.dim() == 1 and values.numel() == int(cu_seqlens[-1])
    return torch.segment_reduce(
        values, "sum", lengths=segment_lengths(cu_seqlens, values.device), initial=0.0
    )
