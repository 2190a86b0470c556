"""Seconds of a collective: which of a group's ranks share a node, by the layout's order of ranks,
and what goes over NVLink and over the network. Imports no torch.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from moetrain.layout.mesh import MeshPlan
from moetrain.planner.gpu import Gpu, pick

if TYPE_CHECKING:
    from moetrain.planner.watch import Collective, Cost

ONCE = ("DATA_PARALLEL", "EMBEDDING")  # groups whose traffic comes once a step


@dataclass(frozen=True)
class Group:
    """Ranks that talk to each other: every `stride`th, so many of them."""

    ranks: int
    stride: int

    def on_node(self, gpus_per_node: int) -> int:
        """How many of them are on a node."""
        return max(1, min(self.ranks, gpus_per_node // self.stride))


def group_of(name: str, ranks: int, plan: MeshPlan) -> Group:
    """A group of megatron-core by its description, in the order tp-cp-ep-dp-pp."""
    strides = {
        "PIPELINE_MODEL_PARALLEL_GROUP": plan.world_size // plan.pp,
        "EMBEDDING_GROUP": plan.world_size // plan.pp,
        "CONTEXT_PARALLEL_GROUP": plan.tp,
        "DATA_PARALLEL_GROUP": plan.tp * plan.cp,
        "DATA_PARALLEL_GROUP_WITH_CP": plan.tp,
        "EXPERT_MODEL_PARALLEL_GROUP": plan.etp,
        "EXPERT_DATA_PARALLEL_GROUP": plan.etp * plan.ep,
    }
    return Group(ranks, strides.get(name, 1))


def is_once(kind: "Collective") -> bool:
    """Whether it is of a step, and not of each micro-batch."""
    return any(name in kind.group for name in ONCE) or kind.group == "default_pg"


def is_pipeline(kind: "Collective") -> bool:
    """Whether it goes from stage to stage; megatron-core sends from default_pg where vpp is on."""
    return kind.name in ("send", "recv")


def seconds_of(
    kind: "Collective", cost: "Cost", plan: MeshPlan, gpu: Gpu, *, top_k: int = 0
) -> float:
    """Of all collectives of a kind.

    top_k: experts a token goes to, where the dispatcher sends it once to a node of several of them
    (DeepEP, HybridEP).
    """
    if is_pipeline(kind):
        group = group_of("PIPELINE_MODEL_PARALLEL_GROUP", plan.pp, plan)
        # What a stage sends it also gets, at the same time.
        return 0.0 if kind.name == "recv" else _of_message(cost, group, gpu)
    group = group_of(kind.group, kind.ranks, plan)
    n = group.ranks
    if n == 1:
        return 0.0
    here = group.on_node(round(gpu.gpus_per_node.value))
    near, far = _rates(gpu, kind.name)
    latency = cost.times * _latency(group, gpu)
    if kind.name == "alltoall":
        nodes = n / here
        nearby = cost.num_bytes * (here - 1) / n
        away = cost.num_bytes * (n - here) / n
        if top_k and nodes > 1:
            away *= _distinct(nodes, top_k) / (top_k * (nodes - 1) / nodes)
            nearby += away * (here - 1) / here  # what came for others of the node
        return latency + max(nearby / near, away / far)
    factor = 2 if kind.name == "allreduce" else 1
    sent = factor * cost.num_bytes * (n - 1) / n
    # A ring over nodes leaves each of them by as many network cards as it has ranks there.
    return latency + sent / (near if here == n else min(near, here * far))


def _distinct(nodes: float, top_k: int) -> float:
    """Other nodes that a token goes to, in the mean, where its experts are drawn evenly."""
    return (nodes - 1) * (1 - (1 - 1 / nodes) ** top_k)


def _rates(gpu: Gpu, name: str) -> tuple[float, float]:
    """Bytes a second of a collective: in a node, between nodes."""
    near = gpu.nvlink_gbps.value * pick(gpu.nvlink_share, name).value
    return near * 1e9, gpu.network_gbps.value * pick(gpu.network_share, name).value * 1e9


def _latency(group: Group, gpu: Gpu) -> float:
    is_near = group.on_node(round(gpu.gpus_per_node.value)) == group.ranks
    return (gpu.collective_us if is_near else gpu.network_us).value / 1e6


def _of_message(cost: "Cost", group: Group, gpu: Gpu) -> float:
    near, far = _rates(gpu, "send")
    is_near = group.on_node(round(gpu.gpus_per_node.value)) == group.ranks
    rate = near if is_near else far
    return cost.times * _latency(group, gpu) + cost.num_bytes / rate
