"""Group sequence policy optimisation (arXiv 2507.18071, eq. 5): one ratio for a whole answer,

L = -mean over answers of w min(s A, clip(s, 1 - low, 1 + high) A),
s = (pi(y|x) / pi_old(y|x))^(1/|y|).

A mixture of experts routes some tokens anew after every update; their ratios average out in s.
"""

from moetrain.config.online import GspoMethod
from moetrain.methods.base import Known, Method, Metrics, Online, Out, Terms
from moetrain.methods.grpo import NEEDS, count_answers
from moetrain.methods.online import (
    broadcast_advantage,
    clipped,
    lengths,
    loss_kl,
    normalised,
    online_metrics,
    sequence_ratio,
    spread,
    tokens_of,
    truncated,
)
from moetrain.ops.packed import ANSWER, Packed
from moetrain.ops.segment import segment_sum


def loss(out: Out, batch: Packed, cfg: GspoMethod, known: Known) -> tuple[Terms, Metrics]:
    """Each answer counts the same; a KL to the reference is a mean over its tokens."""
    own = tokens_of(out, batch, cfg)
    size = lengths(batch, own.mask)
    ratio = sequence_ratio(out, batch, own.mask)
    weight = segment_sum(own.weight, batch.cu_seqlens) / size
    losses = weight * clipped(ratio, batch.extras["advantage"], cfg)
    if cfg.beta:
        kl = segment_sum(loss_kl(out, batch, cfg, own), batch.cu_seqlens)
        losses = losses + cfg.beta * kl / size
    is_answer = (batch.extras["role"] == ANSWER).float()
    seen = type(own)(own.mask, spread(batch, ratio) * own.mask, own.advantage, own.weight)
    return {"loss": (losses * is_answer).sum()}, online_metrics(out, batch, cfg, seen)


GSPO = Method(
    "gspo",
    loss,
    count_answers,
    NEEDS,
    online=Online(normalised, targets=broadcast_advantage, truncated=truncated),
)
