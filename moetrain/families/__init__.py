"""Model families: a Hugging Face config to sizes, and one weight table for both directions.

Imports no torch.
"""

from moetrain.errors import ConfigError, nearest
from moetrain.families import llama, mixtral, qwen2, qwen3, qwen3_moe
from moetrain.families.dims import (
    Dims,
    HfConfig,
    architecture_of,
    vocab_head,
    with_scalar_head,
)
from moetrain.families.layouts import Layout
from moetrain.families.rules import BoundRule, Family, Rule, expand, fused_slices, ignored_keys

__all__ = [
    "FAMILIES",
    "BoundRule",
    "Dims",
    "Family",
    "HfConfig",
    "Layout",
    "Rule",
    "expand",
    "family_of",
    "fused_slices",
    "ignored_keys",
    "with_scalar_head",
]

FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": llama.FAMILY,
    "MixtralForCausalLM": mixtral.FAMILY,
    "Qwen2ForCausalLM": qwen2.FAMILY,
    "Qwen3ForCausalLM": qwen3.FAMILY,
    "Qwen3MoeForCausalLM": qwen3_moe.FAMILY,
}


def family_of(hf: HfConfig) -> Family:
    """The family of a config.json: by `architectures`, or by `model_type` where that is absent.

    Raises ConfigError.
    """
    known = ", ".join(FAMILIES)
    name = architecture_of(hf)
    if name is not None:
        if vocab_head(name) not in FAMILIES:
            raise ConfigError(
                f"model config: architecture {name!r} is unknown; "
                f"known: {known}.{nearest(name, FAMILIES)}"
            )
        return FAMILIES[vocab_head(name)]
    model_type = hf.get("model_type")
    for family in FAMILIES.values():
        if family.name == model_type:
            return family
    raise ConfigError(
        f"model config: architectures is missing and model_type = {model_type!r} is unknown; "
        f"give architectures: [one of {known}]"
    )
