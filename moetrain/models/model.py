"""A model as its parts, and the one weight table that follows from them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Self

from moetrain.errors import ConfigError
from moetrain.models.config import (
    MOST_EXPERTS,
    HfConfig,
    has_scalar_head,
    read_bool,
    read_float,
    read_int,
    refuse_unsupported,
)
from moetrain.models.parts.attention import GQA
from moetrain.models.parts.base import Part, Shares
from moetrain.models.parts.heads import Heads
from moetrain.models.parts.mlp import Dense
from moetrain.models.parts.moe import Moe
from moetrain.models.parts.rope import Rope, read_rope
from moetrain.models.rules import HEAD, HF_LAYER, FusedSlice, Rule, Weight, fused_slices
from moetrain.models.sharding import Copy

type Mlp = Dense | Moe


@dataclass(frozen=True)
class Layer:
    """x + attention(norm x), then x + mlp(norm x)."""

    attention: GQA
    mlp: Mlp

    def weights(self) -> Iterator[Weight]:
        norm = Copy((self.attention.hidden,))
        yield Weight(
            "input_layernorm.weight",
            ("input_layernorm.weight",),
            norm,
            saved="self_attention.linear_qkv.layer_norm_weight",
        )
        yield from self.attention.weights()
        yield Weight(
            "pre_mlp_layernorm.weight",
            ("post_attention_layernorm.weight",),
            norm,
            saved="mlp.linear_fc1.layer_norm_weight" if isinstance(self.mlp, Dense) else None,
        )
        yield from self.mlp.weights()

    def activations(self, shares: Shares) -> float:
        """As `Part.activations`, with two norms (whose copies are fp32) and the residuals."""
        around = self.attention.hidden / shares.sequence * (16 + 4 * shares.width)
        parts = (self.attention, self.mlp)
        return around + sum(part.activations(shares) for part in parts)


@dataclass(frozen=True)
class Model:
    """One decoder-only model. All sizes are global."""

    architecture: str
    hidden: int
    norm_eps: float
    max_positions: int
    rope: Rope
    layers: tuple[Layer, ...]
    heads: Heads

    @cached_property
    def table(self) -> Mapping[str, Rule]:
        """Every parameter's rule, by canonical name; in the same order in every process."""
        table: dict[str, Rule] = {}
        owners: dict[str, str] = {}
        for rule in self._bind():
            assert rule.name not in table, f"two rules of {self.architecture} make {rule.name}"
            table[rule.name] = rule
            for key in rule.hf:
                assert key not in owners, f"{key} goes into both {owners[key]} and {rule.name}"
                owners[key] = rule.name
        return table

    def _bind(self) -> Iterator[Rule]:
        for weight in self.heads.weights():
            yield from weight.bind(None)
        for number, layer in enumerate(self.layers):
            for weight in layer.weights():
                yield from weight.bind(number)

    @cached_property
    def hf_names(self) -> tuple[str, ...]:
        """Every Hugging Face tensor, in the table's order."""
        return tuple(name for rule in self.table.values() for name in rule.hf)

    @cached_property
    def fused_slices(self) -> Mapping[str, FusedSlice]:
        """Of each Hugging Face name of the table that a fused tensor can hold: where it lies."""
        return {key: cut for rule in self.table.values() for key, cut in fused_slices(rule)}

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def attention(self) -> GQA:
        """Of every layer, its window aside: Megatron has one configuration for all of them."""
        return self.layers[0].attention

    @cached_property
    def moe(self) -> Moe | None:
        """Of the layers that have one."""
        return next((layer.mlp for layer in self.layers if isinstance(layer.mlp, Moe)), None)

    @cached_property
    def dense(self) -> Dense | None:
        """Of the layers that have one."""
        return next((layer.mlp for layer in self.layers if isinstance(layer.mlp, Dense)), None)

    @cached_property
    def moe_layers(self) -> tuple[bool, ...]:
        """[num_layers]: which layers hold experts."""
        return tuple(isinstance(layer.mlp, Moe) for layer in self.layers)

    @property
    def num_experts(self) -> int:
        return 0 if self.moe is None else self.moe.experts.num

    @property
    def parts(self) -> tuple[Part, ...]:
        """Each kind of part once."""
        mlps = (part for part in (self.dense, self.moe) if part is not None)
        return (self.attention, *mlps, self.heads)

    @property
    def active_params(self) -> int:
        """Parameters that a token meets."""
        moe = self.moe
        met = 0
        for rule in self.table.values():
            if rule.expert is None:
                met += rule.num_params
            elif moe is not None and rule.expert < moe.experts.top_k:  # all are of one size
                met += rule.num_params
        return met

    def flops(self, num_tokens: int, num_pairs: int) -> int:
        """As `Part.flops`, of the whole model."""
        layers = sum(
            part.flops(num_tokens, num_pairs)
            for layer in self.layers
            for part in (layer.attention, layer.mlp)
        )
        return layers + self.heads.flops(num_tokens, num_pairs)

    @cached_property
    def rotary_keys(self) -> frozenset[str]:
        """Where old transformers saved rotary frequencies."""
        leaf = "self_attn.rotary_emb.inv_freq"
        return frozenset(HF_LAYER.format(l=layer) + leaf for layer in range(self.num_layers))

    @property
    def ignored_keys(self) -> frozenset[str]:
        """Hugging Face keys that a checkpoint may hold and no parameter is made of: the output
        layer of a model that is tied or has a scalar head, and rotary frequencies.
        """
        no_head = self.heads.tied or self.heads.scalar
        return self.rotary_keys | ({HEAD} if no_head else frozenset[str]())

    def with_value_head(self) -> Self:
        """The same with PPO's value head."""
        return replace(self, heads=replace(self.heads, value=True))


def decoder(
    hf: HfConfig,
    architecture: str,
    attention: GQA,
    mlps: Sequence[Mlp],
    *,
    norm_eps: float = 1e-6,
    rope_theta: float = 10000.0,
    max_positions: int = 32768,
    windows: Sequence[int | None] | None = None,
) -> Model:
    """What every family reads alike, around its own attention and the MLP of each layer; `windows`
    are the layers' where a family has them.

    The keyword arguments are the family's defaults in transformers. Raises ConfigError for a
    missing key, a wrong type or a setting that Megatron would not reproduce.
    """
    refuse_unsupported(hf)
    held = sum(mlp.experts.num for mlp in mlps if isinstance(mlp, Moe))
    if held > MOST_EXPERTS:
        raise ConfigError(
            f"model config: {held} experts in {len(mlps)} layers are more than {MOST_EXPERTS}, the"
            f" most held here"
        )
    positions = read_int(hf, "max_position_embeddings", max_positions)
    scalar = has_scalar_head(hf)
    return Model(
        architecture=architecture,
        hidden=attention.hidden,
        norm_eps=read_float(hf, "rms_norm_eps", norm_eps),
        max_positions=positions,
        rope=read_rope(hf, attention.head_dim, rope_theta, positions),
        layers=tuple(
            Layer(replace(attention, window=window), mlp)
            for mlp, window in zip(mlps, windows or [None] * len(mlps), strict=True)
        ),
        heads=Heads(
            attention.hidden,
            read_int(hf, "vocab_size"),
            tied=read_bool(hf, "tie_word_embeddings", False) and not scalar,
            scalar=scalar,
        ),
    )
