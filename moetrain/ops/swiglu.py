"""SwiGLU (arXiv 2002.05202) between the two matrices of an expert.

Legend: t rows, f the expert's hidden size on this rank.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moetrain.models.parts.mlp import SWIGLU, Glu


def _weighted(x: Tensor, weight: Tensor, how: Glu) -> Tensor:
    gate, up = x.chunk(2, -1)
    if how == SWIGLU:
        return (F.silu(gate) * up * weight.unsqueeze(-1)).to(x.dtype)
    if how.limit is not None:
        gate, up = gate.clamp(max=how.limit), up.clamp(-how.limit, how.limit)
    gated = gate * torch.sigmoid(how.slope * gate) * (up + how.offset)
    return (gated * weight.unsqueeze(-1)).to(x.dtype)


class _Weighted(torch.autograd.Function):
    """Keeps its input alone. Computed again for the backward pass, by the same operations, so that
    gradients are those of plain autograd, which would keep three more tensors [t, f].
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, how: Glu) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.how = how
        return _weighted(x, weight, how)

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> Any:
        needed = [i for i, needs in enumerate(ctx.needs_input_grad[:2]) if needs]
        inputs = [x.detach().requires_grad_(i in needed) for i, x in enumerate(ctx.saved_tensors)]
        with torch.enable_grad():
            out = _weighted(inputs[0], inputs[1], ctx.how)
        grads = iter(torch.autograd.grad(out, [inputs[i] for i in needed], grad[0]))
        return *(next(grads) if i in needed else None for i in range(2)), None


def weighted_swiglu(x: Tensor, weight: Tensor, how: Glu = SWIGLU) -> Tensor:
    """silu(gate) * up * weight, or what `how` has in its place, of x [t, 2f] (gate columns, then up
    columns) and weight [t] fp32 -> [t, f] in x's dtype.
    """
    return _Weighted.apply(x, weight, how)  # type: ignore[no-any-return]
