"""The live shards of a model under their canonical names: global layer and expert ids, one name
scheme for both backends.
"""

import re
from collections.abc import Iterator

from torch import Tensor
from torch.distributed import ProcessGroup

from moetrain.engine.mesh import Mesh
from moetrain.engine.model import PackedGPT
from moetrain.weights.transport import LocalParam

# Transformer Engine keeps a norm inside the linear layer that follows it.
_TE_NAMES = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}
_GROUPED = re.compile(r"mlp\.experts\.(linear_fc[12])\.weight(\d*)$")


def canonical_tensors(chunk: PackedGPT, mesh: Mesh) -> Iterator[tuple[str, Tensor]]:
    """(canonical name, local tensor) of one model chunk; grouped experts come out one by one, as
    views.

    A last stage's own copy of tied embeddings comes out under the embedding's name.
    """
    for name, param in chunk.named_parameters():
        yield from _canonical(name, param, chunk, mesh)


def _canonical(
    name: str, tensor: Tensor, chunk: PackedGPT, mesh: Mesh
) -> Iterator[tuple[str, Tensor]]:
    if name == "output_layer.weight" and chunk.share_embeddings_and_output_weights:
        name = "embedding.word_embeddings.weight"
    if not name.startswith("decoder.layers."):
        yield name, tensor
        return
    local, rest = name.removeprefix("decoder.layers.").split(".", 1)
    layer = chunk.decoder.layers[int(local)]
    prefix = f"decoder.layers.{layer.layer_number - 1}."
    grouped = _GROUPED.match(rest)
    if grouped is None:
        yield prefix + _TE_NAMES.get(rest, rest), tensor
        return
    num_local = layer.mlp.num_local_experts
    first = mesh.ep_rank * num_local
    if grouped[2]:  # Transformer Engine: a parameter per expert
        yield f"{prefix}mlp.experts.{grouped[1]}.weight{first + int(grouped[2])}", tensor
        return
    for e in range(num_local):
        yield f"{prefix}mlp.experts.{grouped[1]}.weight{first + e}", tensor[e]


def local_params(chunks: list[PackedGPT], mesh: Mesh) -> list[LocalParam]:
    """All weights of this rank as the transport wants them."""
    return [
        LocalParam(name, tensor.data, *_coordinates(name, mesh))
        for chunk in chunks
        for name, tensor in canonical_tensors(chunk, mesh)
    ]


def local_grads(chunks: list[PackedGPT], mesh: Mesh) -> list[LocalParam]:
    """The gradients of the last step under the weights' names, from DDP's buffers
    (Engine.whole_gradients).
    """
    return [
        LocalParam(canonical, grad, *_coordinates(canonical, mesh))
        for chunk in chunks
        for name, param in chunk.named_parameters()
        for canonical, grad in _canonical(name, param.main_grad, chunk, mesh)  # type: ignore[arg-type]
    ]


def _coordinates(name: str, mesh: Mesh) -> tuple[int, int, ProcessGroup | None]:
    if ".mlp.experts." in name:
        return mesh.etp_rank, mesh.plan.etp, mesh.etp_group
    return mesh.tp_rank, mesh.plan.tp, mesh.tp_group
