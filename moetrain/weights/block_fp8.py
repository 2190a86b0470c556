"""FP8 in blocks of 128 x 128, as DeepSeek's and Qwen's checkpoints have it and vLLM serves it: a
weight in e4m3 and, for each block, what its numbers are multiplied by. Activations are quantised
while it runs, so nothing has to be calibrated.
"""

from collections.abc import Collection
from math import ceil
from typing import Any

import torch
from torch import Tensor

from moetrain.errors import WeightsError
from moetrain.models import Model
from moetrain.weights.reader import Reader, Slices

BLOCK = 128
FP8 = torch.float8_e4m3fn
LARGEST = 448.0  # of e4m3
RUN = 8  # rows of blocks that are in memory at a time while scales are made
SCALES = "_scale_inv"
_QUANTISED = ("attention", "mlp", "experts")


def quantised_names(model: Model) -> list[str]:
    """The matrices that quantisation takes, by Hugging Face name: routers, embeddings, heads, norms
    and biases stay as they are.
    """
    rules = [rule for rule in model.table.values() if rule.adapts in _QUANTISED]
    return [key for rule in rules for key in rule.hf if key.endswith(".weight")]


def plain_modules(model: Model) -> list[str]:
    """The linear layers that stay as they are, as vLLM and transformers ask for them by name."""
    taken = set(quantised_names(model))
    keys = [key for rule in model.table.values() if len(rule.hf_shapes[0]) == 2 for key in rule.hf]
    keys = [key for key in keys if key not in taken and "embed_tokens" not in key]
    names = [key.removesuffix(".weight") for key in keys if key.endswith(".weight")]
    return list(dict.fromkeys(["lm_head", *names]))  # a tied one too: vLLM asks for it by name


def config_of(model: Model) -> dict[str, Any]:
    """What config.json says of such a checkpoint, under `quantization_config`."""
    return {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "modules_to_not_convert": plain_modules(model),
        "quant_method": "fp8",
        "weight_block_size": [BLOCK, BLOCK],
    }


def check_apart(model: Model) -> None:
    """WeightsError for experts that are one tensor in the files: their formats are others."""
    name = next((rule.fused for rule in model.table.values() if rule.interleaved), None)
    if name is not None:
        raise WeightsError(
            f"{name} holds all experts as one tensor, which is not quantised here. Serve the model"
            f" as it is, in bf16."
        )


def check_servable(model: Model) -> None:
    """WeightsError for a weight that vLLM 0.32 joins with others and whose rows blocks do not
    divide: it refuses such a checkpoint.
    """
    check_apart(model)
    for rule in model.table.values():
        shapes = rule.hf_shapes
        joined = shapes if rule.adapts == "experts" else shapes[:-1]
        for key, shape in zip(rule.hf, joined, strict=False):
            if rule.adapts in _QUANTISED and len(rule.hf) > 1 and shape[0] % BLOCK:
                raise WeightsError(
                    f"{key} has {shape[0]} rows, which blocks of {BLOCK} do not divide, and vLLM"
                    f" would refuse it. Take --to fp8, which has one scale for a weight."
                )


class BlockFp8:
    """The tensors of `base`, those of `names` in FP8, and their scales. Any slice, at the cost of
    reading the blocks that it meets.
    """

    def __init__(self, base: Reader, names: Collection[str]):
        self.base = base
        self._taken = frozenset(names)
        self._scales = {name + SCALES: name for name in names}

    def __str__(self) -> str:
        return str(self.base)

    def names(self) -> Collection[str]:
        return {*self.base.names(), *self._scales}

    def shape(self, name: str) -> tuple[int, ...]:
        if name in self._scales:
            return tuple(ceil(n / BLOCK) for n in self.base.shape(self._scales[name]))
        return self.base.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        if name in self._scales:
            return torch.float32
        return FP8 if name in self._taken else self.base.dtype(name)

    def read(self, name: str, slices: Slices) -> Tensor:
        if name in self._scales:
            weight = self._scales[name]
            rows, columns = self.base.shape(weight)
            down, right = slices
            across = slice(right.start * BLOCK, min(right.stop * BLOCK, columns))
            runs = [torch.empty(0, right.stop - right.start)]
            for first in range(down.start, down.stop, RUN):
                stop = min(min(first + RUN, down.stop) * BLOCK, rows)
                met = (slice(first * BLOCK, stop), across)
                runs.append(self._blocks(weight, met)[1])
            return torch.cat(runs)
        if name not in self._taken:
            return self.base.read(name, slices)
        met = tuple(
            slice(cut.start // BLOCK * BLOCK, min(ceil(cut.stop / BLOCK) * BLOCK, size))
            for cut, size in zip(slices, self.base.shape(name), strict=True)
        )
        blocks, scales = self._blocks(name, met)
        blocks /= scales[:, None, :, None]
        values = blocks.clamp_(-LARGEST, LARGEST).flatten(2).flatten(0, 1)
        return values[tuple(slice(cut.start - wide.start, cut.stop - wide.start)
                            for cut, wide in zip(slices, met, strict=True))].to(FP8)  # fmt: skip

    def _blocks(self, name: str, slices: Slices) -> tuple[Tensor, Tensor]:
        blocks, scales = blocks_of(self.base.read(name, slices))
        if not scales.isfinite().all():
            raise WeightsError(f"{self.base}: {name} has values that are not finite. Train again.")
        return blocks, scales


def blocks_of(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(values [r, 128, c, 128] fp32, zero where the last blocks have none, scales [r, c]) of rows
    and columns that begin at a block's.
    """
    rows, columns = weight.shape
    down, right = ceil(rows / BLOCK), ceil(columns / BLOCK)
    padded = torch.zeros(down * BLOCK, right * BLOCK)
    padded[:rows, :columns] = weight
    blocks = padded.view(down, BLOCK, right, BLOCK)
    scales = blocks.abs().amax(3).amax(1) / LARGEST  # far quicker than both at once
    scales[scales == 0] = 1.0
    return blocks, scales
