"""gpt-oss (20b, 120b): attention with sinks and, in every second layer, a window; biases; experts
with a clamped gate, all of a layer in one tensor.
"""

from collections.abc import Sequence
from typing import cast

from moetrain.errors import ConfigError
from moetrain.models.config import HfConfig, read_bool, read_float, read_int
from moetrain.models.model import Model, decoder
from moetrain.models.parts.attention import read_gqa
from moetrain.models.parts.mlp import Glu
from moetrain.models.parts.moe import Names, read_moe, read_num_experts

MODEL_TYPE, ARCHITECTURE = "gpt_oss", "GptOssForCausalLM"

# Where config.json has neither rope_parameters nor rope_scaling.
_ROPE: dict[str, object] = dict(
    rope_type="yarn",
    factor=32.0,
    beta_fast=32.0,
    beta_slow=1.0,
    truncate=False,
    original_max_position_embeddings=4096,
)
_KINDS = ("sliding_attention", "full_attention")  # of a layer; by default in turn


def build(hf: HfConfig) -> Model:
    """The model of a config.json. Raises ConfigError."""
    if not hf.get("rope_parameters") and not hf.get("rope_scaling"):
        hf = {**hf, "rope_parameters": _ROPE}
    biased = read_bool(hf, "attention_bias", True)
    attention = read_gqa(hf, qkv_bias=biased, output_bias=biased, sinks=True, head_dim=64)
    moe = read_moe(
        hf,
        read_num_experts(hf),
        ffn="intermediate_size",
        renormalise=True,
        top_k=4,
        names=Names(router="router"),
        bias=True,
        glu=Glu(
            slope=read_float(hf, "swiglu_alpha", 1.702),
            offset=1.0,
            limit=read_float(hf, "swiglu_limit", 7.0),
        ),
        interleaved=True,
    )
    layers = read_int(hf, "num_hidden_layers")
    return decoder(
        {**hf, "layer_types": None},  # `_windows` reads them
        ARCHITECTURE,
        attention,
        [moe] * layers,
        norm_eps=1e-5,
        rope_theta=150000.0,
        max_positions=131072,
        windows=_windows(hf, layers),
    )


def _windows(hf: HfConfig, layers: int) -> list[int | None]:
    """Of each layer."""
    given = hf.get("layer_types") or [_KINDS[i % 2] for i in range(layers)]
    kinds = cast(Sequence[object], given if isinstance(given, list | tuple) else "?")
    if len(kinds) != layers or not all(kind in _KINDS for kind in kinds):
        raise ConfigError(
            f"model config: layer_types = {given!r} is no list of {layers} of"
            f" {' and '.join(_KINDS)}"
        )
    if _KINDS[0] not in kinds:
        return [None] * layers
    size = read_int(hf, "sliding_window", None if "sliding_window" in hf else 128)
    return [size if kind == _KINDS[0] else None for kind in kinds]
