"""Seconds of a step from what a trace of each stage counted: operations by their rooflines,
collectives by their links, the pipeline's bubble, and what is hidden behind what. Imports no torch.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from moetrain.config.recipe import Recipe
from moetrain.layout.activations import num_micro_batches
from moetrain.layout.mesh import MeshPlan, plan_mesh
from moetrain.models import Model
from moetrain.planner import offload
from moetrain.planner.gpu import Gpu
from moetrain.planner.links import is_once, is_pipeline, seconds_of
from moetrain.planner.roofline import work_of

if TYPE_CHECKING:
    from moetrain.planner.trace import Trace

# Tokens of the fullest expert-parallel rank over the mean where nobody balances: fitted on 199.1
# TFLOP/s of Qwen3-30B-A3B beside 299.4 with forced balance (tools/bench/calibrate.py).
NATURAL_LOAD = 2.26
BEFORE = "log-probs"  # the phase of passes without a gradient, in methods that sample


@dataclass(frozen=True)
class Seconds:
    """Of one step. The parts of `total` are `compute`, `exposed`, `bubble`, `launch`, `optimizer`
    and `before`.
    """

    total: float
    compute: Mapping[str, float]  # of the slowest stage, by part: passes over all micro-batches
    exposed: Mapping[str, float]  # communication that it waits for, by group
    hidden: Mapping[str, float]  # and what computation hides
    bubble: float
    launch: float  # of the passes, where the device waits for the host
    optimizer: float
    before: float  # passes before the step, in methods that sample
    slowest: int  # stage
    tokens_per_s: float  # a GPU
    tflops: float  # a GPU, of the model's own operations

    @property
    def bubble_share(self) -> float:
        """Of the step."""
        return self.bubble / self.total

    @property
    def exposed_s(self) -> float:
        """All communication that is waited for."""
        return sum(self.exposed.values())


@dataclass(frozen=True)
class _Stage:
    """Of one stage: a micro-batch's seconds, and what comes once a step."""

    compute: dict[str, float]
    exposed: dict[str, float]
    hidden: dict[str, float]
    once: dict[str, float]  # gradients and weights of data parallelism, by group
    sent: dict[str, float]  # to the next stage
    launch: float
    optimizer: float
    before: float
    waits: float  # collectives of a micro-batch in which ranks wait for each other
    waits_once: int  # of a step

    @property
    def seconds(self) -> float:
        return sum(self.compute.values()) + sum(self.exposed.values()) + self.launch


def step_seconds(
    recipe: Recipe,
    size: int,
    traces: "Sequence[Trace]",
    gpu: Gpu,
    model: Model,
    *,
    num_micro: int | None = None,
    load: float = 1.0,
    fused: bool | None = None,
    vpp: int | None = None,
) -> Seconds:
    """A step of `recipe` on `size` ranks.

    Args:
        traces: of a rank of each stage, in order; or of some stages, each standing for those from
            it to the next. Of fewer micro-batches than the step has, if need be.
        num_micro: micro-batches of a step; by default the recipe's.
        load: tokens of the fullest expert-parallel rank over the mean.
        fused: with Transformer Engine's kernels; by default where model.backend is te.
        vpp: chunks a stage, where the traces are without.
    """
    plan = plan_mesh(recipe.parallel, size)
    m = num_micro or num_micro_batches(recipe, plan)
    stages = _stages(recipe, plan, traces, gpu, model, load, fused)
    slowest = max(range(plan.pp), key=lambda i: stages[i].seconds)
    worst = stages[slowest]
    # A step fills and drains the pipeline: each stage but the slowest works once while that waits,
    # on one of its vpp chunks.
    fill = sum(stage.seconds for stage in stages) - worst.seconds
    bubble = fill / (vpp or plan.vpp)
    hidden = {group: m * s for group, s in (worst.sent | worst.hidden).items()}
    exposed = {group: m * s for group, s in worst.exposed.items()}
    room = sum(worst.compute.values()) if recipe.train.overlap else 0.0
    for group, seconds in worst.once.items():
        behind = min(seconds, room)  # the last backward pass, and the first forward pass
        room -= behind
        hidden[group] = hidden.get(group, 0.0) + behind
        exposed[group] = exposed.get(group, 0.0) + seconds - behind
    compute = {part: m * seconds for part, seconds in worst.compute.items()}
    exposed["skew"] = _skew(worst, m, sum(compute.values()) + worst.optimizer + bubble, gpu)
    total = sum(compute.values()) + sum(exposed.values()) + bubble + m * worst.launch
    total += worst.optimizer + worst.before * m
    tokens = recipe.data.seq_len * recipe.train.micro_batch * m * plan.dp
    return Seconds(
        total=total,
        compute=compute,
        exposed={k: v for k, v in exposed.items() if v},
        hidden={k: v for k, v in hidden.items() if v},
        bubble=bubble,
        launch=m * worst.launch,
        optimizer=worst.optimizer,
        before=worst.before * m,
        slowest=slowest,
        tokens_per_s=tokens / total / size,
        tflops=tokens * flops_per_token(model, recipe.data.seq_len) / total / size / 1e12,
    )


