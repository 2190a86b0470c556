"""Soft adaptive policy optimisation (arXiv 2511.20347, eq. 5 and 6):

l_t = -f(r_t) A, f(r) = 4 / tau sigma(tau (r - 1)), tau by the sign of A; averaged as grpo.

f has slope 1 at r = 1 and flattens on both sides, sooner where an advantage is negative: there a
token's gradient spreads over the whole vocabulary.
"""

import torch
from torch import Tensor

from moetrain.config.online import SapoMethod
from moetrain.methods.online import Tokens
from moetrain.methods.policy import BY_ANSWER, policy_gradient


def surrogate(tokens: Tokens, logp: Tensor, cfg: SapoMethod) -> Tensor:
    """[t]."""
    tau = torch.where(tokens.advantage > 0, cfg.tau_pos, cfg.tau_neg)
    return -torch.sigmoid(tau * (tokens.ratio - 1)) * 4 / tau * tokens.advantage


SAPO = policy_gradient("sapo", BY_ANSWER, surrogate)
