"""A large step from small ones: what a rank holds and does grows evenly with its layers and with
its micro-batches, so that steps of few of both say what one of many does.

    bytes = a + b layers + c passes + d passes layers of a chunk

at each moment of a step and for each category, where passes are those through a chunk that wait for
their backward pass; and for each kind of operation and communication the same with the step's
micro-batches as passes. Four small steps give the four numbers, without interleaved stages, which
the formula puts in. tests/test_plan_extend.py holds them against whole traces.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from moetrain.config.recipe import Recipe
from moetrain.layout.activations import in_flight, num_micro_batches
from moetrain.layout.mesh import MeshPlan, plan_mesh, stage_layers
from moetrain.models import Model
from moetrain.models.lookup import model_of
from moetrain.planner.fewer_layers import with_layers
from moetrain.planner.trace import Kernels, Trace, filling, trace_steps, without_weights
from moetrain.planner.watch import Cost, Profile

LAYERS = (2, 3)  # of a stage, in the small steps
PASSES = (1, 2)  # micro-batches of theirs


@dataclass(frozen=True)
class _Line:
    """The four numbers."""

    base: float
    layer: float
    each: float  # pass
    both: float

    @classmethod
    def through(cls, f: Sequence[float]) -> "_Line":
        """Of values at (layers, passes) (2, 1), (2, 2), (3, 1), (3, 2)."""
        layers, passes = LAYERS[0], PASSES[0]
        both = f[3] - f[2] - f[1] + f[0]
        layer, each = f[2] - f[0] - both * passes, f[1] - f[0] - both * layers
        return cls(
            f[0] - layer * layers - each * passes - both * layers * passes, layer, each, both
        )

    def at(self, layers: float, of_chunk: float, passes: float) -> float:
        return self.base + self.layer * layers + passes * (self.each + self.both * of_chunk)


@dataclass(frozen=True)
class _Step:
    """The large one, of one rank."""

    layers: float
    of_chunk: float
    held: int  # passes at once
    done: int  # micro-batches
    vpp: int

    def bytes_of(self, here: Sequence[int], first: Sequence[int]) -> int:
        """here: of this rank's small steps; first: of the first stage's, where a second pass waits
        beside the first.
        """
        line = _Line.through(first)
        if here is first:
            return max(0, round(line.at(self.layers, self.of_chunk, self.held)))
        # The last stage holds one pass at once; its second step shows what one after another adds.
        alone = _Line.through((here[1], here[1], here[3], here[3]))
        more = (self.held - 1) * (line.each + line.both * self.of_chunk)
        more -= line.both * (self.layers - self.of_chunk)  # a pass goes through a chunk of them
        return max(0, round(alone.at(self.layers, self.of_chunk, 1) + more))

    def count(self, small: Sequence[int]) -> int:
        return max(0, round(_Line.through(small).at(self.layers, self.layers, self.done)))


def trace_fast(
    recipe: Recipe,
    ranks: Sequence[int],
    size: int,
    num: int | None = None,
    stands_for: Kernels = "cuda",
) -> list[Trace]:
    """As `trace`, of each of these ranks, from small steps where the model's layers are alike, else
    whole.

    Args:
        num: micro-batches of a data-parallel rank in a step; by default as the recipe says.
    """
    recipe = without_weights(recipe)
    model, plan = model_of(recipe), plan_mesh(recipe.parallel, size)
    num = num or num_micro_batches(recipe, plan)
    plain = recipe.parallel.model_copy(update={"vpp": None})
    plain_recipe = recipe.model_copy(update={"parallel": plain})
    small = [with_layers(plain_recipe, model, layers * plan.pp) for layers in LAYERS]
    steps: dict[int, list[Trace]] = {}

    def steps_of(rank: int) -> list[Trace]:
        if rank not in steps:
            steps[rank] = []
            for each in filter(None, small):
                steps[rank] += trace_steps(each, rank, size, stands_for, PASSES)
        return steps[rank]

    traces: list[Trace] = []
    for rank in ranks:
        layers = _layers(recipe, model, plan, rank)
        if None in small or layers <= LAYERS[1] or (num <= PASSES[1] and plan.vpp == 1):
            traces.append(_fewer_passes(recipe, rank, size, stands_for, num))
            continue
        here = steps_of(rank)
        stage = here[0].stage
        held = in_flight(plan, stage, num)
        is_last = stage == plan.pp - 1
        first = steps_of(0) if is_last and held > 1 else here
        step = _Step(layers, layers / plan.vpp, held, num, plan.vpp)
        params = _Line.through([each.num_params for each in here]).at(layers, 0, 0)
        profile = _extended(here, first, step, alone=is_last)
        traces.append(Trace(rank, stage, round(params), num, profile))
    return traces


def _fewer_passes(recipe: Recipe, rank: int, size: int, stands_for: Kernels, num: int) -> Trace:
    """A step of all layers, from two of fewer micro-batches where it has more than fill the
    pipeline twice: from there on each adds the same.
    """
    few, more = filling(plan_mesh(recipe.parallel, size))
    if num <= more:
        return trace_steps(recipe, rank, size, stands_for, [num])[0]
    small = trace_steps(recipe, rank, size, stands_for, [few, more])
    times = (num - more) / (more - few)
    before, after = (each.profile for each in small)

    def on(a: float, b: float) -> int:
        return max(0, round(b + times * (b - a)))

    most = {
        moment: {
            name: on(before.most.get(moment, {}).get(name, 0), size) for name, size in held.items()
        }
        for moment, held in after.most.items()
    }
    profile = replace(after, most=most, ops={}, collectives={})
    profile.reserved += profile.peak - after.peak  # its pages grow by chance in so few
    for key, costs in (("ops", after.ops), ("collectives", after.collectives)):
        costs_before = getattr(before, key)
        for kind, cost in costs.items():
            was = vars(costs_before.get(kind, Cost()))
            getattr(profile, key)[kind] = Cost(**{n: on(was[n], c) for n, c in vars(cost).items()})
    return replace(small[1], num_micro_batches=num, profile=profile)


def _layers(recipe: Recipe, model: Model, plan: MeshPlan, rank: int) -> int:
    """Of this rank's stage."""
    parallel = recipe.parallel
    stages = stage_layers(
        model.num_layers,
        plan.pp,
        plan.vpp,
        parallel.first_stage_layers,
        parallel.last_stage_layers,
    )
    stage = rank * plan.pp // plan.world_size
    return sum(map(len, stages[stage]))


