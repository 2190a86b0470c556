"""Attention with sinks (gpt-oss): each head has a learned logit s that takes its share of the
softmax and has no value, p_j = exp(l_j) / (exp(s) + sum_i exp(l_i)).

No kernel of torch knows it. With z = log sum_i exp(l_i), which flash kernels give, the output is
theirs times sigmoid(z - s). Their backward pass makes the probabilities again as exp(l_j - z), and
sums grad . out; given log(exp(s) + exp(z)) for z, and the output with the sink, both are those of
the softmax with the sink, and so are its gradients of q, k and v.

Legend: t queries, a query heads, d head_dim. All local.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Kernel(NamedTuple):
    """A flash attention. q, k and v are as it wants them, and so are their gradients."""

    forward: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
    """(q, k, v) -> (output [t, a, d], z [a, t] fp32)."""
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]
    """(gradient of the output, q, k, v, output, z) -> gradients of q, k, v."""


class _SinkAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, kernel: Kernel) -> Tensor:
        out, z = kernel.forward(q, k, v)
        s = sinks.float()[:, None]
        out = (out * torch.sigmoid(z - s).T[..., None]).to(out.dtype)
        whole = torch.logaddexp(z, s)
        ctx.kernel = kernel
        ctx.save_for_backward(q, k, v, sinks, out, whole)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        q, k, v, sinks, out, whole = ctx.saved_tensors
        grad = grads[0].contiguous()
        dq, dk, dv = ctx.kernel.backward(grad, q, k, v, out, whole)
        # dL/ds = -p_s sum_j p_j dL/dp_j, and the sum is grad . out
        share = torch.exp(sinks.float()[:, None] - whole)  # [a, t]
        shift = (grad.float() * out.float()).sum(-1).T
        return dq, dk, dv, -(share * shift).sum(1).to(sinks.dtype), None


def with_sinks(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, kernel: Kernel) -> Tensor:
    """q, k and v as the kernel wants them, sinks [a] -> [t, a, d]; differentiable in all four."""
    return _SinkAttention.apply(q, k, v, sinks, kernel)  # type: ignore[no-any-return]


def cpu_kernel(mask: Tensor | None, scale: float) -> Kernel:
    """Torch's flash attention for CPUs: q [t, a, d], k and v [keys, a, d], mask [t, keys] bool of
    what is seen, None where queries and keys are the same tokens and all is causal.
    """
    aten = torch.ops.aten

    def added(q: Tensor) -> Tensor | None:
        if mask is None:
            return None
        return torch.zeros_like(mask, dtype=q.dtype).masked_fill_(~mask, float("-inf"))

    def heads_first(x: Tensor) -> Tensor:
        return x.transpose(0, 1)[None]

    def forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, z = aten._scaled_dot_product_flash_attention_for_cpu(
            heads_first(q), heads_first(k), heads_first(v), 0.0, mask is None,
            attn_mask=added(q), scale=scale,
        )  # fmt: skip
        return out[0].transpose(0, 1), z[0]

    def backward(
        grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, z: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        grads = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            heads_first(grad), heads_first(q), heads_first(k), heads_first(v), heads_first(out),
            z[None], 0.0, mask is None, attn_mask=added(q), scale=scale,
        )  # fmt: skip
        dq, dk, dv = (x[0].transpose(0, 1) for x in grads)
        return dq, dk, dv

    return Kernel(forward, backward)


def varlen_kernel(
    bounds: tuple[Tensor, Tensor, int, int],
    scale: float | None,
    window: tuple[int, int],
    options: Mapping[str, Any],
) -> Kernel:
    """Torch's variable-length flash attention: q [t, a, d], k and v [keys, g, d]; `bounds`, `scale`
    and `window` as `varlen_attn` takes them, and `options` more of those.
    """

    def forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        from torch.nn.attention.varlen import AuxRequest, varlen_attn

        out, z = varlen_attn(
            q, k, v, *bounds,
            return_aux=AuxRequest(lse=True), scale=scale, window_size=window, **options,
        )  # fmt: skip
        return out, z

    def backward(
        grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, z: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        no_dropout = torch.zeros(2, dtype=torch.uint64, device=q.device)
        return torch.ops.torch_attn._varlen_attn_backward(
            grad, q, k, v, out, z, *bounds, window == (-1, 0), no_dropout, scale, list(window)
        )  # fmt: skip

    return Kernel(forward, backward)


def with_sinks_plainly(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, mask: Tensor | None, scale: float
) -> Tensor:
    """The formula, with all logits in memory: q [t, a, d], k and v [keys, a, d], mask [t, keys] of
    what is seen (None: causal).
    """
    logits = torch.einsum("tad,kad->atk", q, k) * scale
    seen = torch.ones(logits.shape[1:], dtype=torch.bool, device=q.device).tril()
    logits = logits.masked_fill(~(seen if mask is None else mask), float("-inf"))
    column = sinks.to(logits)[:, None, None].expand(-1, logits.size(1), 1)
    probs = torch.cat([logits, column], -1).softmax(-1)[..., :-1]
    return torch.einsum("atk,kad->tad", probs, v)
