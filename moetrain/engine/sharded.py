"""Parameters as Megatron's distributed checkpoints want them, by the third column of the weight
table: where each lies in a global tensor, and which part of it this rank holds.
"""

from collections.abc import Mapping

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ReplicaId, ShardedTensorFactory
from torch import Tensor

from moetrain.engine.model import PackedGPT
from moetrain.engine.params import canonical
from moetrain.engine.world import World
from moetrain.models import Model, Rule
from moetrain.models.sharding import Vocab
from moetrain.weights.mcore_layout import Style, place

type Sharded = ShardedTensor | ShardedTensorFactory


def sharded(
    name: str,
    param: Tensor,
    chunk: PackedGPT,
    world: World,
    table: Mapping[str, Rule],
    model: Model,
    style: Style,
) -> Sharded:
    """The part of a checkpoint's tensor that a parameter of this rank is; `name` is its own in
    `chunk`.
    """
    full, first = next(canonical(name, param, chunk, world))
    rule = table[full]
    at = place(rule, model, style)
    is_expert = rule.expert is not None
    tp_rank, tp_size = (
        (world.etp_rank, world.plan.etp) if is_expert else (world.tp_rank, world.plan.tp)
    )
    offsets = [(axis, i, n) for axis, (i, n) in enumerate(zip(at.lead, at.lead_shape, strict=True))]
    own_axes = param.ndim - first.ndim  # all local experts as one parameter
    if own_axes:
        offsets[-1] = (len(offsets) - 1, world.ep_rank, world.plan.ep)
    prepended = len(offsets) - own_axes
    copy = full != name and name == "output_layer.weight"  # of the first stage's embedding
    replica = _replica(is_expert, tp_rank if rule.sharding.dim is None else 0, copy=copy)
    dim = rule.sharding.dim
    if dim is None:
        return _part(at.key, param, offsets, replica, prepended)
    axis = len(offsets) + dim
    runs = rule.sharding.saved(tp_rank, tp_size)
    if len(runs) == 1:
        offsets.append((axis, tp_rank, tp_size))
        pads = isinstance(rule.sharding, Vocab)
        return _part(at.key, param, offsets, replica, prepended, allow_shape_mismatch=pads)
    places = [(axis, start // n, at.shape[dim] // n) for _, start, n in runs]
    return _in_runs(
        at.key, param, [[*offsets, one] for one in places], axis - prepended, replica, prepended
    )


def _replica(is_expert: bool, tp_rank: int, *, copy: bool) -> ReplicaId:
    """Which of the ranks that hold the same this one is; (0, 0, 0) writes."""
    if is_expert:
        return (0, tp_rank, parallel_state.get_expert_data_parallel_rank())
    return (int(copy), tp_rank, parallel_state.get_data_parallel_rank(with_context_parallel=True))


def _part(
    key: str,
    data: Tensor,
    offsets: list[tuple[int, int, int]],
    replica: ReplicaId,
    prepended: int,
    *,
    allow_shape_mismatch: bool = False,
) -> ShardedTensor:
    return ShardedTensor.from_rank_offsets(
        key,
        data,
        *offsets,
        replica_id=replica,
        prepend_axis_num=prepended,
        allow_shape_mismatch=allow_shape_mismatch,
    )


def _in_runs(
    key: str,
    param: Tensor,
    places: list[list[tuple[int, int, int]]],
    dim: int,
    replica: ReplicaId,
    prepended: int,
) -> ShardedTensorFactory:
    """A parameter whose rows are equal runs of a tensor that do not follow each other there: its
    rank's part of the gate, then of up.
    """

    def build(name: str, whole: Tensor, replica_id: ReplicaId, flattened_range: object) -> object:
        runs = whole.chunk(len(places), dim)
        return [
            _part(name, run.contiguous(), offsets, replica_id, prepended)
            for run, offsets in zip(runs, places, strict=True)
        ]

    def merge(runs: list[Tensor]) -> Tensor:
        return torch.cat(runs, dim)

    return ShardedTensorFactory(key, param, build, merge, replica_id=replica)
