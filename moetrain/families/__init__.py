"""Model families: a Hugging Face config to sizes, and one weight table for both directions.

Imports no torch.
"""

from collections.abc import Sequence
from typing import cast

from moetrain.errors import ConfigError, nearest
from moetrain.families import llama, mixtral, qwen3, qwen3_moe
from moetrain.families.dims import Dims, HfConfig
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
]

FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": llama.FAMILY,
    "MixtralForCausalLM": mixtral.FAMILY,
    "Qwen3ForCausalLM": qwen3.FAMILY,
    "Qwen3MoeForCausalLM": qwen3_moe.FAMILY,
}


def family_of(hf: HfConfig) -> Family:
    """The family of a config.json: by `architectures`, or by `model_type` where that is absent.

    Raises ConfigError.
    """
    architectures = hf.get("architectures")
    known = ", ".join(FAMILIES)
    if isinstance(architectures, Sequence) and not isinstance(architectures, str) and architectures:
        name = str(cast(Sequence[object], architectures)[0])
        if name not in FAMILIES:
            raise ConfigError(
                f"model config: architecture {name!r} is unknown; "
                f"known: {known}.{nearest(name, FAMILIES)}"
            )
        return FAMILIES[name]
    model_type = hf.get("model_type")
    for family in FAMILIES.values():
        if family.name == model_type:
            return family
    raise ConfigError(
        f"model config: architectures is missing and model_type = {model_type!r} is unknown; "
        f"give architectures: [one of {known}]"
    )
