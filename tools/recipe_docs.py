#!/usr/bin/env python3
"""Write docs/recipes.md from the recipe's models, or with --check say whether it is up to date."""

import sys
import types
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from moetrain.config.recipe import Recipe
from moetrain.config.rewards import OPTIONS

DOC = Path(__file__).parent.parent / "docs" / "recipes.md"
HEAD = """# Recipes

A recipe is one YAML file; `moetrain train RECIPE [key=value ...]` runs it. Any key can be
overridden on the command line by its dotted name, and the value is read as YAML: `optim.lr=2e-5`,
`data.eval=[a.jsonl,b.jsonl]`, `method={name: sft}`. Unknown keys are refused with the nearest right
name. Relative paths are relative to where the command is run. `moetrain train RECIPE --dry-run`
prints the resolved recipe, the ranks, bytes per GPU, and what the data comes to: what would be
rejected or cut, packs and steps of an epoch. It looks at 256 records of each set at most, for 10
seconds at most, after the seconds that a tokenizer takes to load; the package's own data it takes
as it is, without a tokenizer or torch. What a run would read and is not there is refused. Where the
model itself is not on this machine and only known by its published config, it is a plan for another
machine, and `NOT HERE` lines name what is missing. Every run writes its recipe to
`<run_dir>/resolved.yaml`.

This page is written by `tools/recipe_docs.py` (`make fix`) from `moetrain/config/recipe.py`.
"""
NAMES = {int: "whole number", float: "number", str: "text", bool: "true, false", Path: "path"}
BOUNDS = ((Ge, "ge", ">="), (Gt, "gt", ">"), (Le, "le", "<="), (Lt, "lt", "<"))


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
    """The default as YAML has it; bold where there is none."""
    if field.is_required():
        return "**required**"
    value = field.get_default(call_default_factory=True, validated_data={})
    if value is None:
        return "not set"
    if isinstance(value, str):
        return f"`{value}`" if value and "\n" not in value else "a text" if value else "not set"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`{value}`"


def models_of(annotation: Any) -> list[type[BaseModel]]:
    """The models in a field's type: one for a section, several for a union told apart by name."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [m for part in get_args(annotation) for m in models_of(part)]


def row(key: str, field: FieldInfo) -> str:
    """One line of a table."""
    text = (field.description or "").replace("|", "\\|").replace("<", "\\<")
    if any(isinstance(item, MinLen) for item in field.metadata):
        text = f"not empty; {text}" if text else "not empty"
    kind = show_type(field.annotation, list(field.metadata))
    return f"| `{key}` | {kind} | {show_default(field)} | {text} |"


def table(rows: list[str]) -> list[str]:
    """A Markdown table."""
    return ["| key | value | default | |", "| --- | --- | --- | --- |", *rows, ""]


def section(key: str, model: type[BaseModel]) -> list[str]:
    """The keys of one section."""
    rows = [row(f"{key}.{name}", field) for name, field in model.model_fields.items()]
    return [(model.__doc__ or "").strip(), "", *table(rows)]


def reward_options() -> list[str]:
    """What each reward can be told."""
    lines: list[str] = []
    for name, model in OPTIONS.items():
        if model.model_fields:
            lines += [f"### rewards: {name}", "", *section("options", model)[2:]]
    return lines


def text() -> str:
    """The whole page."""
    fields = Recipe.model_fields
    plain = [row(key, f) for key, f in fields.items() if not models_of(f.annotation)]
    lines = [HEAD, *table(plain)]
    for key, field in fields.items():
        models = models_of(field.annotation)
        if models:
            lines += [f"## {key}", ""]
        for model in models:
            if len(models) > 1:
                name = model.model_fields["name"].default
                lines += [f"### {key}: {name}", ""]
            lines += section(key, model)
        if key == "rewards":
            lines += reward_options()
    return "\n".join(lines).rstrip() + "\n"


def main() -> int:
    """Write the page, or compare it."""
    wanted = text()
    if "--check" not in sys.argv[1:]:
        DOC.write_text(wanted)
        return 0
    if DOC.is_file() and DOC.read_text() == wanted:
        print("docs/recipes.md is up to date")
        return 0
    print("docs/recipes.md does not match moetrain/config/recipe.py: run `make fix`")
    return 1


if __name__ == "__main__":
    sys.exit(main())
