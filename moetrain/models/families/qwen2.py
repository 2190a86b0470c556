"""Qwen2 and Qwen2.5, dense, and models distilled into them: query, key and value have biases."""

from moetrain.models.config import HfConfig, read_int, refuse_but
from moetrain.models.model import Model, decoder
from moetrain.models.parts.attention import read_gqa
from moetrain.models.parts.mlp import Dense

MODEL_TYPE, ARCHITECTURE = "qwen2", "Qwen2ForCausalLM"


def build(hf: HfConfig) -> Model:
    """The model of a config.json. Raises ConfigError."""
    refuse_but(hf, "attention_bias", False, None)  # transformers does not read it here
    # A null or missing num_key_value_heads is refused: transformers takes 32 for one of the two
    # and num_attention_heads for the other.
    attention = read_gqa(hf, qkv_bias=True)
    dense = Dense(attention.hidden, read_int(hf, "intermediate_size"))
    return decoder(hf, ARCHITECTURE, attention, [dense] * read_int(hf, "num_hidden_layers"))
