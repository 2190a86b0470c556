"""A user's functions as tools."""

from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from moetrain.config.user_files import split_name
from moetrain.environments.base import Tool
from moetrain.environments.toolbox import Toolbox
from moetrain.errors import ConfigError
from moetrain.rewards.own_files import load_file, named_in

WHERE = "rollout.tools"


class Tools(Toolbox):
    """The functions FILE.py:FUNCTION, each file loaded once. Raises ConfigError for one whose
    annotations and docstring do not say what it takes.
    """

    def __init__(self, functions: Sequence[str]):
        files: dict[Path, ModuleType] = {}
        by_name: dict[str, Callable[..., Any]] = {}
        for name in functions:
            path, own = split_name(name)
            if own in by_name:
                raise ConfigError(f"{WHERE} has two tools {own}: a model knows them by their name.")
            if path not in files:
                files[path] = load_file(path, WHERE)
            by_name[own] = named_in(files[path], own, WHERE, "function")
        # One process is asked, and the others do without transformers.
        super().__init__(by_name, lambda: [schema_of(one, own) for own, one in by_name.items()])


def schema_of(function: Callable[..., Any], name: str) -> Tool:
    """What a chat template says of a function, by its annotations and docstring: transformers'
    schema, which TRL takes too. Raises ConfigError with what they lack.
    """
    from transformers.utils.chat_template_utils import get_json_schema

    try:
        return get_json_schema(function)
    except Exception as error:  # of several kinds (transformers 5.19), and what annotations raise
        raise ConfigError(
            f"{WHERE}: {name} does not say what it takes ({str(error).splitlines()[0]}): it needs"
            " a type for each argument, and a docstring with a line on each under Args:."
        ) from error
