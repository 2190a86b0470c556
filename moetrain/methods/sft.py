"""Supervised fine-tuning: next-token prediction on the assistant's tokens, every one of them with
the same weight.

The mean is over the tokens of the global batch and not over sequences: a long answer counts for
more than a short one.
"""

from moetrain.methods.base import Known, Method, Metrics, Out, Terms, count_tokens
from moetrain.ops.packed import Packed


def loss(out: Out, batch: Packed, cfg: object, known: Known) -> tuple[Terms, Metrics]:
    """Negative log-likelihood summed over the assistant's tokens (those that the mask keeps)."""
    return {"loss": -(out.logp * batch.loss_mask).sum()}, {}


SFT = Method("sft", loss, count_tokens)
