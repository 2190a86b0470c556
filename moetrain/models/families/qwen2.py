"""Qwen2 and Qwen2.5, dense, and models distilled into them: query, key and value have biases."""

from moetrain.models.dims import Dims, HfConfig, read_dims
from moetrain.models.rules import ATTENTION, DENSE_MLP, MODEL, Family


def dims(hf: HfConfig) -> Dims:
    """Sizes from config.json. Raises ConfigError."""
    # A null or missing num_key_value_heads is refused: transformers takes 32 for one of the two
    # and num_attention_heads for the other.
    return read_dims(hf, qk_norm=False, qkv_bias=True)


FAMILY = Family(
    name="qwen2",
    architecture="Qwen2ForCausalLM",
    dims=dims,
    rules=(*MODEL, *ATTENTION, *DENSE_MLP),
)
