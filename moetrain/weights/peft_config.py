"""What adapter_config.json says of a LoRA adapter, as far as it is held here."""

import json
import math
import re
import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from moetrain.errors import WeightsError
from moetrain.manifest import read_text

# key -> the values held here; absent counts as the first
_ONLY: dict[str, tuple[object, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "lora_bias": (False, None),
    "fan_in_fan_out": (False, None),
    "modules_to_save": (None, [], ["score"], ["classifier", "score"]),
    "trainable_token_indices": (None, [], {}),
    "layer_replication": (None, []),
    "alora_invocation_tokens": (None, []),
    "use_qalora": (False, None),
    "arrow_config": (None,),
    "use_bdlora": (None, False),
}
# PEFT names its variants of LoRA `use_...` and `..._config`. These are read, or say how matrices
# began; any other that is set is a kind of adapter that is not known here.
_KNOWN = frozenset(
    "use_rslora use_dora eva_config loftq_config corda_config lora_ga_config"
    " megatron_config".split()
)
# values of init_lora_weights that leave the base as it is
_PLAIN = (True, False, None, "gaussian", "eva", "orthogonal", "mica")


@dataclass(frozen=True)
class PeftConfig:
    """The part of adapter_config.json that says what the tensors mean."""

    path: Path
    base: str
    rank: int
    alpha: float
    ranks: Mapping[str, int]  # pattern -> rank, where it is another
    alphas: Mapping[str, float]
    rslora: bool
    dora: bool
    init: Literal["lora", "olora", "pissa"]
    dropout: float
    scalar_head: bool  # saved beside the adapter, for transformers' sequence classification
    parameters: Collection[str]  # target_parameters

    def expert_parameter(self, block: str, both: bool, inner: bool) -> str:
        """Which parameter of a block of experts an `inner` (base_layer) or outer tensor is for;
        `both`: the block has inner ones.
        """
        if both:
            return "gate_up_proj" if inner else "down_proj"
        matches = [
            leaf
            for leaf in ("gate_up_proj", "down_proj")
            if any(f"{block}.{leaf}".endswith(f".{name}") for name in self.parameters)
        ]
        if len(matches) != 1:
            raise WeightsError(
                f"{self.path}: target_parameters = {sorted(self.parameters)} does not say which "
                f"parameter of {block} the adapter is for."
            )
        return matches[0]


def read_config(path: Path) -> PeftConfig:
    """Raises WeightsError for what is no LoRA adapter, or one of a kind not held here."""
    try:
        content: Any = json.loads(read_text(path))
    except (OSError, ValueError, RecursionError) as error:
        raise WeightsError(
            f"{path}: not readable ({error}). Give a folder that PEFT's save_pretrained or convert "
            f"adapter wrote."
        ) from None
    if not isinstance(content, dict):
        raise WeightsError(f"{path}: not a mapping. Save the adapter again with PEFT.")
    for key, allowed in _ONLY.items():
        if content.get(key, allowed[0]) not in allowed:
            raise WeightsError(
                f"{path}: {key} = {json.dumps(content[key])} is not held here; allowed: "
                f"{json.dumps(allowed[0])}"
            )
    for key in content.keys() - _ONLY.keys() - _KNOWN:
        if (key.startswith("use_") or key.endswith("_config")) and content[key]:
            raise WeightsError(
                f"{path}: {key} = {json.dumps(content[key])[:80]} is a kind of LoRA that is not"
                f" known here. Merge the adapter with PEFT instead."
            )
    first = content.get("init_lora_weights", True)
    if first not in (*_PLAIN, "olora", "pissa"):
        raise WeightsError(
            f"{path}: init_lora_weights = {first!r} changed the base in a way that is not known "
            f"here. Save the adapter as plain LoRA (PEFT: path_initial_model_for_weight_conversion)"
        )
    try:
        return PeftConfig(
            path=path,
            base=str(content.get("base_model_name_or_path")),
            rank=_rank(content["r"]),
            alpha=_alpha(content["lora_alpha"]),
            ranks={_pattern(k): _rank(v) for k, v in (content.get("rank_pattern") or {}).items()},
            alphas={
                _pattern(k): _alpha(v) for k, v in (content.get("alpha_pattern") or {}).items()
            },
            rslora=bool(content.get("use_rslora")),
            dora=bool(content.get("use_dora")),
            init=first if first in ("olora", "pissa") else "lora",
            dropout=_share(content.get("lora_dropout") or 0.0),
            scalar_head=content.get("task_type") == "SEQ_CLS",
            parameters=_names(content.get("target_parameters") or ()),
        )
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise WeightsError(f"{path}: not a LoRA config of PEFT's ({error!r}).") from None


def _names(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list | tuple) or not all(isinstance(name, str) for name in value):
        raise ValueError(f"target_parameters {str(value)[:60]}, no list of names")
    return tuple(value)


def _rank(value: Any) -> int:
    if type(value) is not int or not 0 < value < 1 << 31:
        raise ValueError(f"a rank of {value}")
    return value


def _alpha(value: Any) -> float:
    if type(value) not in (int, float) or not 0 < value < 1e9:  # NaN is not, either
        raise ValueError(f"a lora_alpha of {value}")
    return float(value)


def _share(value: Any) -> float:
    if type(value) not in (int, float) or not 0 <= value < 1:
        raise ValueError(f"a lora_dropout of {value}")
    return float(value)


def _pattern(text: str) -> str:
    """A pattern of PEFT's that is soon matched: of two repetitions at most, and of no group."""
    if len(re.findall(r"(?<!\()[*+?{]", text)) > 2 or re.search(r"\)[*+?{]", text):
        raise ValueError(f"a pattern that repeats too much, {text[:60]}")
    try:
        with warnings.catch_warnings(action="error"):  # of sets in sets
            re.compile(_ending_in(text))
    except (re.error, OverflowError, RecursionError, Warning) as error:
        raise ValueError(f"{text[:60]} is no pattern ({error})") from None
    return text


def _ending_in(pattern: str) -> str:
    """What PEFT makes of a pattern."""
    return rf"(.*\.)?({pattern})$"


def rank_of(config: PeftConfig, module: str) -> int:
    """The rank of a module's or parameter's adapter."""
    return _by_pattern(config.ranks, module, config.rank)


def scale_of(config: PeftConfig, module: str, rank: int) -> float:
    """What PEFT multiplies B A of a module or parameter by."""
    alpha = _by_pattern(config.alphas, module, config.alpha)
    return alpha / (math.sqrt(rank) if config.rslora else rank)


def _by_pattern[T](patterns: Mapping[str, T], module: str, default: T) -> T:
    """The value of the first pattern that the name ends in, as PEFT has it."""
    for pattern, value in patterns.items():
        if re.match(_ending_in(pattern), module):
            return value
    return default
