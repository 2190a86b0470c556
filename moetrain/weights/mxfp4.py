"""MXFP4 as gpt-oss' checkpoints have it, read as bf16: experts in two tensors beside their biases,
`X_blocks` [experts, out, groups, 16], of which each byte has two numbers of 4 bits, and `X_scales`
[experts, out, groups], the power of two (less 127) that a group of 32 is multiplied by.
"""

from collections.abc import Collection

import numpy as np
import torch
from torch import Tensor

from moetrain.errors import WeightsError
from moetrain.models import Model
from moetrain.models.lookup import HF
from moetrain.models.rules import FusedSlice
from moetrain.weights.dtypes import as_rows
from moetrain.weights.reader import ByRows, SafetensorsReader
from moetrain.weights.rows import Bytes, row_bytes

BLOCKS, SCALES = "_blocks", "_scales"
GROUP = 32  # numbers with one scale
# What 4 bits stand for (e2m1), by their value.
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def unpacked(packed: Tensor) -> Tensor:
    """[..., n] bytes -> [..., 2 n] fp32, two numbers of a byte: the low half is the first."""
    return E2M1[torch.stack((packed & 15, packed >> 4), -1).flatten(-2).int()]


class Mxfp4(ByRows):
    """The tensors of `base`, a folder of `model`. Raises WeightsError for shapes that do not go
    together.
    """

    def __init__(self, base: SafetensorsReader, model: Model):
        self.base = base
        held = set(base.names())
        self._cuts: dict[str, FusedSlice] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        for rule in model.table.values():
            for key, shape in zip(rule.hf, rule.hf_shapes, strict=True):
                cut = model.fused_slices.get(key)
                if cut is not None and cut.interleaved and cut.key + BLOCKS in held:
                    self._cuts[key], self._shapes[key] = cut, shape
        self._check(model, held)
        packed = {cut.key + end for cut in self._cuts.values() for end in (BLOCKS, SCALES)}
        self._names = (held - packed) | self._cuts.keys()

    def _check(self, model: Model, held: Collection[str]) -> None:
        """That blocks and scales are of the shapes that the model's sizes ask for."""
        for key, cut in self._cuts.items():
            if cut.expert:
                continue
            out, into = self._shapes[key]
            wanted = (model.num_experts, out * cut.num_parts, -(-into // GROUP))
            for name, shape in ((cut.key + BLOCKS, (*wanted, 16)), (cut.key + SCALES, wanted)):
                if name not in held:
                    raise WeightsError(
                        f"{self.base}: {cut.key + BLOCKS} is there, and {name} is not. Fetch the"
                        f" checkpoint again."
                    )
                given, kind = self.base.shape(name), self.base.dtype_name(name)
                if given != shape or kind != "U8" or into % GROUP:
                    raise WeightsError(
                        f"{self.base}: {name} is {kind} {list(given)}, and {list(shape)} in U8 is"
                        f" wanted. Is {HF} the one of these weights?"
                    )

    def __str__(self) -> str:
        return str(self.base)

    def names(self) -> Collection[str]:
        return self._names

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name] if name in self._cuts else self.base.shape(name)

    def dtype_name(self, name: str) -> str:
        return "BF16" if name in self._cuts else self.base.dtype_name(name)

    def rows(self, name: str, start: int, stop: int) -> Bytes:
        cut = self._cuts.get(name)
        if cut is None:
            return self.base.rows(name, start, stop)
        out, into = self._shapes[name]
        if start == stop:
            return np.empty((0, row_bytes((out, into), "BF16")), np.uint8)
        num, groups = cut.num_parts, into // GROUP
        first = (cut.expert or 0) * out * num  # row of the expert, all parts in turn
        low, high = first + start * num, first + stop * num
        blocks = self.base.rows(cut.key + BLOCKS, low * groups, high * groups)
        scales = self.base.rows(cut.key + SCALES, low, high)[cut.part :: num]
        packed = torch.from_numpy(blocks.reshape(-1, groups, 16)[cut.part :: num].copy())
        powers = torch.from_numpy(scales.astype(np.int32)) - 127
        values = torch.ldexp(unpacked(packed), powers[..., None])
        return as_rows(values.to(torch.bfloat16).flatten(1))
