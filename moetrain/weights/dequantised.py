"""Quantised checkpoints read as plain ones, by slice.

transformers 5.19 is no reference here: where blocks do not divide a weight its values are wrong,
without an error.
"""

from collections.abc import Collection
from math import ceil, prod
from pathlib import Path

import torch
from torch import Tensor

from moetrain.errors import WeightsError
from moetrain.models import Model
from moetrain.models.lookup import HF, read_mapping
from moetrain.models.quantisation import KEY, MXFP4, Quantisation, read_quantisation
from moetrain.weights.mxfp4 import Mxfp4, unpacked
from moetrain.weights.reader import Reader, SafetensorsReader, Slices

MODELOPT = "hf_quant_config.json"
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
SECOND = "_2"  # the one scale over all scales of a weight, in NVFP4
# What stands beside quantised weights for activations and the cache of keys and values.
_INPUTS = ("input_scale", "input_global_scale", "k_scale", "v_scale", "output_scale")


def open_weights(folder: Path, model: Model | None = None) -> Reader:
    """The weights of a Hugging Face folder, dequantised where its config.json says that they are
    quantised.

    Raises:
        ConfigError: they are quantised in a way that is not read here.
        WeightsError: as `SafetensorsReader` and `Dequantised`.
    """
    stored = SafetensorsReader(folder, model)
    how = quantisation_of(folder)
    if how == MXFP4 and model is not None:
        return Mxfp4(stored, model)
    if how is not None:
        return Dequantised(stored, how)
    bare = sorted(name for name in stored.names() if stored.dtype(name) in FP8)
    if bare and model is not None:
        raise WeightsError(
            f"{folder}: {bare[0]} is {stored.dtype(bare[0])} and {HF} has no {KEY}, which says what"
            f" its numbers stand for. Restore {HF}, or take the checkpoint that it was made from."
        )
    return stored


def quantisation_of(folder: Path) -> Quantisation | None:
    """As config.json says or, beside ModelOpt's older checkpoints, a file of its own."""
    config, modelopt = folder / HF, folder / MODELOPT
    hf = read_mapping(config) if config.is_file() else {}
    if hf.get(KEY) is None and modelopt.is_file():
        hf = {KEY: read_mapping(modelopt)}
    return read_quantisation(hf)


class Dequantised:
    """The tensors of `base`, those that have scales multiplied by them.

    Args:
        dtype: of what was quantised; others keep theirs.

    Raises:
        WeightsError: a quantised weight without its scales, or with scales of another shape.
    """

    def __init__(self, base: Reader, how: Quantisation, dtype: torch.dtype = torch.bfloat16):
        self.base, self.how, self._dtype = base, how, dtype
        held = set(base.names())
        wanted = (torch.uint8,) if how.packed else FP8
        self._blocks: dict[str, tuple[int, int]] = {}  # what one scale stands for
        self._hidden: set[str] = set()
        for name in held:
            if not name.endswith(how.suffix) and base.dtype(name) in wanted:
                self._blocks[name] = self._block(name, held)
                stem = name.removesuffix("weight")
                self._hidden |= {name + how.suffix, name + how.suffix + SECOND}
                self._hidden |= {stem + word for word in _INPUTS}
        self._names = held - self._hidden

    def __str__(self) -> str:
        return str(self.base)

    def _block(self, name: str, held: set[str]) -> tuple[int, int]:
        scales = [name + self.how.suffix]
        if self.how.packed:
            scales.append(scales[0] + SECOND)
        for scale in scales:
            if scale not in held:
                raise WeightsError(
                    f"{self.base}: {name} is {self.base.dtype(name)}, and {scale} is not there."
                    f" Fetch the checkpoint again, or the one that it was made from."
                )
        top = self.base.shape(scales[-1])
        if self.how.packed and prod(top) != 1:
            raise WeightsError(
                f"{self.base}: {scales[-1]} is {list(top)}, and one number is wanted. Is {HF} the"
                f" one of these weights?"
            )
        shape = self._shape(name)
        given = self.base.shape(scales[0])
        rows, columns = (max(n, 1) for n in shape)
        choices = [self.how.block] if self.how.block else [(rows, columns), (1, columns)]
        for block in choices:
            counts = [ceil(n / b) for n, b in zip(shape, block, strict=True)]
            if [n for n in counts if n != 1] == [n for n in given if n != 1]:
                return block[0], block[1]
        raise WeightsError(
            f"{self.base}: {scales[0]} is {list(given)}, which is not {self.how.name} of"
            f" {list(shape)}. Is {HF} the one of these weights?"
        )

    def _shape(self, name: str) -> tuple[int, ...]:
        shape = self.base.shape(name)
        if len(shape) != 2:
            raise WeightsError(
                f"{self.base}: {name} is quantised and {list(shape)}; only matrices are read so."
                f" Take the checkpoint that it was made from."
            )
        return (shape[0], 2 * shape[1]) if self.how.packed else shape

    def names(self) -> Collection[str]:
        return self._names

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shape(name) if name in self._blocks else self.base.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return self._dtype if name in self._blocks else self.base.dtype(name)

    def read(self, name: str, slices: Slices) -> Tensor:
        if name not in self._blocks:
            return self.base.read(name, slices)
        values = self._values(name, slices)
        if not values.numel():
            return values.to(self._dtype)
        scales = self._scales(name, slices)
        for dim, (cut, size) in enumerate(zip(slices, self._blocks[name], strict=True)):
            if scales.shape[dim] > 1:
                of = torch.arange(cut.start, cut.stop) // size - cut.start // size
                scales = scales.index_select(dim, of)
        return values.mul_(scales).to(self._dtype)

    def _values(self, name: str, slices: Slices) -> Tensor:
        """[rows, columns] as stored, fp32."""
        if not self.how.packed:
            return self.base.read(name, slices).float()
        rows, columns = slices
        first, last = columns.start // 2, ceil(columns.stop / 2)
        packed = self.base.read(name, (rows, slice(first, last)))
        skipped = columns.start - 2 * first
        return unpacked(packed)[:, skipped : skipped + columns.stop - columns.start]

    def _scales(self, name: str, slices: Slices) -> Tensor:
        """One a block that the slice meets, fp32; [1] along a dimension that one block spans."""
        scale = name + self.how.suffix
        met = [slice(cut.start // size, ceil(cut.stop / size))
               for cut, size in zip(slices, self._blocks[name], strict=True)]  # fmt: skip
        counts = [ceil(n / b) for n, b in zip(self._shape(name), self._blocks[name], strict=True)]
        many = iter([cut for cut, count in zip(met, counts, strict=True) if count > 1])
        stored = self.base.shape(scale)  # [r, c], or [r, 1, c, 1] as ModelOpt has it
        read = self.base.read(scale, tuple(next(many) if n > 1 else slice(0, 1) for n in stored))
        weight = read.float().reshape([cut.stop - cut.start for cut in met])
        if self.how.packed:
            top = self.base.shape(scale + SECOND)
            weight = (
                weight * self.base.read(scale + SECOND, tuple(slice(0, n) for n in top)).float()
            )
        return weight
