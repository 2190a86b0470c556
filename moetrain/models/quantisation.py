"""How a checkpoint's weights are quantised, as its config.json says it in three programs' words:
DeepSeek's and Qwen's `fp8`, llm-compressor's `compressed-tensors`, NVIDIA's `modelopt`; and
gpt-oss' `mxfp4`.

What is read here is dequantised on the way (`weights/dequantised.py`); a model's configuration is
then that of plain weights.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

from moetrain.errors import ConfigError
from moetrain.models.config import HfConfig

KEY = "quantization_config"
READ = "FP8 (by blocks, rows or tensors), ModelOpt's NVFP4 and gpt-oss' MXFP4"


@dataclass(frozen=True)
class Quantisation:
    """Where the scales of `X.weight` are, and for what each stands."""

    name: str  # as people say it: "FP8 in blocks of 128 x 128"
    suffix: str  # of the scales' name, after X.weight
    block: tuple[int, int] | None = None  # rows, columns; None: as the scales' shape says
    packed: bool = False  # two numbers of 4 bits in a byte, with one scale over all scales


MXFP4 = Quantisation("MXFP4", "_scales")


def read_quantisation(hf: HfConfig) -> Quantisation | None:
    """What config.json says; None for plain weights. ConfigError for what is not read here."""
    given = hf.get(KEY)
    if given is None:
        return None
    if not isinstance(given, dict):
        raise _refused(given)
    config = cast(Mapping[str, object], given)
    method = config.get("quant_method")
    if method == "mxfp4":
        return MXFP4
    if method == "fp8":
        if config.get("weight_block_size") is None:
            return Quantisation("FP8 by tensors", "_scale")
        return _blocks(config["weight_block_size"], "_scale_inv", config)
    if method == "compressed-tensors":
        return _compressed(config)
    if method == "modelopt" or (method is None and "quantization" in config):
        return _modelopt(config)
    raise _refused(config)


def plain_config(hf: HfConfig) -> dict[str, object]:
    """The config of the model with plain weights. ConfigError as `read_quantisation`."""
    read_quantisation(hf)
    return {key: value for key, value in hf.items() if key != KEY}


def _compressed(config: Mapping[str, object]) -> Quantisation:
    groups = config.get("config_groups")
    kinds: set[Quantisation] = set()
    for group in cast(dict[str, object], groups).values() if isinstance(groups, dict) else ():
        weights = cast(dict[str, object], group).get("weights") if isinstance(group, dict) else None
        settings = cast(dict[str, object], weights) if isinstance(weights, dict) else {}
        is_fp8 = settings.get("type") == "float" and settings.get("num_bits") == 8
        if not is_fp8 or settings.get("symmetric") is False:
            raise _refused(config)
        if settings.get("strategy") == "block":
            kinds.add(_blocks(settings.get("block_structure"), "_scale", config))
        elif settings.get("strategy") in ("tensor", "channel"):
            kinds.add(Quantisation("FP8 by tensors or rows", "_scale"))
        else:
            raise _refused(config)
    if len(kinds) != 1 or config.get("quantization_status", "compressed") != "compressed":
        raise _refused(config)
    return kinds.pop()


def _modelopt(config: Mapping[str, object]) -> Quantisation:
    inner = config.get("quantization", config)  # as older versions have it
    settings = cast(dict[str, object], inner) if isinstance(inner, dict) else {}
    algorithm = str(settings.get("quant_algo")).upper()
    if algorithm in ("FP8", "FP8_PER_CHANNEL_PER_TOKEN"):
        return Quantisation("FP8 by tensors or rows", "_scale")
    if algorithm in ("FP8_PB_WO", "FP8_BLOCK_SCALES"):
        return _blocks([128, 128], "_scale", config)
    if algorithm == "NVFP4":
        return Quantisation("NVFP4", "_scale", (1, 16), packed=True)
    raise _refused(config)


def _blocks(size: object, suffix: str, config: Mapping[str, object]) -> Quantisation:
    sizes = cast(list[object], size) if isinstance(size, list) else []
    whole = [one for one in sizes if type(one) is int and one > 0]
    if len(sizes) != 2 or len(whole) != 2:
        raise _refused(config)
    rows, columns = whole
    return Quantisation(f"FP8 in blocks of {rows} x {columns}", suffix, (rows, columns))


def _refused(config: object) -> ConfigError:
    shown = json.dumps(config, default=repr)
    shown = shown if len(shown) <= 200 else shown[:200] + "..."
    return ConfigError(
        f"model config: {KEY} = {shown} is not read here; allowed: {READ}. Take the checkpoint that"
        f" it was made from."
    )
