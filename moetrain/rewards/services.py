"""Rewards that have processes of their own."""

from moetrain.rewards.base import RewardKind
from moetrain.rewards.code import CODE
from moetrain.rewards.judge import JUDGE
from moetrain.rewards.reward_model import REWARD_MODEL

SERVICES: dict[str, RewardKind] = {"code": CODE, "reward_model": REWARD_MODEL, "judge": JUDGE}
