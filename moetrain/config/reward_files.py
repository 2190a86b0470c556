"""Whether the functions that a recipe names are in their files, and what they take. The files are
read, not run.
"""

import ast
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from moetrain.config.rewards import RewardConfig
from moetrain.config.user_files import check_named, parsed_file, split_name
from moetrain.errors import ConfigError

# What every function is given that asks for it (`rewards/user_functions.py`).
GIVEN = frozenset(
    "prompts prompt completions completion_ids trainer_state log_extra log_metric".split()
)


def check_reward_files(rewards: Sequence[RewardConfig]) -> None:
    """Raises ConfigError for a file or function that is not there, before anything is loaded."""
    for reward in rewards:
        if ":" in reward.name:
            check_reward_file(reward.name)


def check_reward_file(name: str) -> None:
    """Of FILE.py:FUNCTION. Raises ConfigError."""
    body = parsed_file(name, "rewards")
    path, function = split_name(name)
    takes = _signature(body, function)
    if takes is not None and not (takes.is_open or takes.names & {"completions", "completion_ids"}):
        raise ConfigError(
            f"rewards: {function} of {path} takes no `completions`, so it sees no answer: a reward"
            " is FUNCTION(completions, **columns)."
        )
    check_named(name, "rewards", "function")


@dataclass(frozen=True)
class Signature:
    """What a function is called with, by keyword."""

    names: frozenset[str]
    required: tuple[str, ...]
    is_open: bool  # it takes any name besides


def wanted_columns(reward: RewardConfig) -> tuple[str, ...]:
    """What a reward of a file cannot be called without, besides what all rewards are given: columns
    of the records. Nothing where only running the file would tell.
    """
    file, _, function = reward.name.rpartition(":")
    if not file:
        return ()
    takes = _signature(ast.parse(Path(file).expanduser().read_bytes()).body, function)
    required = takes.required if takes is not None else ()
    return tuple(name for name in required if name not in GIVEN and name not in reward.options)


def _signature(body: Sequence[ast.stmt], function: str) -> Signature | None:
    """Of a function that stands there as such; None for any other, and for one that is wrapped."""
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    definitions = [node for node in body if isinstance(node, functions) and node.name == function]
    if len(definitions) != 1 or definitions[0].decorator_list:
        return None
    args = definitions[0].args
    named = [*args.posonlyargs, *args.args]
    required = [arg.arg for arg in named[: len(named) - len(args.defaults)]]
    pairs = zip(args.kwonlyargs, args.kw_defaults, strict=True)
    required += [arg.arg for arg, default in pairs if default is None]
    names = frozenset(arg.arg for arg in (*named, *args.kwonlyargs))
    return Signature(names, tuple(required), args.kwarg is not None)
