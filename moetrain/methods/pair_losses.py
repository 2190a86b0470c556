"""What a pair costs, by TRL's names (its `loss_type`): ONE table, of which a recipe takes one loss
or a weighted sum of several.

All are functions of the log-ratios r = log pi(y|x) - log ref(y|x) of the chosen answer (w) and of
the rejected one (l), and most of them of h = r_w - r_l alone; m pairs at once, [m] -> [m].
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from moetrain.config.method import PairLoss
from moetrain.methods.pairs import Answers


@dataclass(frozen=True)
class Numbers:
    """The numbers that losses read beside log-ratios."""

    beta: float
    label_smoothing: float = 0.0  # e
    tau: float = 0.05
    shift: float = 0.0


def sigmoid_loss(h: Tensor, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """-(1 - e) log sigma(beta h) - e log sigma(-beta h): DPO (arXiv 2305.18290, eq. 7), with
    smoothing cDPO.
    """
    right, wrong = F.logsigmoid(beta * h), F.logsigmoid(-beta * h)
    return -(1 - label_smoothing) * right - label_smoothing * wrong


def ipo_loss(h: Tensor, beta: float) -> Tensor:
    """(h - 1 / (2 beta))^2 (arXiv 2310.12036, eq. 17), with log-probs per token as in TRL where the
    paper has sums.
    """
    return (h - 1 / (2 * beta)).square()


def hinge_loss(h: Tensor, beta: float) -> Tensor:
    """max(0, 1 - beta h) (SLiC, arXiv 2305.10425, eq. 3)."""
    return F.relu(1 - beta * h)


def robust_loss(h: Tensor, beta: float, label_smoothing: float) -> Tensor:
    """[-(1 - e) log sigma(beta h) + e log sigma(-beta h)] / (1 - 2 e), whose mean over labels of
    which a share e is flipped is DPO's on the right ones (rDPO, arXiv 2403.00409; DPO's smoothing
    has the other sign and no divisor). Below 0 for a pair that is far on the right side.
    """
    given, flipped = -F.logsigmoid(beta * h), -F.logsigmoid(-beta * h)
    share = label_smoothing
    return ((1 - share) * given - share * flipped) / (1 - 2 * share)


def exo_loss(h: Tensor, beta: float, label_smoothing: float) -> Tensor:
    """KL(q || p) of the policy's choice q = sigma(beta h) from the label's p = 1 - e (EXO, arXiv
    2402.00856, eq. 16).
    """
    label = torch.tensor([1 - label_smoothing, label_smoothing], dtype=torch.float64).log()
    right, wrong = F.logsigmoid(beta * h), F.logsigmoid(-beta * h)
    return right.exp() * (right - float(label[0])) + wrong.exp() * (wrong - float(label[1]))


def discopop_loss(h: Tensor, beta: float, tau: float) -> Tensor:
    """A blend of the logistic loss and exp(-beta h) by sigma(beta h / tau) (DiscoPOP, arXiv
    2406.08414, eq. 5), of which the second part is one exponential: apart, they are inf and 0.
    """
    x = beta * h
    return -F.logsigmoid(x) * torch.sigmoid(-x / tau) + torch.exp(F.logsigmoid(x / tau) - x)


def bco_loss(chosen: Tensor, rejected: Tensor, beta: float, shift: float) -> Tensor:
    """-log sigma(beta r_w - d) - log sigma(d - beta r_l): a classifier of good and bad answers,
    with d the mean reward (BCO, arXiv 2404.04656, eq. 9).
    """
    return -F.logsigmoid(beta * chosen - shift) - F.logsigmoid(shift - beta * rejected)


def nca_loss(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """-log sigma(beta r_w) - [log sigma(-beta r_w) + log sigma(-beta r_l)] / 2 (NCA, arXiv
    2402.05369, table 2).
    """
    other = F.logsigmoid(-beta * chosen) + F.logsigmoid(-beta * rejected)
    return -F.logsigmoid(beta * chosen) - 0.5 * other


def sppo_loss(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """(r_w - 1 / (2 beta))^2 + (r_l + 1 / (2 beta))^2 (SPPO, arXiv 2405.00675, eq. 4.7, with the
    winner's probability 1).
    """
    return (chosen - 0.5 / beta).square() + (rejected + 0.5 / beta).square()


def apo_zero_loss(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """1 - sigma(beta r_w) + sigma(beta r_l): up and down (APO, arXiv 2408.06266, eq. 7)."""
    return torch.sigmoid(-beta * chosen) + torch.sigmoid(beta * rejected)


def apo_down_loss(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """sigma(beta r_w) + 1 - sigma(beta h): both down, the rejected one further (APO, eq. 8)."""
    return torch.sigmoid(beta * chosen) + torch.sigmoid(-beta * (chosen - rejected))


def _gap(chosen: Answers, rejected: Answers) -> Tensor:
    return chosen.ratio - rejected.ratio


def _mean_gap(chosen: Answers, rejected: Answers) -> Tensor:
    return chosen.mean_ratio - rejected.mean_ratio


# Of "sft" the loss is no function of a pair: it is a term of its own, counted in tokens.
PAIR_LOSSES: Mapping[PairLoss, Callable[[Answers, Answers, Numbers], Tensor]] = {
    "sigmoid": lambda w, b, n: sigmoid_loss(_gap(w, b), n.beta, n.label_smoothing),
    "sigmoid_norm": lambda w, b, n: sigmoid_loss(_mean_gap(w, b), n.beta),
    "hinge": lambda w, b, n: hinge_loss(_gap(w, b), n.beta),
    "ipo": lambda w, b, n: ipo_loss(_mean_gap(w, b), n.beta),
    "robust": lambda w, b, n: robust_loss(_gap(w, b), n.beta, n.label_smoothing),
    "exo_pair": lambda w, b, n: exo_loss(_gap(w, b), n.beta, n.label_smoothing),
    "nca_pair": lambda w, b, n: nca_loss(w.ratio, b.ratio, n.beta),
    "bco_pair": lambda w, b, n: bco_loss(w.ratio, b.ratio, n.beta, n.shift),
    "sppo_hard": lambda w, b, n: sppo_loss(w.ratio, b.ratio, n.beta),
    "apo_zero": lambda w, b, n: apo_zero_loss(w.ratio, b.ratio, n.beta),
    "apo_down": lambda w, b, n: apo_down_loss(w.ratio, b.ratio, n.beta),
    "discopop": lambda w, b, n: discopop_loss(_gap(w, b), n.beta, n.tau),
}
