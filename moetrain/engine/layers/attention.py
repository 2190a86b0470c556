"""Core attention over a pack: a sequence sees itself, and the sequence that is its prefix.

What says so, `segment_table` [2, n+1] (global positions), arrives in Megatron's `attention_mask`
argument, the one per-batch tensor that Megatron carries to core attention through pipelining and
recomputation alike.

Legend: t tokens of the pack, c = t/cp local tokens, a query heads and g KV heads of this tensor
    rank, d head_dim, n sequences.
"""

import functools
import inspect
import itertools
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor, nn

from moetrain.engine.context import gather, local_runs
from moetrain.engine.layers.norm import RMSNorm
from moetrain.models.parts.attention import GQA
from moetrain.models.parts.rope import Rope
from moetrain.ops.kinds import kind_of
from moetrain.ops.packed import Packed, prefixes
from moetrain.ops.sinks import cpu_kernel, varlen_kernel, with_sinks, with_sinks_plainly

FLASH_HEAD = 256  # the largest head of flash attention


class Span(NamedTuple):
    """Queries [start, end) of the local tokens against ranges of the pack's keys, in order; the
    last query sees the last key.
    """

    start: int
    end: int
    keys: tuple[tuple[int, int], ...]

    @property
    def num_keys(self) -> int:
        return sum(end - start for start, end in self.keys)


def segment_table(pack: Packed) -> Tensor:
    """[2, n+1] int32 on the CPU: cu_seqlens, and the prefix of each sequence (-1: none)."""
    parents = prefixes(pack)
    return torch.stack([pack.cu_seqlens, torch.cat([parents, parents.new_full((1,), -1)])]).int()


def spans(table: list[list[int]], runs: list[tuple[int, int]]) -> list[Span]:
    """Cut local runs of global positions at sequence bounds. Every local token is in exactly one
    span.
    """
    bounds, parents = table
    pieces: list[Span] = []
    local = 0
    for start, end in runs:
        for sequence, (first, last) in enumerate(itertools.pairwise(bounds)):
            a, b = max(start, first), min(end, last)
            if a < b:
                keys = ((first, b),)
                parent = parents[sequence]
                while parent >= 0:
                    keys = ((bounds[parent], bounds[parent + 1]), *keys)
                    parent = parents[parent]
                pieces.append(Span(local + a - start, local + b - start, keys))
        local += end - start
    return pieces


def _pieces(x: Tensor, ranges: list[tuple[tuple[int, int], ...]]) -> list[Tensor]:
    """The rows of each of `ranges`. Cut once: the gradient of a slice is as large as all of x."""
    cuts = sorted(
        {0, x.size(0), *(place for each in ranges for bounds in each for place in bounds)}
    )
    number = {place: i for i, place in enumerate(cuts)}
    parts = x.split([end - start for start, end in itertools.pairwise(cuts)])
    pieces: list[Tensor] = []
    for each in ranges:
        segment_parts = [part for a, b in each for part in parts[number[a] : number[b]]]
        pieces.append(segment_parts[0] if len(segment_parts) == 1 else torch.cat(segment_parts))
    return pieces


class Scoring(NamedTuple):
    """How attention's weights are made of its logits."""

    scale: float | None = None  # of the logits; None: 1 / sqrt(d)
    window: int | None = None  # the last keys that a query sees
    sinks: Tensor | None = None  # [a]

    def mask(self, num_q: int, num_k: int, device: torch.device) -> Tensor | None:
        """[num_q, num_k] bool: what the queries, the tail of the keys, see; None where that is all
        before them and there are no others.
        """
        behind = num_k - num_q
        if not behind and (self.window is None or self.window >= num_k):
            return None
        mask = torch.ones(num_q, num_k, dtype=torch.bool, device=device).tril(behind)
        return mask if self.window is None else mask.triu(behind - self.window + 1)


def _attend_sdpa(q: Tensor, k: Tensor, v: Tensor, pieces: list[Span], how: Scoring) -> Tensor:
    """q [c, a, d], k and v [t, g, d] -> [c, a, d], one SDPA call a span."""
    ranges = [piece.keys for piece in pieces]
    queries = q.split([piece.end - piece.start for piece in pieces])  # spans cover them in order
    keys, values = _pieces(k, ranges), _pieces(v, ranges)
    out: list[Tensor] = []
    for piece, one_q, one_k, one_v in zip(pieces, queries, keys, values, strict=True):
        mask = how.mask(piece.end - piece.start, piece.num_keys, q.device)
        if how.sinks is not None:
            out.append(_attend_with_sinks(one_q, one_k, one_v, mask, how))
            continue
        heads = F.scaled_dot_product_attention(
            one_q.transpose(0, 1)[None],
            one_k.transpose(0, 1)[None],
            one_v.transpose(0, 1)[None],
            attn_mask=mask,
            is_causal=mask is None,
            scale=how.scale,
            enable_gqa=True,
        )
        out.append(heads[0].transpose(0, 1))
    return torch.cat(out)


