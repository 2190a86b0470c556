"""Group sequence policy optimisation (arXiv 2507.18071, eq. 5): one ratio for a whole answer,

L = -mean over answers of w min(s A, clip(s, 1 - low, 1 + high) A),
s = (pi(y|x) / pi_old(y|x))^(1/|y|).

A mixture of experts routes some tokens anew after every update; their ratios average out in s. So
it is grpo with another `importance_sampling_level` and other bounds.
"""

from moetrain.methods.policy import BY_ANSWER, policy_gradient

GSPO = policy_gradient("gspo", BY_ANSWER)
