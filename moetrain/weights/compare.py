"""Comparing two Hugging Face folders tensor by tensor, one pair in memory at a time."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from moetrain.errors import ConfigError
from moetrain.families import family_of, ignored_keys
from moetrain.weights.reader import SafetensorsReader

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
    any bit. Fused experts are compared with those of a folder that has them one by one, and what no
    parameter is made of (a tied model's lm_head, old rotary buffers) may be on one side alone.
    """
    first, ignored = _reader(a)
    second, also_ignored = _reader(b)
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


def _bits(x: Tensor) -> Tensor:
    """Values as integers, flat: NaN equals NaN there, and 0 is not -0."""
    return x.flatten().view(_INTEGERS[x.element_size()])


def _reader(folder: Path) -> tuple[SafetensorsReader, frozenset[str]]:
    """With per-expert names where config.json names a known architecture, and then the names that
    may be missing.
    """
    config = folder / "config.json"
    try:
        hf = json.loads(config.read_text()) if config.is_file() else {}
        family = family_of(hf)
        dims = family.dims(hf)
    except (ConfigError, ValueError):
        return SafetensorsReader(folder), frozenset()
    return SafetensorsReader(folder, family, dims), ignored_keys(dims)
