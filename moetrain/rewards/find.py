"""From a name in a recipe to a function."""

from moetrain.config.reward_files import check_reward_file
from moetrain.rewards import accuracy, lengths, posted, text
from moetrain.rewards.base import RewardFunction
from moetrain.rewards.own_files import load_named

REWARDS: dict[str, RewardFunction] = {
    "accuracy": accuracy.accuracy,
    "exact": accuracy.exact,
    "agent": posted.agent,
    "format": text.format,
    "code_format": text.code_format,
    "tag_count": text.tag_count,
    "reasoning_steps": text.reasoning_steps,
    "length": lengths.length,
    "cosine_length": lengths.cosine_length,
    "cosine": lengths.cosine,
    "len_reward": lengths.len_reward,
    "repetition": text.repetition,
    "repetition_penalty": text.repetition_penalty,
    "language": text.language,
}


def find_reward(name: str) -> RewardFunction:
    """One of `REWARDS`, or the function of FILE.py:FUNCTION. Raises ConfigError."""
    if name in REWARDS:
        return REWARDS[name]
    check_reward_file(name)
    return load_named(name, "rewards", "function")
