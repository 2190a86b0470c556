"""Rollout engines by the name that a recipe gives them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from moetrain.config.reads import SERVER_RULE, leave_out, unread
from moetrain.config.recipe import Recipe
from moetrain.config.rollout import MOST_KEPT
from moetrain.errors import RolloutError
from moetrain.rollout.base import RolloutEngine


def _embedded(recipe: Recipe, hf: dict[str, Any], tokenizer: Path) -> RolloutEngine:
    from moetrain.rollout.embedded import Embedded

    return Embedded(hf, tokenizer)


def _vllm(recipe: Recipe, hf: dict[str, Any], tokenizer: Path) -> RolloutEngine:
    from moetrain.rollout.opening import open_fleet

    return open_fleet(recipe, hf, tokenizer)


def _check_vllm(recipe: Recipe) -> None:
    from moetrain.rollout.opening import check_fleet

    check_fleet(recipe)


class EngineKind(NamedTuple):
    """How a rollout engine is opened, and what is looked at before."""

    open: Callable[[Recipe, dict[str, Any], Path], RolloutEngine]
    check: Callable[[Recipe], None] = lambda recipe: None


ENGINES = {"embedded": EngineKind(_embedded), "vllm": EngineKind(_vllm, _check_vllm)}


def check_engine(recipe: Recipe) -> None:
    """Raises RolloutError where `open_engine` would for want of something on this machine, and for
    keys that the engine would not read: before minutes go into a model.
    """
    _, rollout = recipe.sampling
    unused = dict(unread(recipe, (SERVER_RULE,)))
    if unused:
        raise RolloutError(f"{leave_out(unused)}.")
    if rollout.top_k > MOST_KEPT:
        raise RolloutError(
            f"rollout.top_k={rollout.top_k}: training records the tokens that could be drawn, at"
            f" most {MOST_KEPT} a place. Give no more, or leave it out for all."
        )
    if rollout.replay is None:
        ENGINES[rollout.engine].check(recipe)


def open_engine(recipe: Recipe, hf: dict[str, Any], tokenizer: Path) -> RolloutEngine:
    """The recipe's rollout engine, ready for its first push.

    `hf` is the model's config.json, `tokenizer` a folder. Raises RolloutError.
    """
    _, rollout = recipe.sampling
    return ENGINES[rollout.engine].open(recipe, hf, tokenizer)
