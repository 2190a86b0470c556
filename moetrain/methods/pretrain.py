"""Next-token prediction on plain text: L = -sum_t m_t log p(x_{t+1} | x_{<=t}) / sum_t m_t."""

from moetrain.methods.base import Known, Method, Metrics, Out, Terms, count_tokens
from moetrain.ops.packed import Packed


def loss(out: Out, batch: Packed, cfg: object, known: Known) -> tuple[Terms, Metrics]:
    """Negative log-likelihood summed over the tokens that the mask keeps."""
    return {"loss": -(out.logp * batch.loss_mask).sum()}, {}


PRETRAIN = Method("pretrain", loss, count_tokens)
# Continued pretraining is the same objective; what differs is where the weights come from.
CPT = Method("cpt", loss, count_tokens)
