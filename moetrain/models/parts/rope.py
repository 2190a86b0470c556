"""Rotary position embeddings: the base, and how frequencies are scaled for longer texts."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

from moetrain.errors import ConfigError
from moetrain.models.config import HfConfig, read_bool, read_float, read_int, refuse_but


@dataclass(frozen=True)
class Linear:
    """All frequencies divided by `factor`."""

    factor: float


@dataclass(frozen=True)
class Llama3:
    """Llama 3.1's: long wavelengths stretched by `factor`, middle ones blended."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int


@dataclass(frozen=True)
class Yarn:
    """YaRN (arXiv 2309.00071): frequencies below `beta_slow` turns over the original length divided
    by `factor`, those above `beta_fast` as they were, a ramp between; queries and keys times
    `attention_factor`.
    """

    factor: float
    original_max_positions: int
    attention_factor: float
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True  # the ramp's ends are rounded to whole dimensions

    def ramp(self, theta: float, head_dim: int) -> tuple[float, float]:
        """Between which of the head_dim / 2 frequencies the ramp lies."""

        def turning(num: float) -> float:  # the dimension that turns so often over that length
            length = self.original_max_positions / (num * 2 * math.pi)
            return head_dim * math.log(length) / (2 * math.log(theta))

        low, high = turning(self.beta_fast), turning(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, head_dim - 1)
        return low, high if high != low else high + 0.001


type Scaling = Linear | Llama3 | Yarn


@dataclass(frozen=True)
class Rope:
    """Frequency i of head_dim / 2 is theta^(-2i / head_dim), and then scaled."""

    head_dim: int
    theta: float
    scaling: Scaling | None = None

    @property
    def attention_factor(self) -> float:
        """By which queries and keys are multiplied."""
        return self.scaling.attention_factor if isinstance(self.scaling, Yarn) else 1.0


def read_rope(hf: HfConfig, head_dim: int, default_theta: float, max_positions: int) -> Rope:
    """From `rope_parameters` (transformers 5), or `rope_theta` and `rope_scaling`.

    Raises ConfigError, also where the places contradict each other.
    """
    refuse_but(hf, "partial_rotary_factor", 1.0, None)
    given = [key for key in ("rope_scaling", "rope_parameters") if hf.get(key)]
    places = {key: _mapping(hf, key) for key in given}
    thetas = {f"{key}.rope_theta": place.get("rope_theta") for key, place in places.items()}
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
    agreed = {"rope_theta": next(iter(stated.values()), None)}
    theta = read_float(agreed, "rope_theta", default_theta)
    scalings = {key: _scaling(hf, place, max_positions) for key, place in places.items()}
    if _disagree(scalings):
        raise ConfigError(
            f"model config: {_both(places)} differ. Remove rope_scaling, or rope_parameters."
        )
    scaling = next(iter(scalings.values()), None)
    if isinstance(scaling, Yarn) and theta <= 1:
        raise ConfigError(f"model config: rope_theta = {theta:g} must be above 1 with yarn")
    return Rope(head_dim, theta, scaling)


def _mapping(hf: HfConfig, key: str) -> Mapping[str, object]:
    value = hf[key]
    if not isinstance(value, Mapping):
        raise ConfigError(f"model config: {key} = {value!r} is not a mapping")
    return cast(Mapping[str, object], value)


def _disagree(values: Mapping[str, object]) -> bool:
    return any(value != next(iter(values.values())) for value in values.values())


def _both(values: Mapping[str, object]) -> str:
    return " and ".join(f"{key} = {value!r}" for key, value in values.items())


def _scaling(hf: HfConfig, given: Mapping[str, object], max_positions: int) -> Scaling | None:
    """How frequencies are scaled by `rope_scaling` or `rope_parameters`."""
    kind = given.get("rope_type") or given.get("type") or "default"
    refuse_but(given, "partial_rotary_factor", 1.0, None)
    if kind == "default":
        return None
    if kind == "linear":
        return Linear(read_float(given, "factor"))
    # For both others the precedence and the fallback are transformers'.
    original = {**given, **hf}
    if kind == "llama3":
        return Llama3(
            read_float(given, "factor"),
            read_float(given, "low_freq_factor"),
            read_float(given, "high_freq_factor"),
            read_int(original, "original_max_position_embeddings", max_positions),
        )
    if kind == "yarn":
        return _yarn(given, read_int(original, "original_max_position_embeddings", max_positions))
    raise ConfigError(
        f"model config: rope_type = {kind!r} is not supported; allowed: default, linear, llama3,"
        f" yarn"
    )


def _yarn(given: Mapping[str, object], original: int) -> Yarn:
    """As transformers reads it: `mscale` counts only together with `mscale_all_dim`, a 0 is as good
    as nothing, and a null `truncate` is false.
    """
    stated = {key: value for key, value in given.items() if value != 0 or value is False}
    factor = read_float(stated, "factor")
    scale = 1.0
    if factor > 1:
        whole, part = (
            0.1 * read_float(stated, key, 1.0) * math.log(factor) + 1
            for key in ("mscale", "mscale_all_dim")
        )
        both = stated.get("mscale") and stated.get("mscale_all_dim")
        scale = whole / part if both else 0.1 * math.log(factor) + 1
    return Yarn(
        factor,
        original,
        read_float(given, "attention_factor", scale),
        read_float(stated, "beta_fast", 32.0),
        read_float(stated, "beta_slow", 1.0),
        read_bool(given, "truncate", "truncate" not in given),
    )
