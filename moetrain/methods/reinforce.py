"""REINFORCE without a value head, in three forms that differ in their sections' defaults:

rloo (arXiv 2402.14740, as TRL 1.16 has it): an answer is one action, with the product of its
ratios; A = r - mean of the others' r, where r has beta times the answer's log(pi_old / ref) taken
off; mean over answers. reinforce_pp (REINFORCE++, arXiv 2501.03262): PPO's clip a token, A_t = r -
beta sum_(i >= t) log(pi_old / ref)_i, brought to mean 0 and deviation 1 over the tokens of the
batch; mean over tokens. reinforce_pp_baseline: the same with A = r - mean of its group and the KL,
as k2, in the loss.
"""

from moetrain.methods.policy import BY_ANSWER, BY_TOKEN, policy_gradient

RLOO = policy_gradient("rloo", BY_ANSWER)
REINFORCE_PP = policy_gradient("reinforce_pp", BY_TOKEN)
REINFORCE_PP_BASELINE = policy_gradient("reinforce_pp_baseline", BY_TOKEN)
