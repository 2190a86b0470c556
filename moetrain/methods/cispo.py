"""Clipped importance sampling policy optimisation (MiniMax-M1, arXiv 2506.13585, eq. 4):

l_t = -sg(clip(r_t, 1 - low, 1 + high)) A log pi_t, mean over all tokens.

The ratio is a weight and has no gradient, so a clipped token still teaches: rare ones that a
reflection hangs on are not dropped by the first update that makes them likelier.
"""

from torch import Tensor

from moetrain.config.online import CispoMethod
from moetrain.methods.online import Tokens
from moetrain.methods.policy import BY_TOKEN, policy_gradient


def surrogate(tokens: Tokens, logp: Tensor, cfg: CispoMethod) -> Tensor:
    """[t]."""
    weight = tokens.ratio.detach().clamp(1 - cfg.clip_low, 1 + cfg.clip_high)
    return -weight * tokens.advantage * logp


CISPO = policy_gradient("cispo", BY_TOKEN, surrogate)
