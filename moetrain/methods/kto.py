"""Kahneman-Tversky optimisation, from answers that are good or bad, not paired (arXiv 2402.01306,
eq. 8): with r = log pi(y|x) - log ref(y|x),

L = lambda_D (1 - sigma(beta (r - z))) where y is desirable, lambda_U (1 - sigma(beta (z - r)))
where not, and z = max(0, mean of r over answers to other prompts), without a gradient.

z is one number for the global batch: it is estimated before the step from the mismatched answers.
apo_zero_unpaired has none (APO, arXiv 2408.06266, eq. 7 for single answers, as TRL has it):
1 - sigma(beta r) where y is desirable, sigma(beta r) where not. That is KTO's with z = 0.
"""

import torch
from torch import Tensor

from moetrain.config.method import KtoMethod
from moetrain.methods.base import Estimate, Known, Method, Metrics, Out, Terms
from moetrain.methods.pairs import (
    CHOSEN,
    MISMATCHED,
    REJECTED,
    answer_metrics,
    answers,
    num_of,
    total,
)
from moetrain.ops.packed import Packed


def kto_loss(ratio: Tensor, z: float, beta: float, *, desirable: bool) -> Tensor:
    """[m] -> [m]."""
    return 1 - torch.sigmoid(beta * (ratio - z if desirable else z - ratio))


def estimates(cfg: KtoMethod) -> bool:
    """Whether there is a reference point to estimate."""
    return cfg.loss_type == "kto"


def select(batch: Packed, cfg: KtoMethod) -> Tensor:
    """[n] bool: the mismatched answers."""
    return batch.extras["role"] == MISMATCHED


def values(out: Out, batch: Packed, cfg: KtoMethod) -> Metrics:
    """Their mean log-ratio."""
    return {"kl": total(answers(out, batch, MISMATCHED).ratio)}


def loss(out: Out, batch: Packed, cfg: KtoMethod, known: Known) -> tuple[Terms, Metrics]:
    """The weighted losses of all answers."""
    z = max(0.0, known["kl"]) if estimates(cfg) else 0.0
    good, bad = answers(out, batch, CHOSEN), answers(out, batch, REJECTED)
    losses = cfg.desirable_weight * kto_loss(good.ratio, z, cfg.beta, desirable=True).sum()
    losses += cfg.undesirable_weight * kto_loss(bad.ratio, z, cfg.beta, desirable=False).sum()
    right = torch.cat([good.ratio > z, bad.ratio < z]).float()
    metrics = answer_metrics(out, batch, good, bad) | {
        "rewards/chosen": total(cfg.beta * good.ratio),
        "rewards/rejected": total(cfg.beta * bad.ratio),
        "rewards/accuracies": total(right),
    }
    if estimates(cfg):
        metrics["kl"] = good.logp.new_tensor(z), good.logp.new_tensor(1.0)
    return {"loss": losses}, metrics


def count(batch: Packed, cfg: KtoMethod) -> Terms:
    """Number of answers."""
    return {"loss": num_of(batch, CHOSEN, REJECTED)}


KTO = Method(
    "kto",
    loss,
    count,
    frozenset({"logp", "entropy", "ref_logp"}),
    Estimate(select, values, estimates),
)
