"""Model families: a Hugging Face config to sizes, and one weight table for both directions.

Imports no torch.
"""

import re
from difflib import SequenceMatcher

from moetrain.errors import ConfigError, nearest
from moetrain.models.dims import (
    Dims,
    HfConfig,
    architecture_of,
    vocab_head,
    with_scalar_head,
)
from moetrain.models.families import llama, mixtral, qwen2, qwen3, qwen3_moe
from moetrain.models.rules import BoundRule, Family, Rule, expand, fused_slices, ignored_keys
from moetrain.models.sharding import Layout

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
                f"model config: architecture {name!r} is unknown; known: {known}."
                f"{_misspelt(name, hf)}"
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


def _misspelt(name: str, hf: HfConfig) -> str:
    """The known architecture that is meant, where it is not another family's that is spelt alike:
    such a one has another model_type, or another number or word in its name.
    """
    model_type = hf.get("model_type")
    meant = [known for known in FAMILIES if _alike(known, name)]
    if model_type is not None:
        meant = [known for known in meant if FAMILIES[known].name == model_type]
    return "" if name.startswith("Mistral") else nearest(name, meant)


def _alike(known: str, name: str) -> bool:
    words, others = (re.findall(r"[A-Z]+[a-z]*|\d+", n) for n in (known, name))
    return len(words) == len(others) and all(
        a == b or (a.isalpha() and SequenceMatcher(None, a, b).ratio() > 0.7)
        for a, b in zip(words, others, strict=True)
    )
