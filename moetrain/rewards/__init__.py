"""Rewards: pure functions of completions, by the name that a recipe gives them, and the processes
that compute them.
"""

from moetrain.rewards.base import Graded, Item, RewardFunction
from moetrain.rewards.columns import check_columns
from moetrain.rewards.find import REWARDS, find_reward
from moetrain.rewards.grader import Grader, check_own

__all__ = [
    "REWARDS",
    "Graded",
    "Grader",
    "Item",
    "RewardFunction",
    "check_columns",
    "check_own",
    "find_reward",
]
