"""The arguments of a command in a YAML or JSON file."""

import json
from collections.abc import Mapping
from typing import Any, cast

from moetrain.config.yaml_text import parse_value
from moetrain.errors import ConfigError
from moetrain.interop.swift.codecs import Words
from moetrain.interop.swift.near import Near

_GROUPS = ("train", "rollout")  # of a file for Ray, whose keys are flags too


def read_arguments(near: Near, flag: str, name: str) -> tuple[dict[str, Words], dict[str, str]]:
    """(flags, variables) of a file of arguments, as ms-swift reads it: `ENV` has variables; of one
    for Ray the groups train and rollout have flags too. Raises ConfigError.
    """
    text = near.read(flag, name)
    where = f"{flag} {name}: not readable:"
    content = _json(text, flag, name) if name.endswith(".json") else parse_value(text, where)
    if not isinstance(content, Mapping):
        raise ConfigError(f"{flag} {name}: a mapping of arguments is wanted")
    given = dict(cast(Mapping[str, Any], content))
    env: object = given.pop("ENV", None)
    flags: dict[str, Words] = {}
    variables: dict[str, str] = {}
    if isinstance(env, Mapping):
        variables = {str(key): str(value) for key, value in cast(Mapping[Any, Any], env).items()}
    for group in _GROUPS:
        group_arguments = given.get(group)
        if not isinstance(group_arguments, Mapping):
            continue
        del given[group]
        for key, value in cast(Mapping[str, Any], group_arguments).items():
            if key == "gpus":
                variables[f"{group}_gpus"] = str(value)
            else:
                given[key] = value
    for key, value in given.items():
        if value is not None:
            flags[str(key).replace("-", "_")] = _words(value)
    return flags, variables


def _json(text: str, flag: str, name: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{flag} {name}: not readable: {error}") from None


def _words(value: object) -> Words:
    if isinstance(value, list):
        items = cast(list[object], value)
        if all(isinstance(item, str | int | float | bool) for item in items):
            return tuple(_word(item) for item in items)
        return (json.dumps(items, ensure_ascii=False),)
    if isinstance(value, Mapping):
        return (json.dumps(value, ensure_ascii=False),)
    return (_word(value),)


def _word(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
