"""What a layout holds and takes, by closed forms: too rough to promise, good enough to leave out
what a trace need not look at. A search scales them by what its traces say. Imports no torch.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from moetrain.config.recipe import ParallelConfig, Recipe
from moetrain.layout.activations import activation_bytes, num_micro_batches, of_layers, shares_of
from moetrain.layout.memory import static_bytes, trained
from moetrain.layout.mesh import MeshPlan, plan_mesh, stage_layers
from moetrain.models import Model, Rule
from moetrain.models.lookup import model_of
from moetrain.models.parts.base import Shares
from moetrain.planner import offload
from moetrain.planner.fewer_layers import evenly, with_layers
from moetrain.planner.gpu import Gpu, pick
from moetrain.planner.teacher import Teacher

NUM_GROUPS = 8  # with traffic of their own: NCCL keeps buffers for each


@dataclass(frozen=True)
class Rough:
    """An estimate."""

    bytes: float  # of the fullest GPU
    seconds: float


class Closed:
    """Estimates for one model, recipe and GPU, at any layout."""

    def __init__(self, recipe: Recipe, model: Model, gpu: Gpu):
        self.model, self.gpu = model, gpu
        self._teacher = Teacher.of(recipe, model)
        self._small = [_learning(recipe, model, num) for num in (2, 4)]
        self._plain = recipe.optim.model_copy(update={"offload": 0.0})
        self._static: dict[tuple[ParallelConfig, float, int], tuple[float, ...]] = {}
        self._layers: dict[Shares, list[int]] = {}
        self._kinds: dict[tuple[float, ...], list[tuple[float, float]]] = {}

    def rough(self, recipe: Recipe, size: int) -> Rough:
        """Of a step of the recipe on `size` ranks."""
        model, gpu = self.model, self.gpu
        plan = plan_mesh(recipe.parallel, size)
        static = self._static_of(recipe, plan)
        shares = shares_of(plan, recipe)
        if shares not in self._layers:
            self._layers[shares] = of_layers(model, shares)
        more = activation_bytes(model, plan, recipe, self._layers[shares])
        teacher = [0] * plan.pp if self._teacher is None else self._teacher.bytes_of(recipe, size)
        held = max(map(sum, zip(static, more, teacher, strict=True)))
        seconds = _passes(recipe, model, plan, gpu)
        if recipe.optim.offload:
            on_device = recipe.model_copy(update={"optim": self._plain})
            all_of_it = self._static_of(on_device, plan)
            away = max(a - b for a, b in zip(all_of_it, static, strict=True))
            seconds += offload.seconds(recipe, gpu, away / offload.STATE)
        return Rough(held + fixed(gpu, size), seconds)

    def _static_of(self, recipe: Recipe, plan: MeshPlan) -> tuple[float, ...]:
        key = (recipe.parallel, recipe.optim.offload, plan.world_size)
        if key not in self._static:
            self._static[key] = self._static_bytes(recipe, plan)
        return self._static[key]

    def _static_bytes(self, recipe: Recipe, plan: MeshPlan) -> tuple[float, ...]:
        """Of each stage: from two and four layers on two stages, where layers are alike."""
        if None in self._small:
            stages = static_bytes(self.model, plan, recipe, trained(recipe, self.model))
            return tuple(s.total for s in stages)
        fewest = 2 / min(plan.pp, 2)  # layers of a stage in the smaller one
        kinds = self._of_few(recipe, plan)
        return tuple(
            a + (layers / fewest - 1) * (b - a)
            for i, layers in enumerate(_stages(recipe, self.model, plan))
            for a, b in [kinds[-1] if i == plan.pp - 1 else kinds[0]]
        )

    def _of_few(self, recipe: Recipe, plan: MeshPlan) -> list[tuple[float, float]]:
        """Of the first and the last of two stages, or of the only one: (fewer layers, more)."""
        small = replace(plan, pp=min(plan.pp, 2), vpp=1)
        sizes = (small.tp, small.etp, small.ep, small.dp * small.cp, small.edp, small.pp)
        key = (*sizes, recipe.optim.offload)
        if key not in self._kinds:
            low, high = (
                [float(s.total) for s in static_bytes(each[0], small, evenly(recipe), each[1])]
                for each in self._small
                if each is not None
            )
            self._kinds[key] = list(zip(low, high, strict=True))
        return self._kinds[key]


def fixed(gpu: Gpu, size: int) -> int:
    """Bytes of a GPU that are no tensors, where `size` of them work together."""
    return gpu.fixed_bytes(NUM_GROUPS if size > 1 else 0)


type Learning = tuple[Model, Mapping[str, Rule]]
"""A model, and its table of what is trained."""


def _learning(recipe: Recipe, model: Model, num: int) -> Learning | None:
    small = with_layers(recipe, model, num)
    if small is None or model.num_layers <= num:
        return None
    fewer = model_of(small)
    return fewer, trained(small, fewer)


def _stages(recipe: Recipe, model: Model, plan: MeshPlan) -> list[int]:
    """Layers of each stage."""
    parallel = recipe.parallel
    ends = (parallel.first_stage_layers, parallel.last_stage_layers)
    stages = stage_layers(model.num_layers, plan.pp, plan.vpp, *ends)
    return [sum(map(len, chunks)) for chunks in stages]


def _passes(recipe: Recipe, model: Model, plan: MeshPlan, gpu: Gpu) -> float:
    """Of all micro-batches through the pipeline."""
    num = num_micro_batches(recipe, plan)
    layer = _layer(recipe, model, plan, gpu)
    stages = [layers * layer for layers in _stages(recipe, model, plan)]
    stages[-1] += _head(recipe, model, plan, gpu)
    slowest = max(stages)
    return slowest * num + (sum(stages) - slowest) / plan.vpp


def _rounds(recipe: Recipe) -> float:
    """Forward passes that a micro-batch costs: a backward pass is two, one where weights are
    frozen.
    """
    backward = 1.0 if recipe.adapter is not None else 2.0
    return (
        1
        + backward
        + (recipe.train.recompute == "full")
        + 0.1 * (recipe.train.recompute == "selective")
    )


def _layer(recipe: Recipe, model: Model, plan: MeshPlan, gpu: Gpu) -> float:
    """Seconds of a layer for a micro-batch, there and back."""
    layer, size = model.layers[-1], recipe.data.seq_len
    tokens = size * recipe.train.micro_batch // plan.cp
    pairs = tokens * size // 2
    peak = gpu.peak(recipe.model.dtype)
    width = 4 if recipe.model.dtype == "fp32" else 2
    gemm = pick(gpu.gemm, recipe.model.dtype).at(max(1, min(tokens // plan.tp, model.hidden)))
    seconds = layer.attention.flops(tokens, pairs) / plan.tp / (peak * gemm)
    share = gemm
    if model.moe is not None:
        top_k = model.moe.experts.top_k
        rows = max(1, tokens * top_k * plan.ep // (plan.tp * model.num_experts))
        share = pick(gpu.grouped, recipe.model.dtype).at(rows)
        sent = tokens / plan.tp * top_k * model.hidden * width * (plan.ep - 1) / plan.ep
        seconds += 2 * sent / _rate(gpu, plan.etp * plan.ep)
    seconds += layer.mlp.flops(tokens, pairs) / plan.tp / (peak * share)
    values = tokens * model.hidden * width
    seconds += 4 * values * (plan.tp - 1) / plan.tp / _rate(gpu, plan.tp)
    # Norms, rotations, routing and copies read and write the tokens' values about twenty times.
    seconds += 20 * values / plan.tp / (gpu.memory_gbps.value * 1e9)
    return seconds * _rounds(recipe)


def _rate(gpu: Gpu, ranks: int) -> float:
    """Bytes a second between so many ranks that lie next to each other."""
    near = ranks <= round(gpu.gpus_per_node.value)
    return (gpu.nvlink_gbps.value if near else gpu.network_gbps.value) * 0.7e9


def _head(recipe: Recipe, model: Model, plan: MeshPlan, gpu: Gpu) -> float:
    """Of the last stage: logits, made again in the backward pass."""
    tokens = recipe.data.seq_len * recipe.train.micro_batch // plan.cp
    flops = model.heads.flops(tokens, 0) / plan.tp
    return flops * (_rounds(recipe) + 1) / (gpu.peak(recipe.model.dtype) * 0.5)
