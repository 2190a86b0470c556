"""Training steps of any rank of any layout, without values and without a GPU: the engine itself
runs on the meta device and is watched.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from moetrain.config.recipe import ModelConfig, Recipe
from moetrain.engine import Engine
from moetrain.engine.optim import start_state
from moetrain.engine.step import Runner
from moetrain.engine.world import World, meta_world
from moetrain.layout.activations import num_micro_batches
from moetrain.layout.mesh import MeshPlan
from moetrain.methods import METHODS
from moetrain.models.lookup import find_model
from moetrain.ops.packed import Packed
from moetrain.planner.offload import without
from moetrain.planner.packs import pack_of
from moetrain.planner.shapes import MetaWatch
from moetrain.planner.watch import SMALLEST, Profile, Watch

Kernels = Literal["cpu", "cuda"]


@dataclass(frozen=True)
class Trace:
    """What one rank holds and does in a step."""

    rank: int
    stage: int
    num_params: int  # local
    num_micro_batches: int
    profile: Profile


def trace(
    recipe: Recipe,
    rank: int,
    size: int,
    stands_for: Kernels = "cuda",
    packs: Sequence[Packed] | None = None,
) -> Trace:
    """Rank `rank` of `size` takes a step with the kernels of a device that meta `stands_for`.

    The process trains nothing afterwards (`engine.world.meta_world`).

    Args:
        packs: of this data-parallel rank's share of the global batch; by default full ones.

    Raises LayoutError, ConfigError as the run itself would.
    """
    world = meta_world(recipe.parallel, rank, size, stands_for)
    if packs is None:
        num = num_micro_batches(recipe, world.plan) * recipe.train.micro_batch
        packs = [pack_of(recipe)] * num
    return _traces(recipe, world, [packs])[0]


def trace_steps(
    recipe: Recipe, rank: int, size: int, stands_for: Kernels, nums: Sequence[int]
) -> list[Trace]:
    """As `trace`, one engine taking a step of each of these numbers of micro-batches."""
    world = meta_world(recipe.parallel, rank, size, stands_for)
    pack = pack_of(recipe)
    return _traces(recipe, world, [[pack] * (num * recipe.train.micro_batch) for num in nums])


def filling(plan: MeshPlan) -> tuple[int, int]:
    """(micro-batches that fill the pipeline twice, the next number that a step may have): after so
    many each adds the same.
    """
    few = 2 * plan.pp + 1 if plan.vpp == 1 else 3 * plan.pp
    return few, few + (1 if plan.vpp == 1 else plan.pp)  # Megatron interleaves groups of pp


def timeline(recipe: Recipe, rank: int, size: int) -> list[dict[str, int]]:
    """What the rank holds over a step: category -> bytes. Of more micro-batches than `filling` so
    many, as the rest repeats.
    """
    world = meta_world(recipe.parallel, rank, size, "cuda")
    num = min(num_micro_batches(recipe, world.plan), filling(world.plan)[1])
    packs = [pack_of(recipe)] * (num * recipe.train.micro_batch)
    return _traces(recipe, world, [packs], MetaWatch(timeline=True))[0].profile.timeline


def without_weights(recipe: Recipe) -> Recipe:
    """The recipe with its model's config in place of the folder, which need not be here."""
    given = recipe.model
    model = ModelConfig(
        hf=dict(find_model(given, dry=True).hf),
        dtype=given.dtype,
        backend=given.backend,
        init="random",
    )
    return recipe.model_copy(update={"model": model})


def _traces(
    recipe: Recipe,
    world: World,
    steps: Sequence[Sequence[Packed]],
    watch: MetaWatch | None = None,
) -> list[Trace]:
    recipe = without_weights(recipe)
    watch = watch or MetaWatch()
    traces: list[Trace] = []
    with watch:
        engine = watched_engine(recipe, world, watch)
        num_params = sum(p.numel() for chunk in engine.chunks for p in chunk.parameters())
        for packs in steps:
            watched_step(engine, packs, watch)
            num = len(packs) // recipe.train.micro_batch
            profile = _on_device(watch.start_over(), engine)
            traces.append(Trace(world.rank, world.pp_rank, num_params, num, profile))
    return traces


def _on_device(profile: Profile, engine: Engine) -> Profile:
    """Without what the run has on the host: megatron-core splits an optimizer on CUDA alone."""
    tensors = [x for x in _state(engine.optimizer) if x.nbytes >= SMALLEST]  # as they are counted
    main = [p for part in _parts(engine.optimizer) for g in part.param_groups for p in g["params"]]
    state, num = sum(x.nbytes for x in tensors), sum(p.numel() for p in main)
    return without(profile, engine.recipe.optim.offload, state, num)


def watched_engine(recipe: Recipe, world: World, watch: Watch) -> Engine:
    """One that has taken steps before: the optimizer's moments are there."""
    with watch.phase("build"):
        engine = Engine(recipe, world)
    start_state(engine.optimizer)
    _label_state(engine, watch)
    engine.run = _Watched(engine.run.models, world, engine.model, watch=watch)
    return engine


def watched_step(engine: Engine, packs: Sequence[Packed], watch: Watch) -> None:
    """A step, with the passes that come before it in methods that sample."""
    if engine.recipe.method.samples:
        with watch.phase("log-probs"):
            engine.outputs(packs)
    with watch.phase("step"):
        engine.step(packs, METHODS[engine.recipe.method.name])


@dataclass
class _Watched(Runner):
    """Says when the passes over the micro-batches begin and end."""

    watch: Watch = field(kw_only=True)

    def __call__(self, *args: Any, **kwargs: Any) -> list[dict[str, Any]]:
        with self.watch.passes():
            return super().__call__(*args, **kwargs)


def _label_state(engine: Engine, watch: Watch) -> None:
    weights: list[Tensor] = [p for chunk in engine.chunks for p in chunk.parameters()]
    gradients: list[Tensor] = []
    for model in engine.wrapped:
        for buffer in (*model.buffers, *model.expert_parallel_buffers):
            gradients.append(buffer.grad_data)
            if buffer.param_data is not None:
                weights.append(buffer.param_data)
    watch.label(weights, "weights")
    watch.label(gradients, "gradients")
    watch.label(_state(engine.optimizer), "optimizer")


def _state(optimizer: Any) -> list[Tensor]:
    """Main weights and moments."""
    tensors: list[Tensor] = []
    for inner in _parts(optimizer):
        tensors += [p for group in inner.param_groups for p in group["params"]]
        tensors += [
            x for state in inner.state.values() for x in state.values() if isinstance(x, Tensor)
        ]
    return tensors


def _parts(optimizer: Any) -> list[Any]:
    """torch's own optimizers in it."""
    return [part.optimizer for part in getattr(optimizer, "chained_optimizers", [optimizer])]
