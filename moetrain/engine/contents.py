"""What a checkpoint holds of an engine's weights, and of a snapshot of them beside."""

from typing import Any

from megatron.core.dist_checkpointing.utils import add_prefix_for_sharding

from moetrain.engine import checkpoint
from moetrain.engine.adapter_state import adapter_state, fill_adapters
from moetrain.engine.model import PackedGPT
from moetrain.engine.params import canonical_name
from moetrain.engine.snapshot import Weights, named_values
from moetrain.engine.world import World
from moetrain.models import Model
from moetrain.models.adapter import AdapterTable


def _content(
    chunks: list[PackedGPT],
    model: Model,
    adapters: AdapterTable | None,
    world: World,
    values: Weights | None = None,
) -> dict[str, Any]:
    """All weights, or the adapters where there are any; of a snapshot's `values`, as much as it
    has.
    """
    if adapters is None:
        return checkpoint.model_state(chunks, model, world, values)
    return {"adapter": adapter_state(chunks, adapters, world, values)}


def contents(
    chunks: list[PackedGPT],
    model: Model,
    adapters: AdapterTable | None,
    world: World,
    reference: Weights | None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(of the weights, of a snapshot): the latter under names of its own, which no reader of
    weights takes for theirs.
    """
    weights = _content(chunks, model, adapters, world)
    if reference is None:
        return weights, {}
    snapshot = _content(chunks, model, adapters, world, reference)
    add_prefix_for_sharding(snapshot, "reference.")
    return weights, {"reference": snapshot}


def fill(chunks: list[PackedGPT], loaded: dict[str, Any], reference: Weights | None) -> None:
    """Copy what was read into the weights, or the adapters, and into the snapshot."""
    if "adapter" in loaded:
        fill_adapters(chunks, loaded["adapter"])
    else:
        checkpoint.fill(chunks, loaded)
    snapshot = loaded.get("reference", {})
    for number, chunk in enumerate(chunks if reference is not None else ()):
        for name, tensor in named_values(chunk, number, reference):
            if "adapter" in snapshot:
                tensor.copy_(snapshot["adapter"][canonical_name(name, chunk)])
            else:
                tensor.copy_(snapshot[f"model{number}"][name])