def _attend_with_sinks(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, how: Scoring
) -> Tensor:
    """One span: q [n, a, d], k and v [m, g, d], mask [n, m] -> [n, a, d]."""
    assert how.sinks is not None
    k, v = (x.repeat_interleave(q.size(1) // k.size(1), 1) for x in (k, v))
    scale = how.scale or q.size(-1) ** -0.5
    if kind_of(q) == "cuda":  # in fp32, which flash attention does not take
        return with_sinks_plainly(q, k, v, how.sinks, mask, scale)
    return with_sinks(q, k, v, how.sinks, cpu_kernel(mask, scale))


@functools.cache
def _shares_heads() -> bool:
    """Whether torch's kernel takes fewer KV heads than query heads, as 2.13's does."""
    from torch.nn.attention.varlen import varlen_attn

    return "enable_gqa" in inspect.signature(varlen_attn).parameters


def _attend_varlen(q: Tensor, k: Tensor, v: Tensor, pieces: list[Span], how: Scoring) -> Tensor:
    """The same by torch's variable-length flash attention: one kernel for the pack (CUDA, bf16 and
    fp16), which takes heads of a multiple of 8 numbers, and no more than FLASH_HEAD.
    """
    from torch.nn.attention.varlen import varlen_attn

    size, scale = q.size(-1), how.scale
    if rest := -size % 8:
        q, k, v = (F.pad(x, (0, rest)) for x in (q, k, v))
        scale = size**-0.5 if scale is None else scale

    if not all(piece.keys == ((piece.start, piece.end),) for piece in pieces):
        # Context parallel, or shared prompts: spans share keys.
        ranges = [torch.arange(*bounds, device=k.device) for p in pieces for bounds in p.keys]
        index = torch.cat(ranges)
        k, v = k[index], v[index]
    grouped: dict[str, Any] = {}
    if (num_rep := q.size(1) // k.size(1)) > 1:
        if _shares_heads():
            grouped = {"enable_gqa": True}
        else:
            k, v = k.repeat_interleave(num_rep, 1), v.repeat_interleave(num_rep, 1)
    num_q = torch.tensor([0, *(p.end - p.start for p in pieces)], dtype=torch.int32)
    num_k = torch.tensor([0, *(p.num_keys for p in pieces)], dtype=torch.int32)
    bounds = (
        num_q.cumsum(0, dtype=torch.int32).to(q.device),
        num_k.cumsum(0, dtype=torch.int32).to(q.device),
        int(num_q.max()),
        int(num_k.max()),
    )
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    window = (-1 if how.window is None else how.window - 1, 0)
    if how.sinks is not None:
        kernel = varlen_kernel(bounds, scale, window, grouped)
        return with_sinks(q, k, v, how.sinks, kernel)[..., :size]
    out = varlen_attn(q, k, v, *bounds, scale=scale, window_size=window, **grouped)
    assert isinstance(out, Tensor)  # a pair only where asked for
    return out[..., :size]


def _takes_flash(q: Tensor) -> bool:
    is_half = q.dtype in (torch.bfloat16, torch.float16)
    return kind_of(q) == "cuda" and is_half and q.size(-1) <= FLASH_HEAD


class PackedAttention(nn.Module):
    """Megatron core attention for packs; takes the place of DotProductAttention in a layer spec.
    Its sinks have upstream's name.
    """

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        part: GQA,
        **kwargs: Any,
    ):
        super().__init__()
        self.scale: float | None = kwargs.get("softmax_scale")
        self.window = part.window
        self.softmax_offset: nn.Parameter | None = None
        if part.sinks:
            tp, device = config.tensor_model_parallel_size, torch.cuda.current_device()
            self.softmax_offset = nn.Parameter(
                torch.empty(part.heads // tp, dtype=config.params_dtype, device=device)
            )
            set_tensor_model_parallel_attributes(self.softmax_offset, tp > 1, 0, 1)
        self.cp_group = parallel_state.get_context_parallel_group()

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, **kwargs: Any
    ) -> Tensor:
        """query [c, 1, a, d], key and value [c, 1, g, d] -> [c, 1, a*d]; `attention_mask` is
        what `segment_table` makes.
        """
        q = query.squeeze(1)
        k = gather(key.squeeze(1), self.cp_group, reduce_grad=True)  # [t, g, d]
        v = gather(value.squeeze(1), self.cp_group, reduce_grad=True)
        runs = local_runs(k.size(0), self.cp_group.rank(), self.cp_group.size())
        pieces = spans(attention_mask.tolist(), runs)
        attend = _attend_varlen if _takes_flash(q) else _attend_sdpa
        out = attend(q, k, v, pieces, Scoring(self.scale, self.window, self.softmax_offset))
        return out.flatten(1).unsqueeze(1)


def config_fields(part: GQA, rope: Rope) -> dict[str, Any]:
    """Of Megatron's TransformerConfig."""
    fields: dict[str, Any] = dict(
        num_attention_heads=part.heads,
        num_query_groups=part.groups,
        kv_channels=part.head_dim,
        qk_layernorm=part.qk_norm,
        add_qkv_bias=part.qkv_bias,
    )
    if rope.attention_factor != 1:  # of queries and of keys
        fields["softmax_scale"] = rope.attention_factor**2 / part.head_dim**0.5
    return fields


def spec(part: GQA) -> ModuleSpec:
    """Of the torch backend."""
    norm: Any = RMSNorm if part.qk_norm else IdentityOp
    return ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=ColumnParallelLinear,
            core_attention=core(part),
            linear_proj=with_bias(RowParallelLinear) if part.output_bias else RowParallelLinear,
            q_layernorm=norm,
            k_layernorm=norm,
        ),
    )


def core(part: GQA) -> Any:
    """Core attention of either backend."""
    return functools.partial(PackedAttention, part=part)


def with_bias(linear: Any) -> Any:
    """`linear` with a bias: Megatron's configuration knows one for all linear layers or none."""

    def build(*args: Any, **kwargs: Any) -> Any:
        return linear(*args, **kwargs | {"bias": True})

    return build
