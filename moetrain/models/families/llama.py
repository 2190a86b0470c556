"""Llama 2 and 3, and models saved in their format."""

from moetrain.models.config import HfConfig, read_bool, read_int
from moetrain.models.model import Model, decoder
from moetrain.models.parts.attention import read_gqa
from moetrain.models.parts.mlp import Dense

MODEL_TYPE, ARCHITECTURE = "llama", "LlamaForCausalLM"


def build(hf: HfConfig) -> Model:
    """The model of a config.json. Raises ConfigError."""
    biased = read_bool(hf, "attention_bias", False)
    attention = read_gqa(hf, qkv_bias=biased, output_bias=biased, groups_default_to_heads=True)
    dense = Dense(attention.hidden, read_int(hf, "intermediate_size"))
    mlps = [dense] * read_int(hf, "num_hidden_layers")
    return decoder(hf, ARCHITECTURE, attention, mlps, max_positions=2048)
