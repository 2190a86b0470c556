"""Group-relative policy optimisation and two of its kin, by how tokens are averaged:

l_t = -w_t min(r_t A, clip(r_t, 1 - low, 1 + high) A) + beta KL_t, with r_t = pi / pi_old and A from
the rewards of the answers to one prompt. grpo (arXiv 2402.03300, eq. 3): mean over answers of the
mean over tokens, A = (r - mean) / std. dr_grpo (arXiv 2503.20783, eq. 4): sums over tokens divided
by a constant, A = r - mean. dapo (arXiv 2503.14476, eq. 8): mean over all tokens, with a higher
upper bound, dynamic sampling and a penalty for answers near the longest allowed.
"""

from torch import Tensor

from moetrain.config.online import DrGrpoMethod
from moetrain.methods.policy import BY_ANSWER, BY_TOKEN, Mean, num_answers, policy_gradient
from moetrain.ops.packed import Packed


def constant(batch: Packed, cfg: DrGrpoMethod) -> Tensor:
    """Answers times the constant length."""
    assert cfg.length is not None, "a recipe says what the constant is"
    return num_answers(batch) * cfg.length


GRPO = policy_gradient("grpo", BY_ANSWER)
DR_GRPO = policy_gradient("dr_grpo", Mean(BY_TOKEN.share, constant))
DAPO = policy_gradient("dapo", BY_TOKEN)
