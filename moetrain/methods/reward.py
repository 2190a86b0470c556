"""A reward model after Bradley and Terry (arXiv 2203.02155, eq. 1), from a scalar head at the last
token of each answer:

L = -log sigma(r_w - r_l - margin) + c (r_w + r_l)^2, the second term being optional; it keeps the
rewards centred on 0 (arXiv 2312.09244, eq. 2).
"""

import torch.nn.functional as F
from torch import Tensor

from moetrain.config.method import RewardMethod
from moetrain.methods.base import Known, Method, Metrics, Out, Terms
from moetrain.methods.pairs import CHOSEN, REJECTED, count_pairs, reward_metrics
from moetrain.ops.packed import Packed


def scores(out: Out, batch: Packed, role: int) -> Tensor:
    """[m]: the scalar at the last token of each answer of `role`."""
    assert out.value is not None, "the model has no scalar head"
    last = (batch.cu_seqlens[1:].long() - 1).to(out.value.device)
    return out.value[last][batch.extras["role"] == role]


def loss(out: Out, batch: Packed, cfg: RewardMethod, known: Known) -> tuple[Terms, Metrics]:
    """The loss of all pairs."""
    chosen, rejected = scores(out, batch, CHOSEN), scores(out, batch, REJECTED)
    gap = chosen - rejected
    if "margin" in batch.extras:
        gap = gap - batch.extras["margin"][batch.extras["role"] == CHOSEN]
    losses = -F.logsigmoid(gap) + cfg.center_rewards * (chosen + rejected).square()
    return {"loss": losses.sum()}, reward_metrics(chosen, rejected)


REWARD = Method("reward", loss, count_pairs, frozenset({"value"}))
