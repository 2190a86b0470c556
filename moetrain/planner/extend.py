"""A large step from small ones: what a rank holds and does grows evenly with its layers and with
its micro-batches, so that steps of few of both say what one of many does.

    f(L, M) = a + b L + c M + d L M

for the bytes at each moment of a step, by category, where M are the micro-batches in flight, and
for each kind of operation and communication, where M are those of the step. Four small steps give
the four numbers. tests/test_plan.py holds them against whole traces.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from moetrain.config.recipe import Recipe
from moetrain.layout.activations import in_flight
from moetrain.layout.mesh import MeshPlan, plan_mesh, stage_layers
from moetrain.models import Model, read_model
from moetrain.planner.steps import micro_batches, with_layers
from moetrain.planner.trace import Kernels, Trace, trace_steps, without_weights
from moetrain.planner.watch import Cost, Profile

LAYERS = (2, 3)  # of a stage, in the small steps
LAYERS_OF_CHUNK = (1, 2)  # where a stage has several


@dataclass(frozen=True)
class _Grid:
    """Where the step stands among the small ones: 0 at the first, 1 at the second."""

    layers: float
    held: float  # micro-batches in flight
    done: float  # micro-batches of the step

    def bytes_of(self, small: Sequence[int]) -> int:
        return max(0, round(_bilinear(small, self.layers, self.held)))

    def count(self, small: Sequence[int]) -> int:
        return max(0, round(_bilinear(small, self.layers, self.done)))


def _bilinear(f: Sequence[int], x: float, y: float) -> float:
    """`f` at (0, 0), (0, 1), (1, 0), (1, 1)."""
    return f[0] + x * (f[2] - f[0]) + y * (f[1] - f[0]) + x * y * (f[3] - f[2] - f[1] + f[0])


def trace_fast(
    recipe: Recipe, rank: int, size: int, num: int | None = None, stands_for: Kernels = "cuda"
) -> Trace:
    """As `trace`, from small steps where the model's layers are alike, else whole.

    Args:
        num: micro-batches of this data-parallel rank in a step; by default as the recipe says.
    """
    recipe = without_weights(recipe)
    assert recipe.model.hf is not None
    model, plan = read_model(recipe.model.hf), plan_mesh(recipe.parallel, size)
    num = num or micro_batches(recipe, plan)
    own = _own_layers(recipe, model, plan, rank)
    unit = plan.pp if plan.vpp > 1 else 1  # micro-batches come in groups where stages interleave
    nums = (unit, 2 * unit)
    few, more = LAYERS if plan.vpp == 1 else LAYERS_OF_CHUNK
    small = [with_layers(recipe, model, layers * plan.pp * plan.vpp) for layers in (few, more)]
    if None in small or own <= more or num <= nums[1]:
        return trace_steps(recipe, rank, size, stands_for, [num])[0]
    steps = [step for each in small if each is not None
             for step in trace_steps(each, rank, size, stands_for, nums)]  # fmt: skip
    flying = [in_flight(plan, steps[0].stage, m) for m in (*nums, num)]
    risen = flying[1] - flying[0]  # 0: the second step shows what one after another adds
    grid = _Grid(
        (own - few) / (more - few),
        (flying[2] - flying[0]) / risen if risen else 1.0,
        (num - nums[0]) / (nums[1] - nums[0]),
    )
    params = round(_bilinear([step.num_params for step in steps], grid.layers, 0))
    profile = _extended(steps, grid)
    return replace(steps[0], num_params=params, num_micro_batches=num, profile=profile)


def _own_layers(recipe: Recipe, model: Model, plan: MeshPlan, rank: int) -> float:
    """Layers of a chunk of this rank's stage."""
    parallel = recipe.parallel
    stages = stage_layers(
        model.num_layers,
        plan.pp,
        plan.vpp,
        parallel.first_stage_layers,
        parallel.last_stage_layers,
    )
    stage = rank * plan.pp // plan.world_size
    return sum(map(len, stages[stage])) / plan.vpp


def _extended(steps: Sequence[Trace], grid: _Grid) -> Profile:
    profiles = [step.profile for step in steps]
    found = Profile(reserved=grid.bytes_of([p.reserved for p in profiles]))
    moments = {moment: None for p in profiles for moment in p.most if moment.phase != "build"}
    for moment in moments:
        held = [p.most.get(moment, {}) for p in profiles]
        names = {name: None for each in held for name in each}
        found.most[moment] = {
            name: grid.bytes_of([each.get(name, 0) for each in held]) for name in names
        }
    found.ops = _costs([p.ops for p in profiles], grid, lambda op: replace(op, shapes=()))
    found.collectives = _costs([p.collectives for p in profiles], grid, lambda kind: kind)
    return found


def _costs[K](
    small: Sequence[Mapping[K, Cost]], grid: _Grid, merge: Callable[[K], K]
) -> dict[K, Cost]:
    """What all steps do extends by itself; what has other shapes in each (an optimizer's buffers,
    which are as long as the stage) together.
    """
    shared = set(small[0]).intersection(*small[1:])
    sums: list[dict[K, Counter[str]]] = []
    for costs in small:
        total: dict[K, Counter[str]] = {}
        for key, cost in costs.items():
            kind = key if key in shared else merge(key)
            total.setdefault(kind, Counter()).update(vars(cost))
        sums.append(total)
    kinds = {kind: None for total in sums for kind in total}
    found: dict[K, Cost] = {}
    for kind in kinds:
        each = [total.get(kind, Counter[str]()) for total in sums]
        found[kind] = Cost(**{name: grid.count([c[name] for c in each]) for name in vars(Cost())})
    return found
