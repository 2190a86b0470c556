"""SwiGLU (arXiv 2002.05202) between the two matrices of an expert.

Legend: t rows, f the expert's hidden size on this rank.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def _weighted(x: Tensor, weight: Tensor) -> Tensor:
    gate, up = x.chunk(2, -1)
    return (F.silu(gate) * up * weight.unsqueeze(-1)).to(x.dtype)


class _Weighted(torch.autograd.Function):
    """Keeps its input alone. Computed again for the backward pass, by the same operations, so that
    gradients are those of plain autograd, which would keep three more tensors [t, f].
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _weighted(x, weight)

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> Any:
        needed = [i for i, needs in enumerate(ctx.needs_input_grad) if needs]
        inputs = [x.detach().requires_grad_(i in needed) for i, x in enumerate(ctx.saved_tensors)]
        with torch.enable_grad():
            out = _weighted(*inputs)
        grads = iter(torch.autograd.grad(out, [inputs[i] for i in needed], grad[0]))
        return tuple(next(grads) if i in needed else None for i in range(2))


def weighted_swiglu(x: Tensor, weight: Tensor) -> Tensor:
    """silu(gate) * up * weight, of x [t, 2f] (gate columns, then up columns) and weight [t] fp32 ->
    [t, f] in x's dtype.
    """
    return _Weighted.apply(x, weight)  # type: ignore[no-any-return]
