"""From a name in a recipe to a function."""

import importlib.util
import sys
from pathlib import Path

from moetrain.config.reward_files import check_reward_file
from moetrain.errors import ConfigError
from moetrain.rewards import accuracy, lengths, text
from moetrain.rewards.base import RewardFunction

REWARDS: dict[str, RewardFunction] = {
    "accuracy": accuracy.accuracy,
    "exact": accuracy.exact,
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
    file, _, function = name.rpartition(":")
    path = Path(file).expanduser()
    spec = importlib.util.spec_from_file_location(f"_reward_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    sys.path.append(str(path.parent.absolute()))  # for what it imports from beside itself
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # a user's own code, which may fail in any way
        raise ConfigError(
            f"rewards: {path} cannot be run: {type(error).__name__}: {error}"
        ) from error
    found: RewardFunction | None = vars(module).get(function)
    if not callable(found):
        raise ConfigError(
            f"rewards: {function} of {path} is {type(found).__name__}, not a function. Name one."
        )
    return found
