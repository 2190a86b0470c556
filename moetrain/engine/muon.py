"""Muon beside AdamW in Megatron's distributed optimizer: momentum, made orthogonal, for matrices.

megatron-core 0.19.2 has a Muon of its own (with the package emerging_optimizers), which makes
parameters orthogonal: gate and up as one matrix, a tensor-parallel rank's part by itself, and
grouped experts, which have three dimensions, not at all. Here a matrix is a Hugging Face tensor, so
a step is the same at every layout. A data-parallel rank has the momentum of a run of elements, as
the distributed optimizer deals them out (arXiv 2502.16982, algorithm 1); it makes the updates of
the matrices that its run touches. A matrix that lies on several ranks is summed over them first.

Legend: local: a tensor-parallel rank's part of a matrix, or of several that are one tensor there.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from moetrain.config.optim import OptimConfig
from moetrain.engine.model import PackedGPT
from moetrain.engine.params import canonical, coordinates
from moetrain.engine.world import World
from moetrain.models import Rule
from moetrain.ops.orthogonal import orthogonal, scale_of
from moetrain.ops.reduce import add_up

NAME = "muon"  # what the groups of parameters that it steps are marked with


@dataclass(frozen=True)
class Local:
    """The tensor of one rule on a tensor-parallel rank, as a run of elements of a parameter."""

    rule: Rule
    rank: int
    size: int
    group: ProcessGroup | None
    start: int  # in the parameter
    stop: int


@dataclass
class Block:
    """A `Local`, and this data-parallel rank's part of it."""

    local: Local
    main: Tensor | None  # the main parameter's flat shard, where this rank has a part
    mine: slice  # of the local tensor
    shard: slice  # the same elements of `main`
    is_cut: bool  # other data-parallel ranks have parts too


class MuonSteps:
    """What an AdamW becomes whose groups may be Muon's; laid over the class that it has."""

    blocks: list[Block]
    dp_group: ProcessGroup
    cfg: OptimConfig
    dtype: torch.dtype  # of the iteration
    muon_params: set[Tensor]  # of the model
    nothing: Tensor  # fp32, empty, where the main parameters are
    param_groups: list[dict[str, Any]]
    state: dict[Any, dict[str, Any]]

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        """One step of both."""
        every = self.param_groups
        self.param_groups = [group for group in every if group.get("optimizer") != NAME]
        try:
            super().step(closure)  # type: ignore[misc]
        finally:
            self.param_groups = every
        if not counts_by_parameter(self):
            for group in muon_groups(self):
                if "step" in group:  # once a checkpoint has brought it
                    group["step"] += 1
        group_of = {param: group for group in muon_groups(self) for param in group["params"]}
        before: Tensor | None = None
        moved: Tensor | None = None  # that of one parameter, whose blocks follow each other
        for block in self.blocks:
            if block.main is None:
                self._update(block, None)
                continue
            group = group_of[block.main]
            if block.main is not before:
                before, moved = block.main, self._momentum(block.main)
                block.main.mul_(1 - group["lr"] * group["weight_decay"])
            block.main[block.shard].sub_(self._update(block, moved), alpha=group["lr"])

    def _momentum(self, param: Tensor) -> Tensor:
        """The new momentum of a flat shard, looking ahead with Nesterov."""
        state = self.state[param]
        if not state:
            start(self, param)
        if "step" in state:
            state["step"] += 1
        beta, momentum, grad = self.cfg.muon_momentum, state["exp_avg"], param.grad
        assert grad is not None
        momentum.lerp_(grad, 1 - beta)
        return grad.lerp(momentum, beta) if self.cfg.muon_nesterov else momentum

    def _update(self, block: Block, moved: Tensor | None) -> Tensor:
        """This rank's part of the update, flat; collective over ranks that share the matrix."""
        local = block.local
        sharding, place = local.rule.sharding, (local.rank, local.size)
        flat = self.nothing if moved is None else moved[block.shard]
        if block.is_cut:
            whole = flat.new_zeros(local.stop - local.start)
            whole[block.mine] = flat
            flat = add_up(whole, self.dp_group)
        if moved is None:
            return self.nothing
        parts = sharding.unpack(flat.view(sharding.local_shape(*place)), *place)
        cuts = sharding.parts(*place)
        updates: list[Tensor] = []
        for part, cut, shape in zip(parts, cuts, sharding.hf_shapes(), strict=True):
            matrix = part
            if sharding.dim is not None and local.size > 1:
                matrix = part.new_zeros(shape)
                matrix[cut] = part
                matrix = add_up(matrix, local.group)
            updates.append(self._orthogonal(matrix)[cut])
        return sharding.pack(tuple(updates), *place).reshape(-1)[block.mine]

    def _orthogonal(self, matrix: Tensor) -> Tensor:
        cfg = self.cfg
        rows, columns = matrix.shape
        scale = scale_of(rows, columns, cfg.muon_scale_mode) * cfg.muon_extra_scale_factor
        return orthogonal(matrix, cfg.muon_num_ns_steps, self.dtype) * scale


