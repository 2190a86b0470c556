"""Next-token prediction on plain text: L = -sum_t m_t log p(x_{t+1} | x_{<=t}) / sum_t m_t."""

from torch import Tensor

from moetrain.methods.base import Method, Metrics, Out, Reduce, count_tokens
from moetrain.ops.packed import Packed


def loss(out: Out, batch: Packed, cfg: object, reduce: Reduce) -> tuple[Tensor, Metrics]:
    """Negative log-likelihood summed over the tokens that the mask keeps."""
    return -(out.logp * batch.loss_mask).sum(), {}


PRETRAIN = Method("pretrain", loss, count_tokens)
# Continued pretraining is the same objective; what differs is where the weights come from.
CPT = Method("cpt", loss, count_tokens)
