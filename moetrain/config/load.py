"""From a YAML file and dotted overrides to a Recipe; errors name the key and the way out."""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Union, cast, get_args, get_origin

from pydantic import BaseModel, ValidationError

from moetrain.config.foreign import known_here
from moetrain.config.recipe import Recipe
from moetrain.config.yaml_text import dump_content, parse_value
from moetrain.errors import ConfigError, nearest


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file and lay `a.b=value` overrides over it (values are YAML). Raises
    ConfigError.
    """
    content = read_content(path, overrides, "a recipe")
    try:
        return recipe_from(content, source=str(path))
    except ConfigError as error:
        cause = _blamed(path, overrides, str(error).removeprefix(f"{path}: "))
        raise (cause or error) from None


def _blamed(path: Path, overrides: Sequence[str], message: str) -> ConfigError | None:
    """What is wrong with overrides, where the file without them is sound, or has another fault."""
    if not overrides:
        return None
    try:
        recipe_from(read_content(path, (), "a recipe"))
    except ConfigError as error:
        if message == str(error).removeprefix("recipe: "):
            return None  # the file's own, whatever stands on the command line
        if not any(word.partition("=")[0] in message for word in overrides):
            return None
    named = [word for word in overrides if f"'{word.partition('=')[0]}'" in message]
    return ConfigError(f"override {' '.join(named or overrides):.300}: {message}")


def read_content(path: Path, overrides: Sequence[str], what: str) -> dict[str, Any]:
    """The mapping in a YAML file with overrides laid over it. Raises ConfigError."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text at byte {error.start}. Save it so.") from None
    except (OSError, ValueError) as error:  # a NUL in a path is a ValueError
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(
            f"{path}: {reason}. Give the path of {what}, for example one of examples/."
        ) from None
    content = parse_value(text, str(path))
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: {what} is a mapping of sections, not {type(content).__name__}")
    sections = cast(dict[str, Any], content)
    for override in overrides:
        apply_override(sections, override)
    return sections


def recipe_from(
    content: Mapping[str, Any], *, source: str = "recipe", unread: dict[str, str] | None = None
) -> Recipe:
    """Validate a recipe's content. Raises ConfigError for the first thing wrong with it.

    unread: takes (key: why) of keys that would do nothing; without it they are an error.
    """
    # A section whose keys are all commented out is null in YAML: it has its defaults.
    given = {key: value for key, value in content.items() if value is not None}
    try:
        return Recipe.model_validate(given, context=unread)
    except ValidationError as error:
        raise ConfigError(f"{source}: {explain(error)}") from None


