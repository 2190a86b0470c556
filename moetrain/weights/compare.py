"""Comparing two Hugging Face folders tensor by tensor, one pair in memory at a time."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from moetrain.errors import ConfigError
from moetrain.models import Model, read_model
from moetrain.models.lookup import read_mapping
from moetrain.models.rules import EMBEDDING, HEAD
from moetrain.weights.reader import Aliased, Reader, SafetensorsReader

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Difference:
    """One tensor that is not the same in both folders."""

    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


def compare(a: Path, b: Path) -> Iterator[Difference]:
    """Yield a Difference for every tensor that is missing on a side or differs in shape, dtype or
    any bit. Fused experts are compared with those of a folder that has them one by one, a tied
    model's embedding with an lm_head of the other, and what no parameter is made of (old rotary
    buffers) may be on one side alone.
    """
    (first, model), (second, other) = _reader(a), _reader(b)
    ignored, also_ignored = (m.ignored_keys if m else frozenset[str]() for m in (model, other))
    first, second = _with_head(first, model, second), _with_head(second, other, first)
    names = set(first.names()) | set(second.names())
    names -= (ignored | also_ignored) & (set(first.names()) ^ set(second.names()))
    for name in sorted(names):
        if name not in second.names():
            yield Difference(name, f"only in {a}")
        elif name not in first.names():
            yield Difference(name, f"only in {b}")
        elif first.shape(name) != second.shape(name):
            yield Difference(
                name, f"shape {list(first.shape(name))} against {list(second.shape(name))}"
            )
        elif first.dtype(name) != second.dtype(name):
            yield Difference(name, f"{first.dtype(name)} against {second.dtype(name)}")
        else:
            whole = tuple(slice(0, size) for size in first.shape(name))
            x, y = first.read(name, whole), second.read(name, whole)
            differ = _bits(x) != _bits(y)
            if differ.any():
                gap = (x.flatten()[differ].double() - y.flatten()[differ].double()).abs().max()
                share = differ.double().mean().item()
                yield Difference(name, f"{share:.2%} of values differ, by up to {gap.item():.3g}")


def _with_head(own: Reader, model: Model | None, other: Reader) -> Reader:
    """A tied model with its embedding as lm_head too, where the other one has an lm_head."""
    held = own.names()
    if model is None or not model.heads.tied or HEAD in held or HEAD not in other.names():
        return own
    return Aliased(own, {HEAD: EMBEDDING})


def _bits(x: Tensor) -> Tensor:
    """Values as integers, flat: NaN equals NaN there, and 0 is not -0."""
    return x.flatten().view(_INTEGERS[x.element_size()])


def _reader(folder: Path) -> tuple[Reader, Model | None]:
    """With per-expert names where config.json names a known architecture, and then the model."""
    config = folder / "config.json"
    try:
        hf = read_mapping(config) if config.is_file() else {}
        model = read_model(hf)
    except ConfigError:
        return SafetensorsReader(folder), None
    return SafetensorsReader(folder, model), model
