"""Comparing two Hugging Face folders tensor by tensor, one pair in memory at a time."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from moetrain.errors import ConfigError
from moetrain.families import family_of
from moetrain.weights.reader import SafetensorsReader


@dataclass(frozen=True)
class Difference:
    """One tensor that is not the same in both folders."""

    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


def compare(a: Path, b: Path) -> Iterator[Difference]:
    """Yield a Difference for every tensor that is missing on a side or differs in shape, dtype or
    any value. Fused experts are compared with those of a folder that has them one by one.
    """
    first, second = _reader(a), _reader(b)
    names = set(first.names()) | set(second.names())
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
            if not torch.equal(x, y):
                gap = (x.double() - y.double()).abs()
                share = (x != y).double().mean().item()
                yield Difference(
                    name, f"{share:.2%} of values differ, by up to {gap.max().item():.3g}"
                )


def _reader(folder: Path) -> SafetensorsReader:
    """With per-expert names where config.json names a known architecture."""
    config = folder / "config.json"
    try:
        hf = json.loads(config.read_text()) if config.is_file() else {}
        family = family_of(hf)
        return SafetensorsReader(folder, family, family.dims(hf))
    except (ConfigError, ValueError):
        return SafetensorsReader(folder)
