"""Simple preference optimisation, without a reference (arXiv 2405.14734, eq. 6):

L = -log sigma(beta [log pi(y_w|x) / |y_w| - log pi(y_l|x) / |y_l|] - gamma).

gamma is the paper's, as TRL's `simpo_gamma`, and not the ratio gamma / beta that the paper tunes.
Defaults are the paper's (beta 2, ratio 0.5); TRL has CPO's beta of 0.1.
"""

import torch.nn.functional as F
from torch import Tensor

from moetrain.config.method import SimpoMethod
from moetrain.methods.base import Known, Method, Metrics, Out, Terms
from moetrain.methods.pairs import (
    CHOSEN,
    REJECTED,
    answer_metrics,
    answers,
    count_pairs,
    reward_metrics,
)
from moetrain.ops.packed import Packed


def simpo_loss(chosen: Tensor, rejected: Tensor, beta: float, gamma: float) -> Tensor:
    """[m] from mean log-probs [m]."""
    return -F.logsigmoid(beta * (chosen - rejected) - gamma)


def loss(out: Out, batch: Packed, cfg: SimpoMethod, known: Known) -> tuple[Terms, Metrics]:
    """The loss of all pairs; rewards are beta times the mean log-probs."""
    chosen, rejected = answers(out, batch, CHOSEN), answers(out, batch, REJECTED)
    metrics = reward_metrics(cfg.beta * chosen.mean, cfg.beta * rejected.mean)
    metrics |= answer_metrics(out, batch, chosen, rejected)
    return {"loss": simpo_loss(chosen.mean, rejected.mean, cfg.beta, cfg.gamma).sum()}, metrics


SIMPO = Method("simpo", loss, count_pairs, frozenset({"logp", "entropy"}))
