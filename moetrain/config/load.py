"""From a YAML file and dotted overrides to a Recipe; errors name the key and the way out."""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Union, cast, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from moetrain.config.recipe import Recipe
from moetrain.errors import ConfigError, nearest


class _Loader(yaml.SafeLoader):
    """Safe YAML in which 1e-4 is a number (YAML 1.1 wants 1.0e-4) and a key may stand only once."""


_EXPONENT = re.compile(r"^[-+]?(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9]+)[eE][-+]?[0-9]+$")
cast(Any, _Loader).add_implicit_resolver(
    "tag:yaml.org,2002:float", _EXPONENT, list("-+0123456789.")
)


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file and lay `a.b=value` overrides over it (values are YAML). Raises
    ConfigError.
    """
    try:
        text = Path(path).read_text()
    except OSError as error:
        raise ConfigError(
            f"{path}: {error.strerror}. Give the path of a recipe, for example one of examples/."
        ) from None
    content = _parse(text, str(path))
    if not isinstance(content, dict):
        raise ConfigError(
            f"{path}: a recipe is a mapping of sections, not {type(content).__name__}"
        )
    sections = cast(dict[str, Any], content)
    for override in overrides:
        apply_override(sections, override)
    return recipe_from(sections, source=str(path))


def recipe_from(content: Mapping[str, Any], *, source: str = "recipe") -> Recipe:
    """Validate a recipe's content. Raises ConfigError for the first thing wrong with it."""
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        raise ConfigError(f"{source}: {_explain(error)}") from None


def apply_override(content: dict[str, Any], override: str) -> None:
    """Lay one `a.b=value` over `content` in place."""
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise ConfigError(
            f"'{override}' is not an override. Write key=value, for example optim.lr=2e-5."
        )
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
    section[leaf] = _parse(value, f"override {key}")


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML; `load_recipe` reads it back to an equal recipe."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def recipe_hash(recipe: Recipe) -> str:
    """A short hash of everything in the recipe."""
    return hashlib.sha256(
        json.dumps(recipe.model_dump(mode="json"), sort_keys=True).encode()
    ).hexdigest()[:16]


def _parse(text: str, where: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f" line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ConfigError(
            f"{where}:{place} not YAML ({getattr(error, 'problem', error)})"
        ) from None


def _explain(error: ValidationError) -> str:
    """The first problem in one line: dotted key, what was given, what is allowed."""
    first = error.errors()[0]
    location = [str(part) for part in first["loc"] if part not in ("pretrain", "cpt", "sft")]
    key = ".".join(location)
    more = f" ({error.error_count() - 1} more)" if error.error_count() > 1 else ""
    given: Any = first["input"]
    if first["type"] == "extra_forbidden":
        allowed = _fields_at(location[:-1])
        prefix = ".".join(location[:-1])
        full = {f"{prefix}.{name}" if prefix else name for name in allowed}
        hint = nearest(key, full) or nearest(key, _all_keys())
        return f"unknown key '{key}'.{hint} Allowed there: {', '.join(sorted(allowed))}{more}"
    if first["type"] == "missing":
        return f"'{key}' is missing; add it{more}"
    if first["type"] == "value_error":
        return str(first["msg"]).removeprefix("Value error, ") + more
    if first["type"] in ("union_tag_invalid", "union_tag_not_found"):
        name = cast(dict[str, Any], given).get("name") if isinstance(given, dict) else given
        return f"'{key}.name' is {name!r}; allowed: {_tags(first)}{more}"
    shown = repr(given) if len(repr(given)) < 80 else type(given).__name__
    return f"'{key}' is {shown}: {str(first['msg'])[0].lower()}{str(first['msg'])[1:]}{more}"


def _tags(problem: Any) -> str:
    return (
        str(problem.get("ctx", {}).get("expected_tags", "")).replace("'", "")
        or "pretrain, cpt, sft"
    )


def _models(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) in (Annotated, Union, UnionType):
        return [m for part in get_args(annotation) for m in _models(part)]
    return []


def _fields_at(location: Sequence[str]) -> list[str]:
    models: list[type[BaseModel]] = [Recipe]
    for name in location:
        models = [
            m
            for model in models
            if name in model.model_fields
            for m in _models(model.model_fields[name].annotation)
        ]
    return sorted({name for model in models for name in model.model_fields})


def _all_keys() -> set[str]:
    """Every dotted key of a recipe."""
    keys: set[str] = set()
    for name, field in Recipe.model_fields.items():
        below = {
            f"{name}.{leaf}" for model in _models(field.annotation) for leaf in model.model_fields
        }
        keys |= below or {name}
    return keys
