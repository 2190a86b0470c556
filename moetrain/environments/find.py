"""From what a recipe says to an environment."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from moetrain.config.recipe import Recipe
from moetrain.config.rollout import RolloutConfig
from moetrain.config.user_files import check_named
from moetrain.environments import agents
from moetrain.environments.base import Environment
from moetrain.environments.game import Game
from moetrain.environments.python import Python
from moetrain.environments.search import Search
from moetrain.environments.single import Single
from moetrain.environments.tools import Tools
from moetrain.errors import ConfigError, nearest
from moetrain.rewards.own_files import load_named

ENVIRONMENTS: dict[str, Callable[..., Environment]] = {
    "single": Single,
    "tools": Tools,
    "python": Python,
    "search": Search,
    "game": Game,
    "agents": agents.Agents,
}

_OPEN = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def check_environment(recipe: Recipe) -> None:
    """Raises ConfigError where a run cannot have the recipe's environment."""
    if recipe.rollout is None:
        return
    check_names(recipe.rollout)


def check_names(rollout: RolloutConfig) -> None:
    """Raises ConfigError for an environment, a file or a name in it, or an option that is not
    there. Files are read, not run.
    """
    name = rollout.environment
    if ":" in name:
        check_named(name, "rollout.environment", "class")
    elif name not in ENVIRONMENTS:
        known = ", ".join(ENVIRONMENTS)
        raise ConfigError(
            f"rollout.environment={name} is none of {known}, and no FILE.py:CLASS."
            f"{nearest(name, ENVIRONMENTS)}"
        )
    else:
        _check_options(ENVIRONMENTS[name], rollout)
        if name == "agents":
            agents.check_options(rollout.environment_options)
    for tool in rollout.tools:
        check_named(tool, "rollout.tools", "function")


def open_environment(rollout: RolloutConfig) -> Environment:
    """The recipe's environment, in the process in which it is to reply. Raises ConfigError."""
    name = rollout.environment
    make = ENVIRONMENTS.get(name)
    if make is None:
        make = load_named(name, "rollout.environment", "class")
        _check_options(make, rollout)
    return make(**_options(rollout))


def _options(rollout: RolloutConfig) -> dict[str, Any]:
    own: Mapping[str, Any] = {"functions": rollout.tools} if rollout.tools else {}
    return {**rollout.environment_options, **own}


def _check_options(make: Callable[..., Environment], rollout: RolloutConfig) -> None:
    taken = [one for one in inspect.signature(make).parameters.values() if one.name != "functions"]
    names = [one.name for one in taken if one.kind not in _OPEN]
    for name in rollout.environment_options:
        if name not in names and not any(one.kind is one.VAR_KEYWORD for one in taken):
            raise ConfigError(
                f"rollout.environment_options.{name}: {rollout.environment} takes"
                f" {', '.join(names) or 'none'}.{nearest(name, names)}"
            )
    needed = [one.name for one in taken if one.kind not in _OPEN and one.default is one.empty]
    for name in needed:
        if name not in rollout.environment_options:
            raise ConfigError(
                f"rollout.environment={rollout.environment} needs"
                f" rollout.environment_options.{name}."
            )
