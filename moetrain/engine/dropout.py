"""Where an adapter's dropout gets the keys of its tokens: from the table that goes through Megatron
with the hidden states, at every layer anew.
"""

import zlib
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from moetrain.ops.dropout import drop

# Keys go the way of hidden states to the experts, in pieces that any float holds exactly.
_PIECES, _BITS = 4, 16


@dataclass
class Draws:
    """The keys of the tokens that a layer has before it, set whenever it is called."""

    p: float
    tp_rank: int
    tp_size: int
    keys: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))  # [c]
    at_experts: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))

    def hear(self, layer: Any, args: Any, kwargs: dict[str, Any]) -> None:
        """A hook before a layer's forward, which recomputation calls too."""
        self.keys = kwargs["padding_mask"][0, 1]

    def of(self, x: Tensor) -> Tensor:
        """The keys of x [rows, 1, n], a sequence-parallel rank's share where it is one."""
        if x.size(0) == self.keys.numel():
            return self.keys
        return self.keys.chunk(self.tp_size)[self.tp_rank]


@dataclass(frozen=True)
class Dropout:
    """What stands before one A; `first` is the first of its columns here."""

    draws: Draws
    module: int
    first: int
    experts: bool = False

    def __call__(self, x: Tensor) -> Tensor:
        """x [rows, 1, n], of experts [rows, n]."""
        keys = self.draws.at_experts if self.experts else self.draws.of(x)
        return drop(x, keys, self.module, self.first, self.draws.p)


def number_of(name: str) -> int:
    """What tells one module from another, the same in every process."""
    return zlib.crc32(name.encode())


@torch.no_grad()
def dispatched(keys: Tensor, probs: Tensor, routing_map: Tensor, dispatcher: Any) -> Tensor:
    """keys [c] of this rank's tokens -> [rows] int64 of the rows that its experts get, by the steps
    that the hidden states take afterwards.
    """
    pieces = [(keys >> (_BITS * i)) & 0xFFFF for i in range(_PIECES)]
    columns = torch.stack(pieces, -1).float()[:, None]  # [c, 1, 4]
    moving = dispatcher.dispatch_preprocess(columns, routing_map, probs.detach())
    rows, *_ = dispatcher.dispatch_postprocess(*dispatcher.token_dispatch(*moving))
    shifts = _BITS * torch.arange(_PIECES, device=rows.device)
    return (rows.long() << shifts).sum(-1)
