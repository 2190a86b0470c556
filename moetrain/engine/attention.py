"""Core attention over a pack: every sequence sees itself only.

The pack's `cu_seqlens [n+1]` (global positions) arrives in Megatron's `attention_mask` argument,
the one per-batch tensor that Megatron carries to core attention through pipelining and
recomputation alike.

Legend: t tokens of the pack, c = t/cp local tokens, a query heads and g KV heads of this tensor
    rank, d head_dim.
"""

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from torch import Tensor, nn

from moetrain.engine.context import gather, local_runs

# A piece of work: queries [q0, q1) of the local tokens against keys [k0, k1) of the pack; its last
# query sees its last key.
Span = tuple[int, int, int, int]


def spans(cu_seqlens: list[int], runs: list[tuple[int, int]]) -> list[Span]:
    """Cut local runs of global positions at sequence bounds. Every local token is in exactly one
    span.
    """
    pieces: list[Span] = []
    local = 0
    for start, end in runs:
        for first, last in itertools.pairwise(cu_seqlens):
            a, b = max(start, first), min(end, last)
            if a < b:
                pieces.append((local + a - start, local + b - start, first, b))
        local += end - start
    return pieces


def _attend_sdpa(
    q: Tensor, k: Tensor, v: Tensor, pieces: list[Span], scale: float | None
) -> Tensor:
    """q [c, a, d], k and v [t, g, d] -> [c, a, d], one SDPA call a span."""
    out = torch.empty_like(q)
    for q0, q1, k0, k1 in pieces:
        num_q, num_k = q1 - q0, k1 - k0
        mask = None
        if num_q != num_k:  # the queries are the tail of the keys: causal from the lower right
            mask = torch.ones(num_q, num_k, dtype=torch.bool, device=q.device).tril(num_k - num_q)
        heads = F.scaled_dot_product_attention(
            q[q0:q1].transpose(0, 1)[None],
            k[k0:k1].transpose(0, 1)[None],
            v[k0:k1].transpose(0, 1)[None],
            attn_mask=mask,
            is_causal=mask is None,
            scale=scale,
            enable_gqa=True,
        )
        out[q0:q1] = heads[0].transpose(0, 1)
    return out


def _attend_varlen(
    q: Tensor, k: Tensor, v: Tensor, pieces: list[Span], scale: float | None
) -> Tensor:
    """The same by torch's variable-length flash attention: one kernel for the pack (CUDA, bf16 and
    fp16).
    """
    from torch.nn.attention.varlen import varlen_attn

    if not all(
        k0 == q0 and k1 == q1 for q0, q1, k0, k1 in pieces
    ):  # context parallel: spans share keys
        index = torch.cat([torch.arange(k0, k1, device=k.device) for _, _, k0, k1 in pieces])
        k, v = k[index], v[index]
    if (num_rep := q.size(1) // k.size(1)) > 1:
        k, v = k.repeat_interleave(num_rep, 1), v.repeat_interleave(num_rep, 1)
    num_q = torch.tensor([0, *(q1 - q0 for q0, q1, _, _ in pieces)], dtype=torch.int32)
    num_k = torch.tensor([0, *(k1 - k0 for _, _, k0, k1 in pieces)], dtype=torch.int32)
    out = varlen_attn(
        q.contiguous(),
        k.contiguous(),
        v.contiguous(),
        num_q.cumsum(0, dtype=torch.int32).to(q.device),
        num_k.cumsum(0, dtype=torch.int32).to(q.device),
        int(num_q.max()),
        int(num_k.max()),
        scale=scale,
        window_size=(-1, 0),
    )
    assert isinstance(out, Tensor)  # a pair only where asked for
    return out


class PackedAttention(nn.Module):
    """Megatron core attention for packs; takes the place of DotProductAttention in a layer spec."""

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        **kwargs: Any,
    ):
        super().__init__()
        self.scale: float | None = kwargs.get("softmax_scale")
        self.cp_group = parallel_state.get_context_parallel_group()

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, **kwargs: Any
    ) -> Tensor:
        """query [c, 1, a, d], key and value [c, 1, g, d] -> [c, 1, a*d]; `attention_mask` is
        cu_seqlens, int32 [n+1].
        """
        q = query.squeeze(1)
        k = gather(key.squeeze(1), self.cp_group, reduce_grad=True)  # [t, g, d]
        v = gather(value.squeeze(1), self.cp_group, reduce_grad=True)
        runs = local_runs(k.size(0), self.cp_group.rank(), self.cp_group.size())
        pieces = spans(attention_mask.tolist(), runs)
        flash = q.is_cuda and q.dtype in (torch.bfloat16, torch.float16)
        out = (_attend_varlen if flash else _attend_sdpa)(q, k, v, pieces, self.scale)
        return out.flatten(1).unsqueeze(1)
