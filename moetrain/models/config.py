"""How a family's page reads a Hugging Face config.json.

What Megatron cannot reproduce is refused in one voice: a `ConfigError` that names the key, the
value given and the values allowed.
"""

import json
from collections.abc import Mapping, Sequence
from typing import cast

from moetrain.errors import ConfigError

type HfConfig = Mapping[str, object]

# Far above any published model's: a config beyond is a mistake, or made to fill the memory.
MOST = {"num_hidden_layers": 1000, "num_experts": 10_000, "num_local_experts": 10_000}
MOST_EXPERTS = 200_000  # of all layers
MOST_OF_ANY = 2**31 - 1

# What transformers' architecture names end in.
_VOCAB_HEAD, _SCALAR_HEAD = "ForCausalLM", "ForSequenceClassification"


def architecture_of(hf: HfConfig) -> str | None:
    """The first of config.json's `architectures`; None where there are none."""
    names = hf.get("architectures")
    if isinstance(names, Sequence) and not isinstance(names, str) and names:
        return str(cast(Sequence[object], names)[0])
    return None


def has_scalar_head(hf: HfConfig) -> bool:
    """Whether the model ends in one number per token (transformers' sequence classification)."""
    return (architecture_of(hf) or "").endswith(_SCALAR_HEAD)


def vocab_head(architecture: str) -> str:
    """The name of the same architecture with a vocabulary head, by which FAMILIES goes."""
    return architecture.replace(_SCALAR_HEAD, _VOCAB_HEAD)


def with_scalar_head(hf: HfConfig, architecture: str) -> dict[str, object]:
    """The config of `architecture` (a key of FAMILIES) with a scalar head, for transformers."""
    return {
        **hf,
        "architectures": [architecture.replace(_VOCAB_HEAD, _SCALAR_HEAD)],
        "id2label": {"0": "LABEL_0"},
        "label2id": {"LABEL_0": 0},
        "tie_word_embeddings": False,
    }


# key -> the values that are reproduced here; the first is transformers' default.
_ONLY: dict[str, tuple[object, ...]] = {
    "hidden_act": ("silu", "swish"),
    "mlp_bias": (False, None),
    "use_sliding_window": (False, None),
    "attention_dropout": (0, None),
    "router_jitter_noise": (0, None),
    "quantization_config": (None,),
}


def refuse_but(hf: HfConfig, key: str, *allowed: object) -> None:
    """Raise ConfigError when the config has `key` with a value that is not among `allowed`."""
    if key in hf and hf[key] not in allowed:
        raise ConfigError(
            f"model config: {key} = {json.dumps(hf[key], default=repr)} is not supported; "
            f"allowed: {json.dumps(allowed[0])}"
        )


def refuse_unsupported(hf: HfConfig) -> None:
    """Raise ConfigError for a setting that transformers would run and Megatron here would not."""
    for key, allowed in _ONLY.items():
        refuse_but(hf, key, *allowed)
    ends = hf.get("eos_token_id")
    ids = cast(list[object], ends) if isinstance(ends, list) else [] if ends is None else [ends]
    if not all(type(i) is int for i in ids):
        raise ConfigError(
            f"model config: eos_token_id = {ends!r} is no token id, and no list of them"
        )
    layer_types = hf.get("layer_types")
    if isinstance(layer_types, Sequence) and not isinstance(layer_types, str):
        others = {str(kind) for kind in cast(Sequence[object], layer_types)} - {"full_attention"}
        if others:
            raise ConfigError(
                f"model config: layer_types = {', '.join(sorted(others))} is not supported; "
                f"allowed: full_attention"
            )


def read_int(hf: HfConfig, key: str, default: int | None = None, minimum: int = 1) -> int:
    """A whole number of at least `minimum`; null counts as absent. Raises ConfigError."""
    value = hf.get(key)
    value = default if value is None else value
    if value is None:
        raise ConfigError(
            f"model config: {key} is missing; give a whole number of at least {minimum}"
        )
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ConfigError(
            f"model config: {key} = {value!r} is not a whole number of at least {minimum}"
        )
    most = MOST.get(key, MOST_OF_ANY)
    if value > most:  # the table of such a model would fill the memory
        raise ConfigError(f"model config: {key} = {value} is more than {most}, the most held here")
    return value


def read_float(hf: HfConfig, key: str, default: float | None = None) -> float:
    """A positive number; null counts as absent. Raises ConfigError."""
    value = hf.get(key)
    value = default if value is None else value
    if value is None:
        raise ConfigError(f"model config: {key} is missing; give a positive number")
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e30:
        raise ConfigError(f"model config: {key} = {value!r} is not a positive number")
    return float(value)


def read_bool(hf: HfConfig, key: str, default: bool) -> bool:
    """true or false; null counts as absent. Raises ConfigError."""
    value = hf.get(key)
    value = default if value is None else value
    if not isinstance(value, bool):
        raise ConfigError(f"model config: {key} = {value!r} is not true or false")
    return value
