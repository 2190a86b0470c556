"""Rewards: pure functions of completions, by the name that a recipe gives them, and the processes
that compute them.
"""

from moetrain.rewards.base import Graded, RewardFunction
from moetrain.rewards.find import REWARDS, find_reward
from moetrain.rewards.grader import Grader

__all__ = ["REWARDS", "Graded", "Grader", "RewardFunction", "find_reward"]
