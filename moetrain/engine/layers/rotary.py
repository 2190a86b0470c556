"""Rotary angles by position, as transformers computes them.

Legend: c local tokens, d head_dim.
"""

import math

import torch
from torch import Tensor, nn

from moetrain.models.parts.rope import Linear, Llama3, Rope, Yarn


class Rotary(nn.Module):
    """The angles of a pack's tokens."""

    def __init__(self, rope: Rope):
        super().__init__()
        self.inv_freq = frequencies(rope)  # a plain attribute: not part of any checkpoint

    def forward(self, position_ids: Tensor) -> Tensor:
        """[c] int64 -> angles [c, 1, 1, d] fp32."""
        angles = torch.outer(position_ids.float(), self.inv_freq.to(position_ids.device))
        return torch.cat([angles, angles], -1)[:, None, None, :]


def frequencies(rope: Rope) -> Tensor:
    """[d / 2] fp32, in turns of 2 pi positions."""
    inv = 1.0 / rope.theta ** (
        torch.arange(0, rope.head_dim, 2, dtype=torch.float32) / rope.head_dim
    )
    match rope.scaling:
        case None:
            return inv
        case Linear(factor):
            return inv / factor
        case Llama3() as scaling:
            wavelength = 2 * math.pi / inv
            low, high = scaling.low_freq_factor, scaling.high_freq_factor
            share = ((scaling.original_max_positions / wavelength - low) / (high - low)).clamp(0, 1)
        case Yarn() as scaling:
            first, last = scaling.ramp(rope.theta, rope.head_dim)
            place = torch.arange(rope.head_dim // 2, dtype=torch.float32)
            share = 1 - ((place - first) / (last - first)).clamp(0, 1)
    return (1 - share) * inv / scaling.factor + share * inv
