"""Trained weights put aside on the host, and lent back for a while: a reference model without a
second one on the device.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from moetrain.engine.model import PackedGPT
from moetrain.engine.optim import gathered

Weights = Mapping[str, Tensor]
"""This rank's trained parameters by chunk and name, on the host."""


def snapshot(chunks: Sequence[PackedGPT], wrapped: Sequence[Any]) -> Weights:
    """What is trained as it is now; an adapter alone, where there is one."""
    with gathered(wrapped):
        return {name: p.data.to("cpu", copy=True) for name, p in _trained(chunks)}


@contextmanager
def as_before(
    chunks: Sequence[PackedGPT], wrapped: Sequence[Any], weights: Weights
) -> Iterator[None]:
    """Meanwhile the trained weights are `weights`. Only forward passes may run in here."""
    now = snapshot(chunks, wrapped)
    _put(chunks, wrapped, weights)
    try:
        yield
    finally:
        _put(chunks, wrapped, now)


def mixed(before: Weights, now: Weights, alpha: float) -> Weights:
    """(1 - alpha) before + alpha now, taken in fp32."""
    return {
        name: old.float().lerp_(now[name].float(), alpha).to(old.dtype)
        for name, old in before.items()
    }


def named_values(
    chunk: PackedGPT, number: int, values: Weights | None
) -> Iterator[tuple[str, Tensor]]:
    """The parameters of chunk `number` by name; with `values` those of the snapshot, which has no
    others.
    """
    for name, param in chunk.named_parameters():
        if values is None:
            yield name, param
        elif f"{number}.{name}" in values:
            yield name, values[f"{number}.{name}"]


def _put(chunks: Sequence[PackedGPT], wrapped: Sequence[Any], weights: Weights) -> None:
    with gathered(wrapped):
        for name, param in _trained(chunks):
            param.data.copy_(weights[name])


def _trained(chunks: Sequence[PackedGPT]) -> Iterator[tuple[str, Any]]:
    for number, chunk in enumerate(chunks):
        for name, param in chunk.named_parameters():
            if param.requires_grad:
                yield f"{number}.{name}", param
