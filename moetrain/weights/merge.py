"""An adapter put into its base: the tensors of a plain model, by slice."""

from collections.abc import Collection
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from moetrain.errors import WeightsError
from moetrain.models import read_model, with_scalar_head
from moetrain.models.adapter import SUFFIX
from moetrain.weights.adapter_init import InitialAdapter, Residual, adapted, whole
from moetrain.weights.folder import ADAPTER, ADAPTER_WEIGHTS
from moetrain.weights.opening import Opened
from moetrain.weights.peft_config import read_config
from moetrain.weights.peft_reader import PeftReader
from moetrain.weights.peft_writer import HEAD
from moetrain.weights.reader import Reader, ReaderRows, RowsReader, Slices


def merged(source: Opened, adapter: Path) -> Opened:
    """A model with the PEFT folder `adapter` in it. Raises WeightsError: it is of another base."""
    hf, model = source.hf, source.model
    if read_config(adapter / ADAPTER).scalar_head and not model.heads.scalar:
        hf = with_scalar_head(hf)
        model = read_model(hf)
    reader = RowsReader(source.rows)
    peft = PeftReader(adapter, model, reader)
    if model.heads.scalar and peft.head is None and HEAD not in reader.names():
        raise WeightsError(f"Neither {source.folder} nor {adapter} has {HEAD}, the model's head.")
    return replace(
        source,
        hf=hf,
        model=model,
        rows=ReaderRows(Merged(reader, peft)),
        files=(*source.files, adapter / ADAPTER, adapter / ADAPTER_WEIGHTS),
        adapter=adapter,
    )


class Merged:
    """W + s B A where there is an adapter (with DoRA at its magnitude), made in fp32, in the base's
    dtype; a scalar head in its own.
    """

    def __init__(self, base: Reader, adapter: PeftReader):
        table = adapter.table
        if not table.spec.starts_at_base:  # the adapter is one for W - s B0 A0
            base = Residual(base, InitialAdapter(base, table, 0))
        self.base, self.adapter = base, adapter
        self._places = adapted(table)
        self._head = adapter.head
        self._names = frozenset(table.model.hf_names)
        # An expert's matrices are asked for one after the other, in many slices.
        self._whole = lru_cache(maxsize=4)(lambda name: whole(adapter, name).float())

    def __str__(self) -> str:
        return f"{self.base} with {self.adapter}"

    def names(self) -> Collection[str]:
        return self._names

    def shape(self, name: str) -> tuple[int, ...]:
        if name == HEAD and self._head is not None:
            return tuple(self._head.shape)
        return self.base.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        if name == HEAD and self._head is not None:
            return self._head.dtype
        return self.base.dtype(name)

    def read(self, name: str, slices: Slices) -> Tensor:
        if name == HEAD and self._head is not None:
            return self._head[slices]
        if name not in self._places:
            return self.base.read(name, slices)
        rows = slices[0]
        # All columns: a row's norm counts them, and sums of parts would differ in their last bits.
        w = self.base.read(name, (rows, slice(0, self.shape(name)[1])))
        dtype, stem, spec = w.dtype, name.removesuffix(".weight"), self.adapter.table.spec
        a = self._whole(self._places[name][0].name + SUFFIX["lora_A"])
        b = self._whole(stem + SUFFIX["lora_B"])[rows]
        w = w.float() + spec.scale * (b @ a)
        if spec.dora:
            magnitude = self._whole(stem + SUFFIX["lora_magnitude"])[rows]
            w *= (magnitude / w.norm(dim=1))[:, None]
        w = w.to(dtype)
        if not w.isfinite().all():
            raise WeightsError(
                f"{self}: {name} has values that are not finite. Give an earlier adapter."
            )
        return w[:, slices[1]]
