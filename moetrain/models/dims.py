"""The sizes of a model, and how they are read from a Hugging Face config.json.

A family's `dims(hf)` goes through the helpers here so that what Megatron cannot reproduce is
refused in one voice: a `ConfigError` that names the key, the value given and the values allowed.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, cast

from moetrain.errors import ConfigError

type HfConfig = Mapping[str, object]
# A dimension of a Hugging Face tensor: a number, or the name of one of the model's sizes, of which
# queries = heads * head_dim and keys = groups * head_dim.
type Extent = (
    int | Literal["hidden", "ffn", "moe_ffn", "head_dim", "queries", "keys", "experts", "vocab"]
)

# Megatron's make_vocab_size_divisible_by: each tensor-parallel rank holds a multiple of these rows.
VOCAB_MULTIPLE = 128


# Far above any published model's: a config beyond is a mistake, or made to fill the memory.
MOST = {"num_hidden_layers": 1000, "num_experts": 10_000, "num_local_experts": 10_000}
MOST_EXPERTS = 200_000  # of all layers
MOST_OF_ANY = 2**31 - 1


@dataclass(frozen=True)
class Dims:
    """The sizes and switches of one decoder-only model. All sizes are global."""

    num_layers: int
    hidden: int
    ffn: int  # of the dense layers
    heads: int  # query heads
    groups: int  # key/value heads
    head_dim: int
    vocab: int  # rows of the Hugging Face embedding, unpadded
    norm_eps: float
    rope_theta: float
    # None, or "rope_type" (linear or llama3) and that type's numbers; unhashed so that Dims can be
    rope_scaling: dict[str, object] | None = field(hash=False)
    tied: bool
    qk_norm: bool
    max_positions: int
    moe_layers: tuple[bool, ...]  # [num_layers]: which layers hold experts
    experts: int = 0
    top_k: int = 0
    moe_ffn: int = 0  # of one expert
    qkv_bias: bool = False
    norm_topk: bool = True  # the chosen experts' probabilities are renormalised to sum to 1
    scalar_head: bool = False  # one number a token (a reward) in place of the vocabulary
    value_head: bool = False  # one number a token (PPO's value) beside the vocabulary

    def size(self, extent: Extent) -> int:
        """The number of rows or columns that a tensor's named dimension has."""
        match extent:
            case int():
                return extent
            case "hidden":
                return self.hidden
            case "ffn":
                return self.ffn
            case "moe_ffn":
                return self.moe_ffn
            case "head_dim":
                return self.head_dim
            case "queries":
                return self.heads * self.head_dim
            case "keys":
                return self.groups * self.head_dim
            case "experts":
                return self.experts
            case "vocab":
                return self.vocab

    def padded_vocab(self, tp_size: int) -> int:
        """The vocabulary rows Megatron holds over `tp_size` ranks together."""
        multiple = VOCAB_MULTIPLE * tp_size
        return -(-self.vocab // multiple) * multiple


# What transformers' architecture names end in.
_VOCAB_HEAD, _SCALAR_HEAD = "ForCausalLM", "ForSequenceClassification"


def architecture_of(hf: HfConfig) -> str | None:
    """The first of config.json's `architectures`; None where there are none."""
    names = hf.get("architectures")
    if isinstance(names, Sequence) and not isinstance(names, str) and names:
        return str(cast(Sequence[object], names)[0])
    return None


def has_scalar_head(hf: HfConfig) -> bool:
    """Whether the model ends in one number a token (transformers' sequence classification)."""
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


def read_dims(
    hf: HfConfig,
    *,
    qk_norm: bool,
    qkv_bias: bool = False,
    head_dim: int | None = None,
    groups_default_to_heads: bool = False,
    norm_eps: float = 1e-6,
    rope_theta: float = 10000.0,
    max_positions: int = 32768,
    experts: int = 0,
    top_k: int = 0,
    moe_ffn: int = 0,
    moe_layers: tuple[bool, ...] | None = None,
    norm_topk: bool = True,
) -> Dims:
    """What every family reads alike.

    The keyword arguments are the family's own values, and its defaults in transformers.
    `head_dim` is taken when the config has none; None means hidden_size / num_attention_heads.
    Raises ConfigError for a missing key, a wrong type or a setting Megatron would not reproduce.
    """
    refuse_unsupported(hf)
    num_layers = read_int(hf, "num_hidden_layers")
    hidden = read_int(hf, "hidden_size")
    heads, groups, dim = _read_heads(hf, hidden, head_dim, groups_default_to_heads)
    if experts * num_layers > MOST_EXPERTS:
        raise ConfigError(
            f"model config: {experts} experts in each of {num_layers} layers are more than"
            f" {MOST_EXPERTS}, the most held here"
        )
    if top_k > experts:
        raise ConfigError(
            f"model config: num_experts_per_tok {top_k} is more than the {experts} experts"
        )
    positions = read_int(hf, "max_position_embeddings", max_positions)
    theta, scaling = read_rope(hf, rope_theta, positions)
    scalar_head = has_scalar_head(hf)
    return Dims(
        num_layers=num_layers,
        hidden=hidden,
        ffn=read_int(hf, "intermediate_size"),
        heads=heads,
        groups=groups,
        head_dim=dim,
        vocab=read_int(hf, "vocab_size"),
        norm_eps=read_float(hf, "rms_norm_eps", norm_eps),
        rope_theta=theta,
        rope_scaling=scaling,
        tied=read_bool(hf, "tie_word_embeddings", False) and not scalar_head,
        qk_norm=qk_norm,
        max_positions=positions,
        moe_layers=(False,) * num_layers if moe_layers is None else moe_layers,
        experts=experts,
        top_k=top_k,
        moe_ffn=moe_ffn,
        qkv_bias=qkv_bias,
        norm_topk=norm_topk,
        scalar_head=scalar_head,
    )


def _read_heads(
    hf: HfConfig, hidden: int, head_dim: int | None, groups_default_to_heads: bool
) -> tuple[int, int, int]:
    """(heads, groups, head_dim), which must fit each other."""
    heads = read_int(hf, "num_attention_heads")
    groups = read_int(hf, "num_key_value_heads", heads if groups_default_to_heads else None)
    if heads % groups:
        raise ConfigError(
            f"model config: num_attention_heads {heads} is not a multiple of "
            f"num_key_value_heads {groups}"
        )
    if hf.get("head_dim") is None and head_dim is None and hidden % heads:
        raise ConfigError(
            f"model config: hidden_size {hidden} is not a multiple of "
            f"num_attention_heads {heads}; give head_dim"
        )
    dim = read_int(hf, "head_dim", head_dim or hidden // heads)
    if dim % 2:
        raise ConfigError(f"model config: head_dim = {dim} is odd; rotary embeddings need it even")
    return heads, groups, dim


# key -> the values that are reproduced here; the first is transformers' default.
_ONLY: dict[str, tuple[object, ...]] = {
    "hidden_act": ("silu", "swish"),
    # transformers puts this bias on o_proj too, which Megatron's add_qkv_bias does not.
    "attention_bias": (False, None),
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


# rope type -> the keys it needs besides rope_type
_ROPE_KEYS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}


def read_rope(
    hf: HfConfig, default_theta: float, max_positions: int
) -> tuple[float, dict[str, object] | None]:
    """(theta, scaling), from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling`.

    The scaling is None for the default rotary embedding, else "rope_type" and that type's numbers.
    Raises ConfigError, also where the places contradict each other.
    """
    refuse_but(hf, "partial_rotary_factor", 1.0, None)
    given = [key for key in ("rope_scaling", "rope_parameters") if hf.get(key)]
    places = {key: _mapping(hf, key) for key in given}
    thetas = {f"{key}.rope_theta": own.get("rope_theta") for key, own in places.items()}
    thetas = {"rope_theta": hf.get("rope_theta"), **thetas}
    stated = {key: value for key, value in thetas.items() if value is not None}
    if _disagree(stated):
        raise ConfigError(f"model config: {_both(stated)} differ. Keep the right one.")
    if "rope_scaling" in places and [*stated] == ["rope_parameters.rope_theta"]:
        # transformers 5 lets rope_scaling win where both are present, and then the default theta.
        raise ConfigError(
            f"model config: rope_scaling hides {_both(stated)}, so that transformers reads"
            f" {default_theta:g}. Put all of it in rope_parameters and remove rope_scaling."
        )
    own = {"rope_theta": next(iter(stated.values()), None)}
    theta = read_float(own, "rope_theta", default_theta)
    found = {key: _scaling(hf, own, max_positions) for key, own in places.items()}
    if _disagree(found):
        raise ConfigError(
            f"model config: {_both(found)} differ. Remove rope_scaling, or rope_parameters."
        )
    return theta, next(iter(found.values()), None)


def _mapping(hf: HfConfig, key: str) -> Mapping[str, object]:
    value = hf[key]
    if not isinstance(value, Mapping):
        raise ConfigError(f"model config: {key} = {value!r} is not a mapping")
    return cast(Mapping[str, object], value)


def _disagree(values: Mapping[str, object]) -> bool:
    return any(value != next(iter(values.values())) for value in values.values())


def _both(values: Mapping[str, object]) -> str:
    return " and ".join(f"{key} = {value!r}" for key, value in values.items())


def _scaling(
    hf: HfConfig, given: Mapping[str, object], max_positions: int
) -> dict[str, object] | None:
    """How frequencies are scaled by `rope_scaling` or `rope_parameters`."""
    kind = given.get("rope_type") or given.get("type") or "default"
    if not isinstance(kind, str) or kind not in _ROPE_KEYS:
        raise ConfigError(
            f"model config: rope_type = {kind!r} is not supported; allowed: {', '.join(_ROPE_KEYS)}"
        )
    refuse_but(given, "partial_rotary_factor", 1.0, None)
    if kind == "default":
        return None
    scaling: dict[str, object] = {"rope_type": kind}
    scaling.update({key: read_float(given, key) for key in _ROPE_KEYS[kind]})
    if kind == "llama3":
        # both the precedence and the fallback are transformers'
        scaling["original_max_position_embeddings"] = read_int(
            {**given, **hf}, "original_max_position_embeddings", max_positions
        )
    return scaling


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


def read_experts(hf: HfConfig) -> int:
    """The number of experts; transformers writes num_experts or num_local_experts."""
    keys = [key for key in ("num_experts", "num_local_experts") if hf.get(key) is not None]
    counts = {read_int(hf, key, minimum=0) for key in keys}
    if not counts:
        raise ConfigError("model config: num_experts is missing; give a whole number")
    if len(counts) > 1:
        raise ConfigError(
            "model config: num_experts and num_local_experts differ; give one of them"
        )
    return counts.pop()
