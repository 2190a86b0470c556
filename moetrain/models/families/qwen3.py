"""Qwen3, dense: query/key norms, a head_dim of its own, embeddings tied in the small ones."""

from moetrain.models.dims import Dims, HfConfig, read_dims
from moetrain.models.rules import ATTENTION, DENSE_MLP, MODEL, QK_NORM, Family


def dims(hf: HfConfig) -> Dims:
    """Sizes from config.json. Raises ConfigError."""
    # transformers' Qwen3Config has head_dim 128 unless told, whatever hidden_size / heads is
    return read_dims(hf, qk_norm=True, head_dim=128)


FAMILY = Family(
    name="qwen3",
    architecture="Qwen3ForCausalLM",
    dims=dims,
    rules=(*MODEL, *ATTENTION, *QK_NORM, *DENSE_MLP),
)
