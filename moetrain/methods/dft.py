"""Dynamic fine-tuning: L = -sum_t sg(p_t) log p_t / sum_t m_t (arXiv 2508.05629, eq. 9).

A token's loss is weighted by its own probability, through which no gradient flows: the 1/p that
makes plain fine-tuning chase unlikely tokens cancels.
"""

from moetrain.methods.base import Known, Method, Metrics, Out, Terms, count_tokens
from moetrain.ops.packed import Packed


def loss(out: Out, batch: Packed, cfg: object, known: Known) -> tuple[Terms, Metrics]:
    """Weighted negative log-likelihood, summed over the tokens that the mask keeps."""
    p = out.logp.detach().exp()
    total = -(p * out.logp * batch.loss_mask).sum()
    return {"loss": total}, {"token_prob": ((p * batch.loss_mask).sum(), batch.loss_mask.sum())}


DFT = Method("dft", loss, count_tokens)
