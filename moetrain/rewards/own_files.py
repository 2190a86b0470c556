"""What a recipe names as FILE.py:NAME, loaded."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from moetrain.config.user_files import split_name
from moetrain.errors import ConfigError


def load_named(name: str, where: str, kind: str) -> Any:
    """The `kind` ("function") of that name; `where` is the recipe's key. Raises ConfigError."""
    path, function_name = split_name(name)
    return named_in(load_file(path, where), function_name, where, kind)


def load_file(path: Path, where: str) -> ModuleType:
    """The file as a module. Raises ConfigError."""
    spec = importlib.util.spec_from_file_location(f"_own_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    sys.path.append(str(path.parent.absolute()))  # for what it imports from beside itself
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # a user's own code, which may fail in any way
        raise ConfigError(
            f"{where}: {path} cannot be run: {type(error).__name__}: {error}"
        ) from error
    return module


def named_in(module: ModuleType, wanted_name: str, where: str, kind: str) -> Any:
    """The `kind` of that name in a loaded file. Raises ConfigError."""
    value = vars(module).get(wanted_name)
    if not callable(value):
        raise ConfigError(
            f"{where}: {wanted_name} of {module.__file__} is {type(value).__name__}, not a {kind}."
            " Name one."
        )
    return value
