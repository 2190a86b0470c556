"""Odds-ratio preference optimisation, without a reference (arXiv 2403.07691, eq. 6):

L = L_NLL(y_w) - beta mean log sigma(log [odds(y_w|x) / odds(y_l|x)]), odds(y) = P(y) / (1 - P(y)),
where log P(y) is the mean log-prob a token. The two terms have counts of their own: tokens of the
chosen answers, and pairs. TRL's likelihood term also scores the prompt; the paper's does not.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from moetrain.config.method import OrpoMethod
from moetrain.methods.base import Known, Method, Metrics, Out, Terms
from moetrain.methods.pairs import (
    CHOSEN,
    REJECTED,
    answer_metrics,
    answers,
    num_of,
    reward_metrics,
    total,
)
from moetrain.ops.packed import Packed

# A short answer that the model is sure of rounds to P = 1, where the odds and their gradient are
# infinite, and 0 * inf is what would reach the weights. From here on the odds stay as they are.
SUREST = -1e-6


def log_odds_ratio(chosen: Tensor, rejected: Tensor) -> Tensor:
    """[m] from mean log-probs [m]."""

    def log_not(logp: Tensor) -> Tensor:  # log(1 - P)
        return torch.log(-torch.expm1(logp.clamp(max=SUREST)))

    return (chosen - rejected) - (log_not(chosen) - log_not(rejected))


def loss(out: Out, batch: Packed, cfg: OrpoMethod, known: Known) -> tuple[Terms, Metrics]:
    """Both terms; rewards are beta times the mean log-probs, as TRL has them."""
    chosen, rejected = answers(out, batch, CHOSEN), answers(out, batch, REJECTED)
    ratio = log_odds_ratio(chosen.mean, rejected.mean)
    metrics = reward_metrics(cfg.beta * chosen.mean, cfg.beta * rejected.mean)
    metrics |= answer_metrics(out, batch, chosen, rejected) | {"log_odds_ratio": total(ratio)}
    terms = {"nll": -chosen.logp.sum(), "odds": -cfg.beta * F.logsigmoid(ratio).sum()}
    return terms, metrics


def count(batch: Packed, cfg: OrpoMethod) -> Terms:
    """Scored tokens of the chosen answers, and pairs."""
    zeros = batch.loss_mask.new_zeros(batch.num_tokens)
    lengths = answers(Out(logp=zeros), batch, CHOSEN).lengths
    return {"nll": lengths.sum(), "odds": num_of(batch, CHOSEN)}


ORPO = Method("orpo", loss, count, frozenset({"logp", "entropy"}))
