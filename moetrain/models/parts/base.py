"""What all parts have in common."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

from moetrain.models.rules import Weight


@dataclass(frozen=True)
class Split:
    """A size that ranks along an axis of the mesh share: the axis must divide it."""

    axis: Literal["tp", "ep", "etp"]
    size: int
    what: str  # in the plural
    either_way: bool = False  # or be a multiple of it


@dataclass(frozen=True)
class Shares:
    """What one rank holds of a token's values: the ranks that share them, and their size."""

    tp: int
    etp: int
    sequence: int  # ranks that share the tokens between the matrices: tp, or 1 without sp
    width: int  # bytes of a value


class Part(Protocol):
    """A part of a layer, or what stands before and after the layers."""

    def weights(self) -> Iterator[Weight]:
        """Its parameters, by names relative to the layer."""
        ...

    def splits(self) -> Iterator[Split]:
        """What a layout has to divide."""
        ...

    def flops(self, num_tokens: int, num_pairs: int) -> int:
        """Floating-point operations of a forward pass in matrix products, two a multiply-add, for
        tokens that attend to `num_pairs` (query, key) pairs together.
        """
        ...

    def activations(self, shares: Shares) -> float:
        """Bytes that a rank keeps of one token from the forward pass to the backward pass, at
        most: no scores of attention, which no kernel keeps; balanced routing.
        """
        ...