def locals_of(
    chunks: list[PackedGPT], world: World, table: Mapping[str, Rule], names: Collection[str]
) -> dict[Tensor, list[Local]]:
    """The parameters of this rank with the canonical names `names`, experts one by one."""
    result: dict[Tensor, list[Local]] = {}
    for chunk in chunks:
        for name, param in chunk.named_parameters():
            at = 0
            for full, tensor in canonical(name, param, chunk, world):
                if full in names:
                    rank, size, group = coordinates(full, world)
                    local = Local(table[full], rank, size, group, at, at + tensor.numel())
                    result.setdefault(param, []).append(local)
                at += tensor.numel()
    return result


def counts_by_parameter(inner: Any) -> bool:
    """Whether an optimizer keeps a `step` in each state, as torch's do. Those of Transformer Engine
    and Apex keep one in a group, and know the moments alone.
    """
    return isinstance(inner, torch.optim.AdamW)


def start(inner: Any, param: Tensor) -> None:
    """Give a parameter of Muon its empty state: there is no second moment."""
    inner.state[param]["exp_avg"] = torch.zeros_like(param.data)
    if counts_by_parameter(inner):
        inner.state[param]["step"] = torch.tensor(0.0)


def muon_groups(optimizer: Any) -> list[dict[str, Any]]:
    """The groups of one inner optimizer that Muon steps."""
    return [group for group in optimizer.param_groups if group.get("optimizer") == NAME]


@contextmanager
def second_moments(parts: Sequence[Any]) -> Iterator[None]:
    """Inside, Muon's state has AdamW's second moment, 0 and without memory: megatron-core 0.19.2
    copies both of every parameter into a checkpoint.
    """
    inners: list[Any] = [p.optimizer for p in parts if isinstance(p.optimizer, MuonSteps)]

    def states() -> Iterator[tuple[dict[str, Any], Tensor]]:  # made anew by what happens inside
        for inner in inners:
            for group in muon_groups(inner):
                yield from ((inner.state[param], param) for param in group["params"])

    for state, param in states():
        state["exp_avg_sq"] = param.new_zeros(1).expand(param.shape)
    try:
        yield
    finally:
        for state, _ in states():
            state.pop("exp_avg_sq", None)


def leave_out_second_moments(part: Any, state: dict[int, dict[str, Any]]) -> None:
    """They are neither written nor read. `state` has a row for each parameter, in buffer order."""
    if not isinstance(part.optimizer, MuonSteps):
        return
    params = (param for buffer in part.buffers for param in buffer.param_index_map)
    for row, param in enumerate(params):
        if param in part.optimizer.muon_params:
            del state[row]["exp_avg_sq"]


def install(
    part: Any, matrices: Mapping[Tensor, list[Local]], cfg: OptimConfig, dtype: torch.dtype
) -> None:
    """Make the AdamW inside one of Megatron's distributed optimizers step matrices with Muon."""
    inner: Any = part.optimizer
    if inner is None:
        return
    for group in inner.param_groups:
        if group.get("stepped_by") == NAME:
            # Megatron takes no override of this key, by which a checkpoint tells groups apart.
            group["optimizer"] = NAME
    inner.__class__ = type("Muon", (MuonSteps, type(inner)), {})
    inner.blocks = list(_blocks(part, matrices))
    inner.dp_group, inner.cfg, inner.dtype = part.data_parallel_group, cfg, dtype
    device = part.buffers[0].grad_data.device if part.buffers else None
    inner.nothing = torch.zeros(0, device=device)
    inner.muon_params = set(matrices)


def _blocks(part: Any, matrices: Mapping[Tensor, list[Local]]) -> Iterator[Block]:
    """All matrices of the optimizer's buffers, in the same order on every rank."""
    num_ranks = part.data_parallel_group.size()
    for index, ranges in enumerate(part.gbuf_ranges):
        (buckets,) = ranges.values()
        buffer = part.buffers[index]
        for param, (start_at, _, bucket_id) in buffer.param_index_map.items():
            bucket = buffer.buckets[bucket_id]
            share = bucket.grad_data.numel() // num_ranks
            place = buckets[bucket_id]["param_map"].get(param)
            main = None
            if place is not None:
                group, order = part.model_param_group_index_map[param]
                main = part.optimizer.param_groups[group]["params"][order]
            for local in matrices.get(param, []):
                first, last = (
                    (start_at - bucket.offset + at) // share for at in (local.start, local.stop - 1)
                )
                yield _block(local, main, place, is_cut=first != last)


def _block(local: Local, main: Tensor | None, owned: Any, *, is_cut: bool) -> Block:
    nothing = Block(local, None, slice(0, 0), slice(0, 0), is_cut)
    if owned is None:
        return nothing
    low, high = max(local.start, owned["param"].start), min(local.stop, owned["param"].end)
    if low >= high:
        return nothing
    mine, shard = (slice(low - at, high - at) for at in (local.start, owned["param"].start))
    return Block(local, main, mine, shard, is_cut)
