"""Worked answers that a method learns from beside its rollouts."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from moetrain.config.recipe import Recipe
from moetrain.data.demonstrations import demonstration_recipe
from moetrain.data.loader import Loader, RunData
from moetrain.engine.world import World
from moetrain.errors import DataError
from moetrain.ops.packed import DEMONSTRATION, Packed


class Demonstrations:
    """This data-parallel rank's share of a stream of packs; of none for most methods."""

    def __init__(self, loader: Loader | None):
        self._loader = loader

    def next(self, like: Packed, share: float) -> list[Packed]:
        """Packs for an optimizer step, with the fields that `like`, a pack of answers, has."""
        if self._loader is None:
            return []
        return [with_fields_of(pack, like, share) for pack in self._loader.next()]

    def state_dict(self) -> dict[str, Any]:
        """The place in the stream."""
        return {} if self._loader is None else self._loader.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken; {} is the beginning."""
        if self._loader is not None and state:
            self._loader.load_state_dict(dict(state))


def open_demonstrations(recipe: Recipe, world: World) -> Demonstrations:
    """The recipe's data.demonstrations. Collective. Raises DataError."""
    demonstrated = demonstration_recipe(recipe)
    if demonstrated is None:
        return Demonstrations(None)
    if demonstrated.train.global_batch % world.dp_size:
        raise DataError(
            f"method.packs={demonstrated.train.global_batch} does not divide over {world.dp_size}"
            f" data-parallel ranks: use a multiple of {world.dp_size}."
        )
    return Demonstrations(RunData(demonstrated).loader(world.dp_rank, world.dp_size))


def with_fields_of(pack: Packed, like: Packed, share: float) -> Packed:
    """A pack of instruction data as one of answers: what it does not have is 0."""
    scored = torch.zeros(pack.num_sequences).index_add(0, pack.sequence_ids, pack.loss_mask)
    role = (scored > 0) * DEMONSTRATION

    def empty(part: dict[str, Tensor], num: int) -> dict[str, Tensor]:
        return {name: value.new_zeros(num, *value.shape[1:]) for name, value in part.items()}

    extras = empty(like.extras, pack.num_sequences)
    extras |= {"role": role.to(like.extras["role"].dtype), "share": (role > 0) * share}
    if "temperature" in extras:
        extras["temperature"] = torch.ones(pack.num_sequences)  # nobody drew them
    return replace(pack, extras=extras, per_token=empty(like.per_token, pack.num_tokens))
