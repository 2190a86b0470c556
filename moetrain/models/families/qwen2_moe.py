"""Qwen1.5-MoE and Qwen2-MoE (57B-A14B): biased queries, keys and values, and beside the experts one
that every token meets.
"""

from moetrain.models.config import HfConfig, read_bool, read_int, refuse_but
from moetrain.models.families.qwen3_moe import sparse_layers
from moetrain.models.model import Model, decoder
from moetrain.models.parts.attention import read_gqa
from moetrain.models.parts.mlp import Dense
from moetrain.models.parts.moe import SharedExpert, read_moe, read_num_experts

MODEL_TYPE, ARCHITECTURE = "qwen2_moe", "Qwen2MoeForCausalLM"


def build(hf: HfConfig) -> Model:
    """The model of a config.json. Raises ConfigError."""
    refuse_but(hf, "attention_bias", False, None)  # transformers reads qkv_bias here
    attention = read_gqa(hf, qkv_bias=read_bool(hf, "qkv_bias", True))
    num, moe = read_num_experts(hf), None
    if num:
        ffn = read_int(hf, "shared_expert_intermediate_size")
        moe = read_moe(
            hf,
            num,
            ffn="moe_intermediate_size",
            renormalise=read_bool(hf, "norm_topk_prob", False),
            shared=SharedExpert(attention.hidden, ffn, gated=True),
        )
    dense = Dense(attention.hidden, read_int(hf, "intermediate_size"))
    return decoder(hf, ARCHITECTURE, attention, sparse_layers(hf, dense, moe))
