"""Qwen3-MoE (30B-A3B, 235B-A22B): query/key norms, experts in most or all layers."""

from collections.abc import Sequence
from typing import cast

from moetrain.errors import ConfigError
from moetrain.models.dims import (
    Dims,
    HfConfig,
    read_bool,
    read_dims,
    read_experts,
    read_int,
)
from moetrain.models.rules import (
    ATTENTION,
    DENSE_MLP,
    MODEL,
    QK_NORM,
    Family,
    fused_experts,
    moe_mlp,
)

_EXPERT = ("mlp", "gate_proj", "up_proj", "down_proj")


def dims(hf: HfConfig) -> Dims:
    """Sizes from config.json. Raises ConfigError."""
    experts = read_experts(hf)
    return read_dims(
        hf,
        qk_norm=True,
        experts=experts,
        top_k=read_int(hf, "num_experts_per_tok") if experts else 0,
        moe_ffn=read_int(hf, "moe_intermediate_size"),
        moe_layers=_moe_layers(hf, experts),
        norm_topk=read_bool(hf, "norm_topk_prob", False),
    )


def _moe_layers(hf: HfConfig, experts: int) -> tuple[bool, ...]:
    """As Qwen3MoeDecoderLayer: every `decoder_sparse_step`-th layer not in `mlp_only_layers`."""
    num_layers = read_int(hf, "num_hidden_layers")
    step = read_int(hf, "decoder_sparse_step", 1)
    given = hf.get("mlp_only_layers") or ()
    if not isinstance(given, Sequence) or isinstance(given, str):
        raise ConfigError(
            f"model config: mlp_only_layers = {given!r} is not a list of layer numbers"
        )
    named = list(cast(Sequence[object], given))
    if not all(isinstance(layer, int) for layer in named):
        raise ConfigError(
            f"model config: mlp_only_layers = {given!r} is not a list of layer numbers"
        )
    dense = set(named)
    return tuple(
        experts > 0 and layer not in dense and (layer + 1) % step == 0
        for layer in range(num_layers)
    )


FAMILY = Family(
    name="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    dims=dims,
    rules=(*MODEL, *ATTENTION, *QK_NORM, *DENSE_MLP, *moe_mlp(*_EXPERT)),
    fused=fused_experts(*_EXPERT),
)
