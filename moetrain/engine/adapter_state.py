"""The adapters of an engine: where their first values come from, and how a checkpoint holds them.

Only what is trained is saved: the base is read again from where it came.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from megatron.core import parallel_state
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from torch import Tensor, nn

from moetrain.config.recipe import Recipe
from moetrain.engine.layers.experts import gate_up_shards
from moetrain.engine.model import PackedGPT
from moetrain.engine.optim import gathered
from moetrain.engine.params import canonical_name, local_adapters
from moetrain.engine.world import World
from moetrain.models import Model
from moetrain.models.adapter import AdapterSpec, AdapterTable, adapter_table
from moetrain.models.sharding import GateUp, Sharding
from moetrain.weights.adapter_init import InitialAdapter, Residual
from moetrain.weights.peft_reader import PeftReader
from moetrain.weights.reader import Reader
from moetrain.weights.transport import load


def adapter_of(recipe: Recipe, model: Model, base: Reader) -> AdapterTable | None:
    """The weight table of the recipe's adapter; of one to go on from it is the folder that says
    what it is.
    """
    config = recipe.adapter
    if config is None:
        return None
    if config.path is not None:
        return PeftReader(config.path, model, base).table
    return adapter_table(model, AdapterSpec.of(config))


def base_for(reader: Reader, adapters: AdapterTable | None, seed: int) -> Reader:
    """The base's weights as they stand beside a new adapter."""
    if adapters is None or adapters.spec.starts_at_base:
        return reader
    return Residual(reader, InitialAdapter(reader, adapters, seed))


def adapter_state(
    chunks: list[PackedGPT], adapters: AdapterTable, world: World
) -> dict[str, ShardedTensor | ShardedTensorFactory]:
    """Every trained parameter of this rank as Megatron's checkpoints want it, by canonical name:
    adapters, those of all local experts as one tensor [e, ...], and a scalar head.
    """
    state: dict[str, ShardedTensor | ShardedTensorFactory] = {}
    for name, param in _trained(chunks):
        if ".mlp.experts." in name:
            state[name] = _expert(name, param, adapters[name + "0"].sharding, world)
        else:
            rule = adapters[name] if name in adapters else adapters.model.table[name]
            state[name] = _dense(name, param, rule.sharding, world)
    return state


def _trained(chunks: list[PackedGPT]) -> Iterator[tuple[str, nn.Parameter]]:
    for chunk in chunks:
        for name, param in chunk.named_parameters():
            if param.requires_grad:
                yield canonical_name(name, chunk), param


def _dense(name: str, param: Tensor, sharding: Sharding, world: World) -> Any:
    replica = parallel_state.get_data_parallel_rank(with_context_parallel=True)
    return _sharded(name, param, sharding, 0, (), world.tp_rank, world.plan.tp, replica)


def _expert(name: str, param: Tensor, sharding: Sharding, world: World) -> Any:
    replica = parallel_state.get_expert_data_parallel_rank()
    experts = ((0, world.ep_rank, world.plan.ep),)
    return _sharded(name, param, sharding, 1, experts, world.etp_rank, world.plan.etp, replica)


def _sharded(
    name: str,
    param: Tensor,
    sharding: Sharding,
    lead: int,  # dimensions before the matrix's own
    offsets: tuple[tuple[int, int, int], ...],
    tp_rank: int,
    tp_size: int,
    replica: int,
) -> ShardedTensor | ShardedTensorFactory:
    """One parameter, split over tensor ranks as its sharding says."""
    if sharding.dim is None:
        return ShardedTensor.from_rank_offsets(
            name, param, *offsets, replica_id=(0, tp_rank, replica)
        )
    dim = lead + sharding.dim
    if not isinstance(sharding, GateUp):
        return ShardedTensor.from_rank_offsets(
            name, param, *offsets, (dim, tp_rank, tp_size), replica_id=(0, 0, replica)
        )
    return gate_up_shards(name, param, offsets, (dim, tp_rank, tp_size), (0, 0, replica))


def fill_adapters(chunks: list[PackedGPT], loaded: dict[str, Tensor]) -> None:
    """Copy what a checkpoint held into the parameters."""
    for name, param in _trained(chunks):
        param.data.copy_(loaded[name])


def fill_head(chunks: list[PackedGPT], head: Tensor | None) -> None:
    """Copy the scalar head [1, h] that lay beside an adapter, where there was one."""
    for chunk in chunks:
        if chunk.has_scalar_head and head is not None:
            chunk.output_layer.weight.data.copy_(head)


@contextmanager
def as_base(
    recipe: Recipe,
    chunks: list[PackedGPT],
    wrapped: Sequence[Any],
    world: World,
    initial: InitialAdapter | None,
) -> Iterator[None]:
    """Meanwhile adapters that go on from `adapter.path`, frozen ones too, have the values that new
    ones are made with, which change nothing of the base.
    """
    if initial is None or recipe.adapter is None or recipe.adapter.path is None:
        yield
        return
    with gathered(wrapped):
        local = local_adapters(chunks, world)
        now = [param.tensor.to("cpu", copy=True) for param in local]
        load(local, initial.table, initial, initial.table.model)
    try:
        yield
    finally:
        with gathered(wrapped):
            for param, tensor in zip(local, now, strict=True):
                param.tensor.copy_(tensor)
