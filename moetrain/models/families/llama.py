"""Llama 2 and 3, and models saved in their format."""

from moetrain.models.dims import Dims, HfConfig, read_dims
from moetrain.models.rules import ATTENTION, DENSE_MLP, MODEL, Family


def dims(hf: HfConfig) -> Dims:
    """Sizes from config.json. Raises ConfigError."""
    return read_dims(hf, qk_norm=False, groups_default_to_heads=True, max_positions=2048)


FAMILY = Family(
    name="llama",
    architecture="LlamaForCausalLM",
    dims=dims,
    rules=(*MODEL, *ATTENTION, *DENSE_MLP),
)
