"""CHORD (arXiv 2508.11408, eq. 6 and 7): reinforcement learning that keeps an eye on an expert,

L = (1 - mu) L_GRPO + mu L_SFT, L_SFT = -sum_t sg(phi(p_t)) log p_t / sum_t 1, phi(p) = p (1 - p).

mu rises to its peak and falls along a cosine, so that the expert is left behind. phi keeps tokens
that the model finds absurd from breaking what it knows, and sure ones from making it surer.
"""

import math

from torch import Tensor

from moetrain.config.online import ChordMethod
from moetrain.methods.base import Known, Method, Metrics, Online, Out, Terms
from moetrain.methods.grpo import NEEDS, num_answers, token_losses
from moetrain.methods.online import (
    broadcast_advantage,
    lengths,
    normalised,
    online_metrics,
    spread,
    tokens_of,
    truncated,
)
from moetrain.ops.packed import DEMONSTRATION, Packed


def mu(step: int, cfg: ChordMethod) -> float:
    """Of a step, counted from 1."""
    done = step - 1
    if done < cfg.mu_warmup:
        return cfg.mu_peak * done / cfg.mu_warmup
    progress = min(1.0, (done - cfg.mu_warmup) / cfg.mu_decay)
    return cfg.mu_valley + (cfg.mu_peak - cfg.mu_valley) * (1 + math.cos(math.pi * progress)) / 2


def shares(step: int, cfg: ChordMethod) -> tuple[float, float]:
    """Weights of answers and of demonstrations."""
    return 1 - mu(step, cfg), mu(step, cfg)


def loss(out: Out, batch: Packed, cfg: ChordMethod, known: Known) -> tuple[Terms, Metrics]:
    """Each answer counts the same, and each token of the demonstrations."""
    own = tokens_of(out, batch, cfg)
    share = spread(batch, batch.extras["share"])
    even = spread(batch, 1 / lengths(batch, own.mask))
    policy = (token_losses(out, batch, cfg, own) * even * share).sum()
    shown = demonstration_mask(batch)
    p = out.logp.detach().exp()
    phi = p * (1 - p) if cfg.phi else 1.0
    taught = -(phi * out.logp * share * shown).sum()
    metrics = online_metrics(out, batch, cfg, own) | {
        "mu": ((share * shown).sum(), shown.sum()),
        "demonstrations/token_prob": ((p * shown).sum(), shown.sum()),
    }
    return {"loss": policy, "demonstrations": taught}, metrics


def count(batch: Packed, cfg: object) -> Terms:
    """Answers, and tokens of demonstrations."""
    return {"loss": num_answers(batch), "demonstrations": demonstration_mask(batch).sum()}


def demonstration_mask(batch: Packed) -> Tensor:
    """[t] fp32: the scored tokens of demonstrations."""
    return batch.loss_mask * spread(batch, (batch.extras["role"] == DEMONSTRATION).float())


CHORD = Method(
    "chord",
    loss,
    count,
    NEEDS,
    online=Online(normalised, targets=broadcast_advantage, truncated=truncated, shares=shares),
)