def apply_override(content: dict[str, Any], override: str) -> None:
    """Lay one `a.b=value` over `content` in place."""
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise ConfigError(
            f"'{override}' is not an override. Write key=value, for example optim.lr=2e-5."
        )
    if re.search("[\ud800-\udfff]", key):
        raise ConfigError(f"{override!a} is not UTF-8 text. Write key=value in letters.")
    *parents, leaf = key.split(".")
    section = content
    for depth, name in enumerate(parents):
        below: Any = section.get(name)
        if below is None or (isinstance(below, str) and depth == 0 and name == "method"):
            below = {} if below is None else {"name": below}
            section[name] = below
        if not isinstance(below, dict):
            raise ConfigError(
                f"override {key}: '{'.'.join(parents[: depth + 1])}' is a value, not a section"
            )
        section = cast(dict[str, Any], below)
    section[leaf] = parse_value(value, f"override {key}")


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML; `load_recipe` reads it back to an equal recipe."""
    return dump_content(recipe.model_dump(mode="json"))


def recipe_hash(recipe: Recipe) -> str:
    """A short hash of everything in the recipe."""
    return hashlib.sha256(
        json.dumps(recipe.model_dump(mode="json"), sort_keys=True).encode()
    ).hexdigest()[:16]


def explain(error: ValidationError, root: type[BaseModel] = Recipe) -> str:
    """The first problem of a `root` in one line: dotted key, what was given, what is allowed."""
    # A misspelt key comes first: it is why another one is missing.
    wrong_keys = ("extra_forbidden", "invalid_key")
    first = min(error.errors(), key=lambda problem: problem["type"] not in wrong_keys)
    location = [str(part) for part in first["loc"]]
    method = None
    if location[:1] == ["method"] and len(location) > 1:
        method = location.pop(1)  # the union's tag, which is no key
    key = ".".join(location)
    more = f" ({error.error_count() - 1} more)" if error.error_count() > 1 else ""
    given: Any = first["input"]
    if first["type"] in wrong_keys:
        known = root is Recipe and key not in _all_keys(root) and known_here(key, given)
        if known:
            return f"unknown key '{key}'.{known}{more}"
        allowed = _fields_at(location[:-1], method, root)
        hint = _hint(key, location, allowed, root)
        return f"unknown key '{key}'.{hint} Allowed there: {', '.join(sorted(allowed))}{more}"
    if first["type"] == "missing":
        return f"'{key}' is missing; add it{more}"
    if first["type"] == "value_error":
        return str(first["msg"]).removeprefix("Value error, ") + more
    if key == "method":  # a union: told by its name, or not at all
        name = cast(dict[str, Any], given).get("name") if isinstance(given, dict) else given
        return f"'method.name' is {name!r}; allowed: {', '.join(_methods())}{more}"
    shown = repr(given) if len(repr(given)) < 80 else type(given).__name__
    if first["type"] == "model_type":
        keys = ", ".join(_fields_at(location, root=root))
        return f"'{key}' is {shown}, not a section. Keys there: {keys}{more}"
    return f"'{key}' is {shown}: {str(first['msg'])[0].lower()}{str(first['msg'])[1:]}{more}"


def _hint(key: str, location: Sequence[str], allowed: Sequence[str], root: type[BaseModel]) -> str:
    """The nearest key of the same section, else this one's home in another, else any near one."""
    *parents, leaf = location
    # Without the section's name, which would make everything in it look alike.
    near = nearest(leaf, allowed).replace(" '", " '" + "".join(f"{name}." for name in parents), 1)
    homes = sorted(known for known in _all_keys(root) if known.split(".")[-1] == leaf)
    if not near and key in homes:
        owners = [name for name in _methods() if leaf in _fields_at(parents, name)]
        return f" It is a key of {', '.join(owners)}."
    if not near and homes:
        return f" Did you mean {' or '.join(repr(home) for home in homes)}?"
    return near or nearest(key, _all_keys(root))


def _methods() -> list[str]:
    methods = _models(Recipe.model_fields["method"].annotation)
    return [str(method.model_fields["name"].default) for method in methods]


def _models(annotation: Any) -> list[type[BaseModel]]:
    """The sections that a field may hold."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) in (Annotated, Union, UnionType):
        return [m for part in get_args(annotation) for m in _models(part)]
    return []


def _fields_at(
    location: Sequence[str], method: str | None = None, root: type[BaseModel] = Recipe
) -> list[str]:
    """The keys of a section; under `method`, those of the method that is named."""
    models: list[type[BaseModel]] = [root]
    for name in location:
        models = [
            m
            for model in models
            if name in model.model_fields
            for m in _models(model.model_fields[name].annotation)
        ]
    named = [
        m for m in models if "name" in m.model_fields and m.model_fields["name"].default == method
    ]
    return sorted({name for model in named or models for name in model.model_fields})


def sections_below(root: type[BaseModel]) -> dict[str, set[str]]:
    """Each key of a recipe or a benchmark, and the keys below it; none for a plain value."""
    return {
        name: {leaf for model in _models(field.annotation) for leaf in model.model_fields}
        for name, field in root.model_fields.items()
    }


def _all_keys(root: type[BaseModel]) -> set[str]:
    """Every dotted key of a recipe or a benchmark."""
    keys: set[str] = set()
    for name, leaves in sections_below(root).items():
        keys |= {f"{name}.{leaf}" for leaf in leaves} or {name}
    return keys
