"""The third column of the weight table: where Hugging Face tensors lie in a checkpoint of
Megatron's torch_dist format, whatever layout wrote it.

A tensor of such a checkpoint is global. It is what one tensor-parallel rank alone would hold, the
experts of a layer one behind the other [E, ...] and, in the style "stacked", all layers [L, ...].
No torch.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from moetrain.models import Model, Rule
from moetrain.models.rules import MCORE_LAYER
from moetrain.models.sharding import Piece, Shape

# "by_layer": a tensor for each layer. "stacked": one for all of them, which Megatron writes where
# all layers are alike.
type Style = Literal["by_layer", "stacked"]

_LAYERS = "decoder.layers."


@dataclass(frozen=True, slots=True)
class Place:
    """Where one parameter lies: in the tensor `key`, at `lead` of its first axes."""

    key: str
    lead: tuple[int, ...]  # the layer, the expert
    lead_shape: Shape
    shape: Shape  # of the parameter; of a vocabulary padded for one rank, others may have more rows
    pieces: tuple[Piece, ...]  # rows of its Hugging Face tensors, `local_start` being global here


def place(rule: Rule, model: Model, style: Style) -> Place:
    """Where a parameter lies in a checkpoint of this style."""
    sizes: list[tuple[int, int]] = []
    key = rule.saved
    if rule.layer is not None:
        key = (_LAYERS if style == "stacked" else MCORE_LAYER.format(l=rule.layer)) + key
        if style == "stacked":
            sizes.append((rule.layer, model.num_layers))
    if rule.expert is not None:
        sizes.append((rule.expert, model.num_experts))
    sharding = rule.sharding
    pieces = sharding.pieces(0, 1)
    if sharding.dim == 1:  # columns are whole at one rank: what counts here are rows
        pieces = (Piece(0, 0, 0, sharding.shape[0]),)
    lead, lead_shape = tuple(i for i, _ in sizes), tuple(n for _, n in sizes)
    return Place(key, lead, lead_shape, sharding.local_shape(0, 1), pieces)


def style_for(model: Model) -> Style:
    """How checkpoints of moetrain are written: as Megatron does, whose layers are alike where none
    has experts.
    """
    return "stacked" if model.moe is None else "by_layer"


def style_of(keys: Collection[str]) -> Style:
    """The style of a checkpoint with these tensors."""
    rests = (key.removeprefix(_LAYERS) for key in keys if key.startswith(_LAYERS))
    return "stacked" if any(not rest[:1].isdigit() for rest in rests) else "by_layer"
