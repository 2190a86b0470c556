"""What a training method is: a pure function from token log-probs to a sum, and the count that the
sum is divided by.

Legend: t tokens of the batch, n sequences. A method returns sums; the engine divides them once by
the count over all ranks and micro-batches, so that accumulation, data and context parallelism and
packing cannot change the result. Methods never import megatron.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from moetrain.ops.packed import Packed

Reduce = Callable[[Tensor], Tensor]
"""Sums a per-sequence tensor `[n]` over the ranks that share the batch's sequences (context
parallelism); differentiable.
"""

Metrics = dict[str, tuple[Tensor, Tensor]]
"""name -> (sum, count), both scalars; reported as the global sum over the global count."""


@dataclass(frozen=True)
class Out:
    """What the model gives for a batch, aligned with its labels."""

    logp: Tensor  # [t] fp32, log-prob of each label
    entropy: Tensor | None = None  # [t] fp32, no gradient; present for methods that need it


@dataclass(frozen=True)
class Method:
    """A training method.

    loss(out, batch, cfg, reduce) -> (sum, metrics): fp32 scalar that is minimised, and metrics as
    (sum, count). count(batch, cfg) -> fp32 scalar: what the sum is divided by. A function of the
    batch alone, so that the engine knows the global count before the first backward.
    """

    name: str
    loss: Callable[[Out, Packed, Any, Reduce], tuple[Tensor, Metrics]]
    count: Callable[[Packed, Any], Tensor]
    needs: frozenset[str] = frozenset({"logp"})


def count_tokens(batch: Packed, cfg: object) -> Tensor:
    """Number of tokens that the loss mask keeps, fp32 scalar."""
    return batch.loss_mask.sum()
