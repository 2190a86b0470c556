"""The live shards of a model under their canonical names: global layer and expert ids, one name
scheme for both backends.
"""

import re
from collections.abc import Collection, Iterator, Mapping

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from moetrain.engine.layers.block import TE_NAMES
from moetrain.engine.model import PackedGPT
from moetrain.engine.world import World
from moetrain.weights.transport import LocalParam

_GROUPED = re.compile(r"\.mlp\.experts\.linear_fc[12]\.(?:weight|bias|lora_[AB])(\d*)$")
_ADAPTER = re.compile(r"\.lora\.(A|B|magnitude)$")


def canonical_tensors(chunk: PackedGPT, world: World) -> Iterator[tuple[str, Tensor]]:
    """(canonical name, local tensor) of one model chunk; grouped experts come out one by one, as
    views.

    A last stage's own copy of tied embeddings comes out under the embedding's name.
    """
    for name, param in chunk.named_parameters():
        yield from canonical(name, param, chunk, world)


def canonical_name(name: str, chunk: PackedGPT) -> str:
    """The name of a parameter of `chunk` with its global layer number; of all local experts at once
    where they are one parameter.
    """
    name = _ADAPTER.sub(r".lora_\1", name)
    if not name.startswith("decoder.layers."):
        return name
    local, rest = name.removeprefix("decoder.layers.").split(".", 1)
    layer = chunk.decoder.layers[int(local)]
    return f"decoder.layers.{layer.layer_number - 1}.{TE_NAMES.get(rest, rest)}"


def canonical(
    name: str, tensor: Tensor, chunk: PackedGPT, world: World
) -> Iterator[tuple[str, Tensor]]:
    """A parameter of `chunk`, or what goes with it, under the name or names of the weight table."""
    if name == "output_layer.weight" and chunk.share_embeddings_and_output_weights:
        name = "embedding.word_embeddings.weight"
    whole = canonical_name(name, chunk)
    grouped = _GROUPED.search(whole)
    if grouped is None:
        yield whole, tensor
        return
    layer = chunk.decoder.layers[int(name.split(".")[2])]
    num_local = layer.mlp.num_local_experts
    first = world.ep_rank * num_local
    stem = whole.removesuffix(grouped[1])
    if grouped[1]:  # Transformer Engine: a parameter per expert
        yield f"{stem}{first + int(grouped[1])}", tensor
        return
    for e in range(num_local):
        yield f"{stem}{first + e}", tensor[e]


def freeze(
    chunks: list[PackedGPT], world: World, *, all_but: Collection[str] | None, router: bool
) -> None:
    """Train only the weights with the canonical names `all_but` (None: all), and with `router` no
    router.
    """
    for chunk in chunks:
        for name, param in chunk.named_parameters():
            if router and ".mlp.router." in name:
                param.requires_grad = False
            elif all_but is not None:
                names = [n for n, _ in canonical(name, param, chunk, world)]
                param.requires_grad = names[0] in all_but
                assert len({n in all_but for n in names}) == 1, f"{name}: some experts only"


def by_parameter[T](
    chunks: list[PackedGPT], world: World, values: Mapping[str, T]
) -> dict[Tensor, T]:
    """What `values` has by canonical name, by this rank's trained parameters. Experts that are one
    parameter have one value.
    """
    return {
        param: values[full]
        for chunk in chunks
        for name, param in chunk.named_parameters()
        if param.requires_grad and (full := next(canonical(name, param, chunk, world))[0]) in values
    }


def local_params(chunks: list[PackedGPT], world: World) -> list[LocalParam]:
    """All weights of this rank as the transport wants them, without adapters."""
    return [
        LocalParam(name, tensor.data, *coordinates(name, world))
        for chunk in chunks
        for name, tensor in canonical_tensors(chunk, world)
        if ".lora_" not in name
    ]


def local_adapters(chunks: list[PackedGPT], world: World) -> list[LocalParam]:
    """The adapters of this rank."""
    return [
        LocalParam(name, tensor.data, *coordinates(name, world))
        for chunk in chunks
        for name, tensor in canonical_tensors(chunk, world)
        if ".lora_" in name
    ]


@torch.no_grad()
def local_merged(chunks: list[PackedGPT], world: World) -> list[LocalParam]:
    """The weights of this rank with their adapters in them; a copy where there is one."""
    merged: list[LocalParam] = []
    for chunk in chunks:
        for name, param in chunk.named_parameters():
            if ".lora." in name:
                continue
            owner = chunk.get_submodule(name.rpartition(".")[0])
            tensor = param.data
            if "lora" in owner._modules and name.endswith(".weight"):
                tensor = owner.lora.merged(param.data)
            for full, part in canonical(name, tensor, chunk, world):
                merged.append(LocalParam(full, part, *coordinates(full, world)))
    return merged


def coordinates(name: str, world: World) -> tuple[int, int, ProcessGroup | None]:
    """(rank, size, group) of the tensor axis that the parameter `name` is split over."""
    if ".mlp.experts." in name:
        return world.etp_rank, world.plan.etp, world.etp_group
    return world.tp_rank, world.plan.tp, world.tp_group