def _extended(
    here: Sequence[Trace], first: Sequence[Trace], step: _Step, *, alone: bool
) -> Profile:
    """alone: it holds one pass at once in the small steps."""
    profiles = [each.profile for each in here]
    others = [each.profile for each in first]

    def size(values: Callable[[Profile], int]) -> int:
        values_here = [values(p) for p in profiles]
        return step.bytes_of(values_here, [values(p) for p in others] if alone else values_here)

    profile = Profile(reserved=size(lambda p: p.reserved), on_host=size(lambda p: p.on_host))
    moments = {moment: None for p in profiles for moment in p.most if moment.phase != "build"}
    for moment in moments:
        names = {name: None for p in profiles for name in p.most.get(moment, {})}
        profile.most[moment] = {
            name: size(lambda p, m=moment, n=name: p.most.get(m, {}).get(n, 0)) for name in names
        }
    profile.ops = _costs([p.ops for p in profiles], step, lambda op: replace(op, shapes=()))
    profile.collectives = _costs([p.collectives for p in profiles], step, lambda kind: kind)
    for kind, cost in profile.collectives.items():
        if kind.name in ("send", "recv"):  # once a chunk
            cost.times *= step.vpp
            cost.num_bytes *= step.vpp
    return profile


def _costs[K](
    small: Sequence[Mapping[K, Cost]], step: _Step, merge: Callable[[K], K]
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
    costs_of_step: dict[K, Cost] = {}
    for kind in kinds:
        each = [total.get(kind, Counter[str]()) for total in sums]
        cost = Cost(**{name: step.count([c[name] for c in each]) for name in vars(Cost())})
        if cost.flops or cost.num_bytes:
            costs_of_step[kind] = replace(cost, times=max(1, cost.times))
    return costs_of_step
