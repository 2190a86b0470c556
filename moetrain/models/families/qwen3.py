"""Qwen3, dense: query/key norms, a head_dim of its own, embeddings tied in the small ones."""

from moetrain.models.config import HfConfig, read_bool, read_int
from moetrain.models.model import Model, decoder
from moetrain.models.parts.attention import read_gqa
from moetrain.models.parts.mlp import Dense

MODEL_TYPE, ARCHITECTURE = "qwen3", "Qwen3ForCausalLM"


def build(hf: HfConfig) -> Model:
    """The model of a config.json. Raises ConfigError."""
    biased = read_bool(hf, "attention_bias", False)
    # transformers' Qwen3Config has head_dim 128 unless told, whatever hidden_size / heads is
    attention = read_gqa(hf, qk_norm=True, qkv_bias=biased, output_bias=biased, head_dim=128)
    dense = Dense(attention.hidden, read_int(hf, "intermediate_size"))
    return decoder(hf, ARCHITECTURE, attention, [dense] * read_int(hf, "num_hidden_layers"))
