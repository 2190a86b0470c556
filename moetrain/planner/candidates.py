"""The layouts that a search looks at: all that divide the model, the ranks and the batch, within
what a node and a step make sensible. Imports no torch.
"""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from math import lcm
from typing import Any

from moetrain.config.load import recipe_from
from moetrain.config.recipe import ParallelConfig, Recipe
from moetrain.errors import MoetrainError
from moetrain.layout.mesh import check_layout, plan_mesh
from moetrain.layout.passed import check_passed
from moetrain.models import Model

VPP = (1, 2, 4)
MICRO_BATCH = (1, 2, 4)
RECOMPUTE = ("none", "selective", "full")
AXES = ("tp", "cp", "pp", "vpp", "ep", "etp")
STAGES = ("first_stage_layers", "last_stage_layers")
LEAST_TOKENS = 4096  # of a sequence on a rank: context parallelism is not for less


def candidates(recipe: Recipe, model: Model, size: int) -> Iterator[Recipe]:
    """The recipe in every layout of `size` ranks that the run itself would take."""
    train = recipe.train
    for parallel in layouts(recipe, model, size):
        plan = plan_mesh(parallel, size)
        for micro, recompute in product(MICRO_BATCH, RECOMPUTE):
            if not recipe.method.samples and train.global_batch % (plan.dp * micro):
                continue
            num = train.global_batch // (plan.dp * micro)
            if plan.vpp > 1 and (recipe.method.samples or num % plan.pp):
                continue  # Megatron interleaves whole groups of pp micro-batches
            changed = train.model_copy(update={"micro_batch": micro, "recompute": recompute})
            candidate = recipe.model_copy(update={"parallel": parallel, "train": changed})
            if _is_taken(partial(check_passed, candidate, model)):
                yield candidate


def layouts(recipe: Recipe, model: Model, size: int) -> Iterator[ParallelConfig]:
    """Every `parallel` section that divides."""
    node = min(recipe.cluster.gpus_per_node, size)
    most_cp = max(1, recipe.data.seq_len // LEAST_TOKENS)
    for tp, cp, pp in product(_divisors(node), _divisors(size), _divisors(size)):
        if tp * cp * pp > size or cp > most_cp or pp > model.num_layers:
            continue
        for etp, ep, vpp in product(sorted({1, tp}), _divisors(max(1, model.num_experts)), VPP):
            if (vpp > 1 and pp == 1) or vpp * pp > model.num_layers:
                continue
            if size % lcm(tp * cp * pp, etp * ep * pp):
                continue
            parallel = ParallelConfig(tp=tp, cp=cp, pp=pp, etp=etp, ep=ep, vpp=vpp)
            content = recipe.model_dump(mode="json") | {"parallel": parallel.model_dump()}
            if _is_taken(
                partial(check_layout, model, parallel, recipe.data.seq_len),
                partial(recipe_from, content),
            ):
                yield parallel
                if pp > 1 and vpp == 1 and (last := shorter_last(model, recipe, pp)):
                    yield parallel.model_copy(update={"last_stage_layers": last})


def shorter_last(model: Model, recipe: Recipe, pp: int) -> int | None:
    """Layers of the last of `pp` stages so that it takes as long with its head as the others; None
    where that is what it has anyway.
    """
    tokens = recipe.data.seq_len
    pairs = tokens * tokens // 2
    layer = model.layers[-1]
    head = model.heads.flops(tokens, 0) / (
        layer.attention.flops(tokens, pairs) + layer.mlp.flops(tokens, pairs)
    )
    last = round((model.num_layers - head * (pp - 1)) / pp)
    return last if 0 < last < model.num_layers // pp else None


def _is_taken(*checks: Callable[[], object]) -> bool:
    try:
        for check in checks:
            check()
    except MoetrainError:
        return False
    return True


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def changed(recipe: Recipe, other: Recipe) -> dict[str, Any]:
    """Keys of a layout that `other` has otherwise -> its values, as a command line takes them."""
    keys: dict[str, Any] = {}
    for axis in AXES:
        before, now = (getattr(r.parallel, axis) or 1 for r in (recipe, other))
        if before != now:
            keys[f"parallel.{axis}"] = now
    for name in STAGES:
        before, now = (getattr(r.parallel, name) for r in (recipe, other))
        if before != now:
            keys[f"parallel.{name}"] = "null" if now is None else now
    for name in ("micro_batch", "recompute"):
        before, now = (getattr(r.train, name) for r in (recipe, other))
        if before != now:
            keys[f"train.{name}"] = now
    if recipe.optim.offload != other.optim.offload:
        keys["optim.offload"] = other.optim.offload
    return keys
