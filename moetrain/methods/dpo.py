"""Direct preference optimisation and three of its kin, by what they make of one number a pair:

h = [log pi(y_w|x) - log ref(y_w|x)] - [log pi(y_l|x) - log ref(y_l|x)]

dpo: -log sigma(beta h) (arXiv 2305.18290, eq. 7), with label smoothing e:
-(1 - e) log sigma(beta h) - e log sigma(-beta h). ipo: (h - 1 / (2 beta))^2 (arXiv 2310.12036,
eq. 17), with log-probs a token as in TRL where the paper has sums. hinge: max(0, 1 - beta h) (SLiC,
arXiv 2305.10425, eq. 3). robust: [-(1 - e) log sigma(beta h) + e log sigma(-beta h)] / (1 - 2 e),
whose mean over labels of which a share e is flipped is dpo's on the right ones (rDPO, arXiv
2403.00409; dpo's smoothing has the other sign and no divisor).
"""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from moetrain.config.method import DpoMethod, HingeMethod, IpoMethod, RobustMethod
from moetrain.methods.base import Known, Method, Metrics, Out, Terms
from moetrain.methods.pairs import (
    CHOSEN,
    REJECTED,
    Answers,
    answer_metrics,
    answers,
    count_pairs,
    num_of,
    reward_metrics,
)
from moetrain.ops.packed import Packed

NEEDS = frozenset({"logp", "entropy", "ref_logp"})


def sigmoid_loss(h: Tensor, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """[m] -> [m]."""
    right, wrong = F.logsigmoid(beta * h), F.logsigmoid(-beta * h)
    return -(1 - label_smoothing) * right - label_smoothing * wrong


def ipo_loss(h: Tensor, beta: float) -> Tensor:
    """[m] -> [m]."""
    return (h - 1 / (2 * beta)).square()


def hinge_loss(h: Tensor, beta: float) -> Tensor:
    """[m] -> [m]."""
    return F.relu(1 - beta * h)


def robust_loss(h: Tensor, beta: float, label_smoothing: float) -> Tensor:
    """[m] -> [m]; below 0 for a pair that is far on the right side."""
    given, flipped = -F.logsigmoid(beta * h), -F.logsigmoid(-beta * h)
    share = label_smoothing
    return ((1 - share) * given - share * flipped) / (1 - 2 * share)


def _both(
    out: Out,
    batch: Packed,
    beta: float,
    per_pair: Callable[[Answers, Answers], Tensor],
) -> tuple[Tensor, Metrics]:
    """The summed loss of all pairs, and what there is to see."""
    chosen, rejected = answers(out, batch, CHOSEN), answers(out, batch, REJECTED)
    metrics = reward_metrics(beta * chosen.ratio, beta * rejected.ratio)
    metrics |= answer_metrics(out, batch, chosen, rejected)
    return per_pair(chosen, rejected).sum(), metrics


def dpo(out: Out, batch: Packed, cfg: DpoMethod, known: Known) -> tuple[Terms, Metrics]:
    """The sigmoid loss; with rpo_alpha also that much of the chosen answers' negative
    log-likelihood a token (RPO, arXiv 2404.19733, eq. 1).
    """

    def per_pair(chosen: Answers, rejected: Answers) -> Tensor:
        return sigmoid_loss(chosen.ratio - rejected.ratio, cfg.beta, cfg.label_smoothing)

    total, metrics = _both(out, batch, cfg.beta, per_pair)
    nll = -answers(out, batch, CHOSEN).logp.sum()
    return {"loss": total, "nll": cfg.rpo_alpha * nll}, metrics


def count_dpo(batch: Packed, cfg: DpoMethod) -> Terms:
    """Pairs, and the scored tokens of the chosen answers."""
    num_tokens = batch.loss_mask.new_zeros(())
    if num_of(batch, CHOSEN):
        zeros = batch.loss_mask.new_zeros(batch.num_tokens)
        num_tokens = answers(Out(logp=zeros), batch, CHOSEN).lengths.sum()
    return count_pairs(batch, cfg) | {"nll": num_tokens}


def ipo(out: Out, batch: Packed, cfg: IpoMethod, known: Known) -> tuple[Terms, Metrics]:
    """The squared loss."""

    def per_pair(chosen: Answers, rejected: Answers) -> Tensor:
        return ipo_loss(chosen.mean_ratio - rejected.mean_ratio, cfg.beta)

    total, metrics = _both(out, batch, cfg.beta, per_pair)
    return {"loss": total}, metrics


def hinge(out: Out, batch: Packed, cfg: HingeMethod, known: Known) -> tuple[Terms, Metrics]:
    """The hinge loss."""

    def per_pair(chosen: Answers, rejected: Answers) -> Tensor:
        return hinge_loss(chosen.ratio - rejected.ratio, cfg.beta)

    total, metrics = _both(out, batch, cfg.beta, per_pair)
    return {"loss": total}, metrics


def robust(out: Out, batch: Packed, cfg: RobustMethod, known: Known) -> tuple[Terms, Metrics]:
    """The sigmoid loss without the bias of flipped labels."""

    def per_pair(chosen: Answers, rejected: Answers) -> Tensor:
        return robust_loss(chosen.ratio - rejected.ratio, cfg.beta, cfg.label_smoothing)

    total, metrics = _both(out, batch, cfg.beta, per_pair)
    return {"loss": total}, metrics


DPO = Method("dpo", dpo, count_dpo, NEEDS)
IPO = Method("ipo", ipo, count_pairs, NEEDS)
HINGE = Method("hinge", hinge, count_pairs, NEEDS)
ROBUST = Method("robust", robust, count_pairs, NEEDS)
