"""The norm of the torch backend."""

from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """Root-mean-square norm whose weight says whether its gradient is summed over sequence-parallel
    ranks.
    """

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **kwargs: Any
    ):
        super().__init__()
        self.eps = eps
        weight = nn.Parameter(
            torch.empty(hidden_size, dtype=config.params_dtype, device=torch.cuda.current_device())
        )
        weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        """[..., h] -> [..., h]; the mean square is taken in fp32 inside torch's kernel."""
        return nn.functional.rms_norm(x, self.weight.shape, self.weight, self.eps)
