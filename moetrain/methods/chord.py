"""CHORD (arXiv 2508.11408, eq. 6 and 7): reinforcement learning that keeps an eye on an expert,

L = (1 - mu) L_GRPO + mu L_SFT, L_SFT = -sum_t sg(phi(p_t)) log p_t / sum_t 1, phi(p) = p (1 - p).

mu rises to its peak and falls along a cosine, so that the expert is left behind. phi keeps tokens
that the model finds absurd from breaking what it knows, and sure ones from making it surer.
"""

import math

from torch import Tensor

from moetrain.config.online import ChordMethod
from moetrain.methods.base import Known, Method, Metrics, Out, Terms
from moetrain.methods.online import spread
from moetrain.methods.policy import BY_ANSWER, NEEDS, clip, counts_of, online, terms_of
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
    share = spread(batch, batch.extras["share"])
    terms, metrics = terms_of(out, batch, cfg, clip, BY_ANSWER, share)
    shown = demonstration_mask(batch)
    p = out.logp.detach().exp()
    phi = p * (1 - p) if cfg.phi else 1.0
    taught = -(phi * out.logp * share * shown).sum()
    metrics |= {
        "mu": ((share * shown).sum(), shown.sum()),
        "demonstrations/token_prob": ((p * shown).sum(), shown.sum()),
    }
    return terms | {"demonstrations": taught}, metrics


def count(batch: Packed, cfg: ChordMethod) -> Terms:
    """Answers, and tokens of demonstrations."""
    counts = counts_of(batch, cfg, BY_ANSWER)
    return counts | {"demonstrations": demonstration_mask(batch).sum()}


def demonstration_mask(batch: Packed) -> Tensor:
    """[t] fp32: the scored tokens of demonstrations."""
    return batch.loss_mask * spread(batch, (batch.extras["role"] == DEMONSTRATION).float())


CHORD = Method("chord", loss, count, NEEDS, online=online(shares=shares))
