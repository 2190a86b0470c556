"""The supervised part of CHORD: L = -sum_t sg(phi(p_t)) log p_t / sum_t m_t with phi(p) = p (1 - p)
(arXiv 2508.11408, eq. 7).

Tokens that the model is sure of, and those it finds absurd, count for little.
"""

from moetrain.methods.base import Known, Method, Metrics, Out, Terms, count_tokens
from moetrain.ops.packed import Packed


def loss(out: Out, batch: Packed, cfg: object, known: Known) -> tuple[Terms, Metrics]:
    """Weighted negative log-likelihood, summed over the tokens that the mask keeps."""
    p = out.logp.detach().exp()
    total = -(p * (1 - p) * out.logp * batch.loss_mask).sum()
    return {"loss": total}, {"token_prob": ((p * batch.loss_mask).sum(), batch.loss_mask.sum())}


CHORD_SFT = Method("chord_sft", loss, count_tokens)
