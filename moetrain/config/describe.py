"""A recipe's keys in words: what docs/recipes.md and `moetrain recipe` say of them."""

import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from moetrain.config.foreign import known_here
from moetrain.config.recipe import Recipe
from moetrain.config.rewards import OPTIONS
from moetrain.errors import ConfigError, nearest

NAMES: dict[Any, str] = {
    int: "whole number",
    float: "number",
    str: "text",
    bool: "true, false",
    Path: "path",
}
BOUNDS = ((Ge, "ge", ">="), (Gt, "gt", ">"), (Le, "le", "<="), (Lt, "lt", "<"))


@dataclass(frozen=True)
class Key:
    """One key of a recipe; of a method's, `owner` is the method."""

    name: str  # dotted
    field: FieldInfo
    owner: str = ""

    @property
    def kind(self) -> str:
        """What its value is."""
        return show_type(self.field.annotation, list(self.field.metadata))

    @property
    def default(self) -> str:
        """As YAML has it; empty where there is none."""
        return show_default(self.field)

    @property
    def text(self) -> str:
        """What it means."""
        description = self.field.description or ""
        if any(isinstance(item, MinLen) for item in self.field.metadata):
            return f"not empty; {description}" if description else "not empty"
        return description


@dataclass(frozen=True)
class Group:
    """The keys of a section; of `method`, those of one method."""

    name: str
    owner: str
    text: str
    keys: tuple[Key, ...]


def show_type(annotation: Any, metadata: list[Any] | None = None) -> str:
    """A field's type in a reader's words."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return show_type(args[0], [*args[1:], *(metadata or [])])
    if origin in (Union, types.UnionType):
        return " or ".join(show_type(a, metadata) for a in args if a is not type(None))
    if origin is Literal:
        return ", ".join(f"`{a}`" for a in args)
    if origin is list:
        return f"list of {show_type(args[0])}"
    if origin is dict or annotation is dict:
        return "mapping"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return f"{{{', '.join(annotation.model_fields)}}}"
    return str(NAMES.get(annotation, annotation.__name__)) + show_bounds(metadata or [])


def show_bounds(metadata: list[Any]) -> str:
    """ " >= 1, < 2" from a field's constraints."""
    flat: list[Any] = []
    for item in metadata:
        flat += item.metadata if isinstance(item, FieldInfo) else [item]
    parts = [
        f"{sign} {getattr(item, name):g}"
        for item in flat
        for kind, name, sign in BOUNDS
        if isinstance(item, kind)
    ]
    return " " + ", ".join(parts) if parts else ""


def show_default(field: FieldInfo) -> str:
    """The default as YAML has it, in code marks; "" where there is none."""
    if field.is_required():
        return ""
    value: Any = field.get_default(call_default_factory=True, validated_data={})
    if value is None:
        return "not set"
    if isinstance(value, str):
        return f"`{value}`" if value and "\n" not in value else "a text" if value else "not set"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def models_of(annotation: Any) -> list[type[BaseModel]]:
    """The models in a field's type: one for a section, several for a union told apart by name."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [m for part in get_args(annotation) for m in models_of(part)]


def plain_keys() -> tuple[Key, ...]:
    """The keys that are in no section."""
    fields = Recipe.model_fields
    return tuple(Key(key, f) for key, f in fields.items() if not models_of(f.annotation))


def groups() -> Iterator[Group]:
    """All sections, and the options of rewards after theirs."""
    for name, field in Recipe.model_fields.items():
        models = models_of(field.annotation)
        for model in models:
            owner = str(model.model_fields["name"].default) if len(models) > 1 else ""
            yield group(name, model, owner)
        if name == "rewards":
            yield from (
                group("options", model, reward)
                for reward, model in OPTIONS.items()
                if model.model_fields
            )


def group(name: str, model: type[BaseModel], owner: str = "") -> Group:
    """One section."""
    fields = model.model_fields.items()
    keys = tuple(Key(f"{name}.{leaf}", field, owner) for leaf, field in fields)
    return Group(name, owner, (model.__doc__ or "").strip(), keys)


def find(key: str) -> tuple[list[Key], list[Group]]:
    """(what a dotted key is, the sections that it is in or names). Raises ConfigError."""
    matches = [one for one in plain_keys() if one.name == key]
    every = list(groups())
    there = [one for group in every for one in group.keys if one.name == key]
    named = [
        group for group in every if key in (group.name, group.owner, f"{group.name}.{group.owner}")
    ]
    around = [group for group in every if any(one in there for one in group.keys)]
    if matches or there or named:
        return matches + there, around or named
    known = {*Recipe.model_fields} | {one.name for group in every for one in group.keys}
    leaves = sorted(one for one in known if one.rpartition(".")[2] == key.rpartition(".")[2])
    homes = f" Did you mean {' or '.join(repr(home) for home in leaves)}?" if leaves else ""
    hint = known_here(key) or homes or nearest(key, known)
    raise ConfigError(f"no recipe has the key '{key}'.{hint} `moetrain recipe` lists the sections.")
