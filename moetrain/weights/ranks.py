"""What moving weights asks of a world of ranks; the engine's World is one."""

from typing import Protocol, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class Ranks(Protocol):
    """Ranks that call in the same order."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    @property
    def device(self) -> torch.device:
        """Where tensors lie that the ranks send each other."""
        ...

    def gather(self, value: T) -> list[T]:
        """Every rank's value, on every rank."""
        ...

    def share(self, value: T, source: int = 0) -> T:
        """What rank `source` gives, on every rank."""
        ...

    def broadcast(self, values: Tensor, source: int) -> Tensor:
        """What rank `source` has, in `values`, which is contiguous."""
        ...

    def transfer(self, values: Tensor, source: int, target: int) -> Tensor:
        """What rank `source` has, in rank `target`'s `values`; others take no part."""
        ...


class Alone:
    """One process."""

    rank, size, device = 0, 1, torch.device("cpu")

    def gather(self, value: T) -> list[T]:
        return [value]

    def share(self, value: T, source: int = 0) -> T:
        return value

    def broadcast(self, values: Tensor, source: int) -> Tensor:
        return values

    def transfer(self, values: Tensor, source: int, target: int) -> Tensor:
        return values


ALONE = Alone()
