"""Models with fewer layers that stand for large ones. Imports no torch."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from moetrain.config.recipe import Recipe
from moetrain.models import Model
from moetrain.models.model import Layer


def with_layers(recipe: Recipe, model: Model, num: int) -> Recipe | None:
    """The recipe with a model of `num` layers; None where its layers are not alike, or not treated
    alike. A window makes no difference: it changes no size, and a trace counts all keys.
    """
    kinds = {_without_window(layer) for layer in model.layers}
    if len(kinds) > 1 or _tells_layers_apart(recipe):
        return None
    hf: dict[str, Any] = {
        name: value[:num] if isinstance(value, list) and len(value) == model.num_layers else value
        for name, value in (recipe.model.hf or {}).items()
    }
    smaller = recipe.model.model_copy(update={"hf": hf | {"num_hidden_layers": num}})
    return evenly(recipe.model_copy(update={"model": smaller}))


def _without_window(layer: Layer) -> Layer:
    return replace(layer, attention=replace(layer.attention, window=None))


def evenly(recipe: Recipe) -> Recipe:
    """The recipe without lengths of its first and last stage."""
    even = {"first_stage_layers": None, "last_stage_layers": None}
    parallel = recipe.parallel.model_copy(update=even)
    return recipe.model_copy(update={"parallel": parallel})


def _tells_layers_apart(recipe: Recipe) -> bool:
    """Whether some layers are trained, adapted or computed again unlike others."""
    has_folder = recipe.adapter is not None and recipe.adapter.path is not None
    if has_folder or "recompute_num_layers" in recipe.megatron:
        return True
    return any(char.isdigit() for pattern in _patterns(recipe) for char in pattern)


def _patterns(recipe: Recipe) -> Iterator[str]:
    yield from recipe.trainable or ()
    if recipe.adapter is not None:
        yield from recipe.adapter.target
    for group in recipe.optim.groups:
        yield from group.match
