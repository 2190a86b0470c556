"""Mixtral (8x7B, 8x22B): experts in every layer, their probabilities always renormalised."""

from moetrain.models.config import HfConfig, read_int, refuse_but
from moetrain.models.model import Model, decoder
from moetrain.models.parts.attention import read_gqa
from moetrain.models.parts.moe import Names, read_moe, read_num_experts

MODEL_TYPE, ARCHITECTURE = "mixtral", "MixtralForCausalLM"


def build(hf: HfConfig) -> Model:
    """The model of a config.json. Raises ConfigError."""
    refuse_but(hf, "sliding_window", None)  # no use_sliding_window here: a number switches it on
    refuse_but(hf, "attention_bias", False, None)  # transformers does not read it here
    moe = read_moe(
        hf,
        read_num_experts(hf),
        ffn="intermediate_size",
        renormalise=True,
        top_k=2,
        names=Names("block_sparse_moe", gate="w1", up="w3", down="w2"),
    )
    return decoder(
        hf,
        ARCHITECTURE,
        read_gqa(hf),
        [moe] * read_int(hf, "num_hidden_layers"),
        norm_eps=1e-5,
        rope_theta=1e6,
        max_positions=131072,
    )
