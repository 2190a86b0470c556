"""Grouped-query attention (arXiv 2305.13245); with one group a head it is multi-head attention."""

from collections.abc import Iterator
from dataclasses import dataclass

from moetrain.errors import ConfigError
from moetrain.models.config import HfConfig, read_int
from moetrain.models.parts.base import Shares, Split
from moetrain.models.rules import Weight
from moetrain.models.sharding import QKV, Cols, Copy, Rows


@dataclass(frozen=True)
class GQA:
    """`heads` query heads in `groups`, each of which shares a key and a value head."""

    hidden: int
    heads: int
    groups: int
    head_dim: int
    qk_norm: bool = False  # an RMS norm over each query and key head
    qkv_bias: bool = False
    output_bias: bool = False
    sinks: bool = False  # a learned logit a head, which takes a share of the softmax
    window: int | None = None  # the last keys that a query sees, its own among them; None: all

    @property
    def queries(self) -> int:
        return self.heads * self.head_dim

    @property
    def keys(self) -> int:
        return self.groups * self.head_dim

    def weights(self) -> Iterator[Weight]:
        qkv = tuple(f"self_attn.{name}_proj" for name in "qkv")
        yield Weight(
            "self_attention.linear_qkv.weight",
            tuple(name + ".weight" for name in qkv),
            QKV((self.queries, self.hidden), self.groups, self.head_dim),
            adapts="attention",
        )
        if self.qkv_bias:
            yield Weight(
                "self_attention.linear_qkv.bias",
                tuple(name + ".bias" for name in qkv),
                QKV((self.queries,), self.groups, self.head_dim),
            )
        yield Weight(
            "self_attention.linear_proj.weight",
            ("self_attn.o_proj.weight",),
            Cols((self.hidden, self.queries)),
            adapts="attention",
            writes=True,
        )
        if self.output_bias:
            yield Weight(
                "self_attention.linear_proj.bias",
                ("self_attn.o_proj.bias",),
                Copy((self.hidden,)),
                writes=True,
            )
        if self.qk_norm:
            for name in "qk":
                yield Weight(
                    f"self_attention.{name}_layernorm.weight",
                    (f"self_attn.{name}_norm.weight",),
                    Copy((self.head_dim,)),
                )
        if self.sinks:
            yield Weight(
                "self_attention.core_attention.softmax_offset",
                ("self_attn.sinks",),
                Rows((self.heads,)),
            )

    def splits(self) -> Iterator[Split]:
        yield Split("tp", self.heads, "heads")
        yield Split("tp", self.groups, "KV heads", either_way=True)

    def flops(self, num_tokens: int, num_pairs: int) -> int:
        projections = 2 * num_tokens * self.hidden * 2 * (self.queries + self.keys)
        if self.window is not None:
            num_pairs = min(num_pairs, num_tokens * self.window)
        return projections + 4 * num_pairs * self.queries

    def activations(self, shares: Shares) -> float:
        """Queries, keys and values; without a fused kernel a norm makes copies in fp32."""
        width = shares.width
        projected = width * (self.queries + 2 * self.keys) + 2 * width * self.queries
        normed = (self.queries + self.keys) * (width + 8 * self.qk_norm)
        return (projected + normed) / shares.tp


def read_gqa(
    hf: HfConfig,
    *,
    qk_norm: bool = False,
    qkv_bias: bool = False,
    output_bias: bool = False,
    sinks: bool = False,
    head_dim: int | None = None,
    groups_default_to_heads: bool = False,
) -> GQA:
    """From config.json, with the family's own defaults in transformers: `head_dim` is taken when
    the config has none; None means hidden_size / num_attention_heads. Raises ConfigError.
    """
    hidden = read_int(hf, "hidden_size")
    heads = read_int(hf, "num_attention_heads")
    groups = read_int(hf, "num_key_value_heads", heads if groups_default_to_heads else None)
    if heads % groups:
        raise ConfigError(
            f"model config: num_attention_heads {heads} is not a multiple of "
            f"num_key_value_heads {groups}"
        )
    if hf.get("head_dim") is None and head_dim is None and hidden % heads:
        raise ConfigError(
            f"model config: hidden_size {hidden} is not a multiple of "
            f"num_attention_heads {heads}; give head_dim"
        )
    dim = read_int(hf, "head_dim", head_dim or hidden // heads)
    if dim % 2:
        raise ConfigError(f"model config: head_dim = {dim} is odd; rotary embeddings need it even")
    return GQA(hidden, heads, groups, dim, qk_norm, qkv_bias, output_bias, sinks)
