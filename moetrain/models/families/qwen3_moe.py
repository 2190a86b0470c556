"""Qwen3-MoE (30B-A3B, 235B-A22B): query/key norms, experts in most or all layers."""

from collections.abc import Sequence
from typing import cast

from moetrain.errors import ConfigError
from moetrain.models.config import HfConfig, read_bool, read_int
from moetrain.models.model import Mlp, Model, decoder
from moetrain.models.parts.attention import read_gqa
from moetrain.models.parts.mlp import Dense
from moetrain.models.parts.moe import Moe, read_moe, read_num_experts

MODEL_TYPE, ARCHITECTURE = "qwen3_moe", "Qwen3MoeForCausalLM"


def build(hf: HfConfig) -> Model:
    """The model of a config.json. Raises ConfigError."""
    biased = read_bool(hf, "attention_bias", False)
    attention = read_gqa(hf, qk_norm=True, qkv_bias=biased, output_bias=biased)
    num, moe = read_num_experts(hf), None
    if num:
        renormalise = read_bool(hf, "norm_topk_prob", False)
        moe = read_moe(hf, num, ffn="moe_intermediate_size", renormalise=renormalise)
    dense = Dense(attention.hidden, read_int(hf, "intermediate_size"))
    return decoder(hf, ARCHITECTURE, attention, sparse_layers(hf, dense, moe))


def sparse_layers(hf: HfConfig, dense: Dense, moe: Moe | None) -> list[Mlp]:
    """Experts in every `decoder_sparse_step`-th layer that is not in `mlp_only_layers`."""
    step = read_int(hf, "decoder_sparse_step", 1)
    given = hf.get("mlp_only_layers") or ()
    named = cast(Sequence[object], given if isinstance(given, list | tuple) else "?")
    if not all(isinstance(layer, int) for layer in named):
        raise ConfigError(
            f"model config: mlp_only_layers = {given!r} is not a list of layer numbers"
        )
    return [
        dense if moe is None or layer in named or (layer + 1) % step else moe
        for layer in range(read_int(hf, "num_hidden_layers"))
    ]