def _stages(
    recipe: Recipe,
    plan: MeshPlan,
    traces: "Sequence[Trace]",
    gpu: Gpu,
    model: Model,
    load: float,
    fused: bool | None,
) -> "list[_Stage]":
    fused = recipe.model.backend == "te" if fused is None else fused
    flex = recipe.megatron.get("moe_token_dispatcher_type") == "flex"
    top_k = model.moe.experts.top_k if flex and model.moe is not None else 0
    seen = {t.stage: _stage(t, plan, gpu, fused, load, top_k) for t in traces}
    for t in traces:
        host = offload.seconds(recipe, gpu, t.profile.on_host)
        seen[t.stage] = replace(seen[t.stage], optimizer=seen[t.stage].optimizer + host)
    stages = [seen[max(s for s in seen if s <= i)] for i in range(plan.pp)]
    hides_sends = recipe.megatron.get("overlap_p2p_comm", bool(recipe.parallel.vpp))
    return stages if hides_sends else [_with_sends(stage) for stage in stages]


def _skew(stage: _Stage, num_micro: int, work: float, gpu: Gpu) -> float:
    """Seconds that ranks wait for the last of them, in `work` seconds of computation."""
    waits = stage.waits * num_micro + stage.waits_once
    return work * gpu.skew.at(work / waits) if gpu.skew is not None and waits and work else 0.0


def _sums() -> dict[str, float]:
    return defaultdict(float)


def flops_per_token(model: Model, seq_len: int) -> float:
    """Of a forward and a backward pass, as peers count them: attention's causal half, nothing
    computed again.
    """
    return 3 * model.flops(seq_len, seq_len * (seq_len + 1) // 2) / seq_len


def _stage(
    trace: "Trace", plan: MeshPlan, gpu: Gpu, fused: bool, load: float, top_k: int
) -> _Stage:
    """What a trace's operations and collectives take, of one micro-batch and once."""
    num = trace.num_micro_batches
    compute = _sums()
    optimizer = before = 0.0
    launches = 0
    for op, cost in trace.profile.ops.items():
        if op.phase not in ("step", BEFORE):
            continue
        work = work_of(op, cost, gpu, fused=fused, load=load)
        seconds = work.seconds
        if not gpu.asynchronous:
            seconds += work.launches * gpu.launch_us.value / 1e6
        if op.phase == BEFORE:
            before += seconds / num
        elif op.part == "optimizer":
            optimizer += seconds
        else:
            compute[op.part] += seconds / num
            launches += work.launches
    exposed = _sums()
    once = _sums()
    sent = _sums()
    hidden = _sums()
    waits, waits_once = 0.0, 0
    for kind, cost in trace.profile.collectives.items():
        if kind.phase not in ("step", BEFORE):
            continue
        seconds = seconds_of(kind, cost, plan, gpu, top_k=top_k)
        if seconds and kind.phase != BEFORE:
            waits += 0 if is_once(kind) else cost.times / num
            waits_once += cost.times if is_once(kind) else 0
        if kind.group == "EXPERT_MODEL_PARALLEL_GROUP":
            seconds *= load
            if top_k and kind.phase != BEFORE:
                waited = gpu.dispatch_exposed.value
                hidden[kind.group] += (1 - waited) * seconds / num
                seconds *= waited
        if kind.phase == BEFORE:
            before += seconds / num
        elif is_pipeline(kind):
            sent["PIPELINE_MODEL_PARALLEL_GROUP"] += seconds / num
        elif is_once(kind):
            once[kind.group] += seconds
        else:
            exposed[kind.group] += seconds / num
    launch = 0.0
    if gpu.asynchronous:
        host = launches / num * gpu.launch_us.value / 1e6
        launch = max(0.0, host - sum(compute.values()) - sum(exposed.values()))
    times = (waits, waits_once)
    return _Stage(compute, exposed, hidden, once, sent, launch, optimizer, before, *times)


def _with_sends(stage: _Stage) -> _Stage:
    return replace(stage, exposed=stage.exposed | stage.sent, sent=_sums())
