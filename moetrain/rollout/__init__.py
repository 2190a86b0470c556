"""Rollout engines by the name that a recipe gives them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from moetrain.config.recipe import Recipe
from moetrain.rollout.base import RolloutEngine


def _embedded(recipe: Recipe, hf: dict[str, Any], tokenizer: Path) -> RolloutEngine:
    from moetrain.rollout.embedded import Embedded

    return Embedded(hf, tokenizer)


def _vllm(recipe: Recipe, hf: dict[str, Any], tokenizer: Path) -> RolloutEngine:
    from moetrain.rollout.opening import open_fleet

    return open_fleet(recipe, hf, tokenizer)


ENGINES: dict[str, Callable[[Recipe, dict[str, Any], Path], RolloutEngine]] = {
    "embedded": _embedded,
    "vllm": _vllm,
}


def open_engine(recipe: Recipe, hf: dict[str, Any], tokenizer: Path) -> RolloutEngine:
    """The recipe's rollout engine, ready for its first push.

    `hf` is the model's config.json, `tokenizer` a folder. Raises RolloutError.
    """
    _, rollout = recipe.sampling
    return ENGINES[rollout.engine](recipe, hf, tokenizer)
