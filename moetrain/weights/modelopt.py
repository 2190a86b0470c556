"""Quantisation by NVIDIA ModelOpt, a layer at a time: each layer is a transformers model of its
own, which ModelOpt calibrates and exports; what it made is read under the layer's true names.
"""

import contextlib
import io
import json
import warnings
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moetrain.errors import ConfigError, WeightsError
from moetrain.models import Model
from moetrain.models.quantisation import KEY
from moetrain.models.rules import HF_LAYER
from moetrain.weights.block_fp8 import check_apart, plain_modules, quantised_names
from moetrain.weights.calibration import OneLayer
from moetrain.weights.folder import weight_files
from moetrain.weights.header import Stored, read_header
from moetrain.weights.rows import Bytes, row_bytes
from moetrain.weights.stream import Report

CONFIGS = {"fp8": "FP8_DEFAULT_CFG", "nvfp4": "NVFP4_DEFAULT_CFG"}
SCALE = ".weight_scale"
GROUP = 16  # columns that share a scale in NVFP4


def check_servable(model: Model, to: str) -> None:
    """WeightsError for a matrix that the format cannot hold."""
    check_apart(model)
    for rule in model.table.values():
        for key, shape in zip(rule.hf, rule.hf_shapes, strict=True):
            if to == "nvfp4" and len(shape) == 2 and rule.adapts and shape[1] % GROUP:
                raise WeightsError(
                    f"{key} has {shape[1]} columns, which groups of {GROUP} do not divide. Take"
                    f" --to fp8, which has one scale for a weight."
                )


class Exported:
    """What ModelOpt made of all layers, by rows; and what it says of it.

    Raises WeightsError where it took other matrices of a layer than `quantised_names`.
    """

    def __init__(
        self, layers: Iterable[OneLayer], model: Model, to: str, folder: Path, report: Report
    ):
        self.config: dict[str, Any] = {}  # `quantization_config` of config.json
        self.note: dict[str, Any] = {}  # hf_quant_config.json
        self.unmet: dict[int, list[int]] = {}  # layer -> experts that no token met
        self._where: dict[str, tuple[Path, Stored]] = {}
        size = 2 * sum(rule.num_params for rule in model.table.values() if rule.layer is not None)
        for layer in layers:
            exported = folder / str(layer.number)
            _export(layer, to, exported)
            self._take(exported, layer.number, model)
            report(size * (layer.number + 1) // model.num_layers, size)
            if layer.met is not None and (layer.met == 0).any():
                self.unmet[layer.number] = (layer.met == 0).nonzero().flatten().tolist()

    def _take(self, folder: Path, number: int, model: Model) -> None:
        old, new = HF_LAYER.format(l=0), HF_LAYER.format(l=number)
        places = {name.replace(old, new, 1): (path, stored) for path in weight_files(folder)
                 for name, stored in read_header(path, None).items()}  # fmt: skip
        stems = {name.removesuffix(SCALE) for name in places if name.endswith(SCALE)}
        wanted = {n.removesuffix(".weight") for n in quantised_names(model) if n.startswith(new)}
        if stems != wanted:
            some = sorted(stems ^ wanted)
            raise WeightsError(
                f"ModelOpt quantised other matrices of layer {number} than were asked for:"
                f" {', '.join(some[:3])}, {len(some)} in all. Take --to fp8-block."
            )
        for name, where in places.items():
            if name.rpartition(".")[0] in stems and not name.endswith(".bias"):
                self._where[name] = where
        plain = ["model.embed_tokens", *plain_modules(model)]
        config = json.loads((folder / "config.json").read_text())[KEY]
        self.config = config | {"ignore": plain}
        self.note = json.loads((folder / "hf_quant_config.json").read_text())
        self.note["quantization"]["exclude_modules"] = plain

    def __str__(self) -> str:
        return "ModelOpt's export"

    def names(self) -> Collection[str]:
        return self._where.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._where[name][1].shape

    def dtype_name(self, name: str) -> str:
        return self._where[name][1].dtype

    def rows(self, name: str, start: int, stop: int) -> Bytes:
        path, stored = self._where[name]
        width = row_bytes(stored.shape, stored.dtype)
        with path.open("rb") as file:
            file.seek(stored.start + start * width)
            content = file.read((stop - start) * width)
        return np.frombuffer(content, np.uint8).reshape(stop - start, width)


def load() -> Any:
    """ModelOpt's module for quantisation. ConfigError where it is not installed."""
    try:
        with _quiet():
            import modelopt.torch.quantization as quantization
    except ImportError as error:
        raise ConfigError(
            f"NVIDIA ModelOpt is not installed ({error}): pip install 'moetrain[modelopt]', or take"
            f" --to fp8-block, which needs it not."
        ) from None
    return quantization


def _export(layer: OneLayer, to: str, folder: Path) -> None:
    """Let ModelOpt calibrate a layer and write it."""
    quantization = load()
    with _quiet(), torch.inference_mode():
        from modelopt.torch.export import export_hf_checkpoint

        config = getattr(quantization, CONFIGS[to])
        changed = quantization.quantize(layer.model, config, lambda _: layer.forward())
        export_hf_checkpoint(changed, export_dir=folder)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without ModelOpt's notes and transformers' bars, which would be there for each layer."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
