"""Rewards: pure functions of completions, by the name that a recipe gives them, and the processes
that compute them.
"""

from moetrain.rewards.base import Completion, RewardFunction, Verdict
from moetrain.rewards.columns import check_columns, gradable
from moetrain.rewards.find import REWARDS, find_reward
from moetrain.rewards.grader import Grader, check_user_functions

__all__ = [
    "REWARDS",
    "Completion",
    "Grader",
    "RewardFunction",
    "Verdict",
    "check_columns",
    "check_user_functions",
    "find_reward",
    "gradable",
]
