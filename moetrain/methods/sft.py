"""Supervised fine-tuning: next-token prediction on the assistant's tokens, every one of them with
the same weight.

The mean is over the tokens of the global batch and not over sequences: a long answer counts for
more than a short one.
"""

from torch import Tensor

from moetrain.methods.base import Method, Metrics, Out, Reduce, count_tokens
from moetrain.ops.packed import Packed


def loss(out: Out, batch: Packed, cfg: object, reduce: Reduce) -> tuple[Tensor, Metrics]:
    """Negative log-likelihood summed over the assistant's tokens (those that the mask keeps)."""
    return -(out.logp * batch.loss_mask).sum(), {}


SFT = Method("sft", loss, count_tokens)
