"""The adapters of an engine: where their first values come from, and how a checkpoint holds them.

Only what is trained is saved: the base is read again from where it came.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from moetrain.config.recipe import Recipe
from moetrain.engine.model import PackedGPT
from moetrain.engine.optim import gathered
from moetrain.engine.params import canonical_name, local_adapters
from moetrain.engine.sharded import Sharded, sharded
from moetrain.engine.snapshot import Weights, named_values
from moetrain.engine.world import World
from moetrain.models import Model
from moetrain.models.adapter import AdapterSpec, AdapterTable, adapter_table
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
        table = PeftReader(config.path, model, base).table
        if config.dropout is not None:
            table = replace(table, spec=replace(table.spec, dropout=config.dropout))
        return table
    return adapter_table(model, AdapterSpec.of(config))


def planned_adapter(recipe: Recipe, model: Model) -> AdapterTable | None:
    """The same by the recipe alone, without reading a folder."""
    config = recipe.adapter
    if config is None:
        return None
    return adapter_table(model, AdapterSpec.of(config), loaded=config.path is not None)


def base_for(reader: Reader, adapters: AdapterTable | None, seed: int) -> Reader:
    """The base's weights as they stand beside a new adapter."""
    if adapters is None or adapters.spec.starts_at_base:
        return reader
    return Residual(reader, InitialAdapter(reader, adapters, seed))


def adapter_state(
    chunks: list[PackedGPT], adapters: AdapterTable, world: World, values: Weights | None = None
) -> dict[str, Sharded]:
    """Every trained parameter of this rank as Megatron's checkpoints want it, by canonical name:
    adapters, those of all local experts as one tensor [e, ...], and a scalar head. `values`: of a
    snapshot, in their place.
    """
    model = adapters.model
    table = {name: model.table[name] for name in model.heads.added} | dict(adapters)
    trained = {(id(chunk), name) for chunk, name, _ in _trained(chunks)}
    return {
        canonical_name(name, chunk): sharded(name, tensor, chunk, world, table, model, "by_layer")
        for number, chunk in enumerate(chunks)
        for name, tensor in named_values(chunk, number, values)
        if (id(chunk), name) in trained
    }


def _trained(chunks: list[PackedGPT]) -> Iterator[tuple[PackedGPT, str, nn.Parameter]]:
    for chunk in chunks:
        for name, param in chunk.named_parameters():
            if param.requires_grad:
                yield chunk, name, param


def fill_adapters(chunks: list[PackedGPT], loaded: dict[str, Tensor]) -> None:
    """Copy what a checkpoint held into the parameters."""
    for chunk, name, param in _trained(chunks):
        param.data.copy_(loaded[canonical_name(name, chunk)])


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
