"""The layouts that a search looks at: all that divide the model, the ranks and the batch, within
what a node and a step make sensible. Imports no torch.
"""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from math import lcm

from moetrain.config.load import recipe_from
from moetrain.config.recipe import ParallelConfig, Recipe
from moetrain.errors import MoetrainError
from moetrain.layout.mesh import check_layout, plan_mesh
from moetrain.layout.passed import check_passed
from moetrain.models import Model

VPP = (1, 2, 4)
MICRO_BATCH = (1, 2, 4)
RECOMPUTE = ("none", "selective", "full")
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


def _is_taken(*checks: Callable[[], object]) -> bool:
    try:
        for check in checks:
            check()
    except MoetrainError:
        return False
    return True


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]
