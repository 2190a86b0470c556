"""The same steps on real ranks and traced: what each holds at its peak."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, Literal

import torch

from moetrain.config.recipe import Recipe
from moetrain.engine import world as world_module
from moetrain.engine.world import World, open_world
from moetrain.ops.packed import Packed
from moetrain.planner.extend import trace_fast
from moetrain.planner.packs import pack_of
from moetrain.planner.trace import trace, trace_steps, watched_engine, watched_step
from moetrain.planner.watch import Profile, Watch
from moetrain.testing.ranks import recipe_for
from moetrain.testing.tiny import CONFIGS

HF = {**CONFIGS["qwen3_moe"], "num_experts": 8, "moe_intermediate_size": 32, "mlp_only_layers": [1]}
NUM_PACKS = 2

type Case = tuple[dict[str, Any], dict[str, Any]]
"""(parallel, other sections)."""


def _recipe(case: Case) -> Recipe:
    parallel, sections = case
    model = {"path": None, "hf": HF, "dtype": "bf16", "init": "random"}
    given = {"model": model} | sections
    return recipe_for("-", parallel, **given)


def _packs(recipe: Recipe) -> list[Packed]:
    """With routes that give every expert as many tokens: a trace takes routing as balanced."""
    pack = pack_of(recipe)
    num, k = HF["num_hidden_layers"] - 1, HF["num_experts_per_tok"]
    chosen = torch.arange(pack.num_tokens * k).view(-1, 1, k) % HF["num_experts"] + 1
    routes = chosen.expand(-1, num, -1).int()
    return [replace(pack, per_token=pack.per_token | {"routes": routes})] * NUM_PACKS


def _summary(profile: Profile) -> dict[str, Any]:
    bytes_sent = {
        f"{kind.name} {kind.group}": cost.num_bytes
        for kind, cost in profile.collectives.items()
        if kind.phase == "step" and ("TENSOR" in kind.group or "EXPERT" in kind.group)
    }
    return {
        "peaks": profile.peaks(),
        "at_peak": profile.at_peak,
        "sent": bytes_sent,
        "flops": sum(cost.flops for cost in profile.ops.values()),
    }


def _as_on_nccl(recipe: Recipe) -> World:
    """A world in which each axis has a group of its own, by whose name traffic is counted."""
    any_world: Any = world_module
    shared = any_world.shared_by_ranks
    any_world.shared_by_ranks = nullcontext
    try:
        return open_world(recipe.parallel, 1)
    finally:
        any_world.shared_by_ranks = shared


def measured(case: Case) -> dict[str, Any]:
    """Of this rank, with values."""
    recipe = _recipe(case)
    world = _as_on_nccl(recipe)
    watch = Watch(world.device)
    with watch:
        watched_step(watched_engine(recipe, world, watch), _packs(recipe), watch)
    return _summary(watch.profile)


def predicted(
    cases: Sequence[Case], rank: int, size: int, stands_for: Literal["cpu", "cuda"] = "cpu"
) -> list[dict[str, Any]]:
    """Of rank `rank`, without."""
    recipes = [_recipe(case) for case in cases]
    return [_summary(trace(r, rank, size, stands_for, _packs(r)).profile) for r in recipes]


def extended(cases: Sequence[tuple[dict[str, Any], dict[str, Any], int, int, int]]) -> list[Any]:
    """[case][first and last rank]: what small steps say of a large one, and a whole trace of it.
    Of parallel, other sections, ranks, layers and micro-batches; all layers are alike.
    """
    traces: list[Any] = []
    for parallel, sections, size, layers, num in cases:
        hf = HF | {"mlp_only_layers": [], "num_hidden_layers": layers}
        model = {"path": None, "hf": hf, "dtype": "bf16", "init": "random"}
        recipe = recipe_for("-", parallel, **{"model": model} | sections)
        ranks = (0, size - 1)
        whole = [trace_steps(recipe, rank, size, "cuda", [num])[0] for rank in ranks]
        ways = zip(trace_fast(recipe, ranks, size, num), whole, strict=True)
        traces.append(
            [[_summary(t.profile) | {"params": t.num_params} for t in each] for each in ways]
        )
    return traces
