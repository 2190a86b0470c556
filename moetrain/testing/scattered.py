"""What ranks get of a batch that the first of them packs, against packing everything on each."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from moetrain.config.recipe import Recipe
from moetrain.data.groups import Group
from moetrain.engine import Engine
from moetrain.loops.demonstrations import open_demonstrations
from moetrain.loops.learn import Lessons, all_packs
from moetrain.loops.outline import Outline, outline_of
from moetrain.loops.parts import Packs, Parts
from moetrain.loops.store import Batch
from moetrain.methods import METHODS
from moetrain.ops.packed import Packed
from moetrain.testing.ranks import recipe_for


class Received(TorchDispatchMode):
    """Counts the bytes of tensors that collectives fill on a rank that is not the first."""

    def __init__(self) -> None:
        super().__init__()
        self.num_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d" and func._opname in ("recv_", "broadcast_"):
            tensors = [one for one in tree_leaves(args) if isinstance(one, Tensor)]
            self.num_bytes += sum(one.nbytes for one in tensors)
        return func(*args, **(kwargs or {}))


def tensors_of(pack: Packed) -> dict[str, Tensor]:
    """All of a pack's."""
    fields = {n: x for n, x in vars(pack).items() if isinstance(x, Tensor)}
    return fields | pack.extras | pack.per_token


def bytes_of(steps: Packs) -> int:
    """Of all tensors."""
    return sum(x.nbytes for packs in steps for pack in packs for x in tensors_of(pack).values())


def differences(found: Packs, wanted: Packs) -> list[str]:
    """Names of tensors that are other ones; all packs have as many fields."""
    assert [len(packs) for packs in found] == [len(packs) for packs in wanted]
    names: list[str] = []
    for ours, theirs in zip(chain(*found), chain(*wanted), strict=True):
        assert ours.ids == theirs.ids
        mine, other = tensors_of(ours), tensors_of(theirs)
        names += mine.keys() ^ other.keys()
        names += [
            name
            for name in mine.keys() & other.keys()
            if mine[name].dtype != other[name].dtype or not torch.equal(mine[name], other[name])
        ]
    return names


def held(batch: Batch) -> Outline:
    """A batch as the first rank has it."""
    return replace(outline_of(batch), batch=batch)


class Everywhere(Lessons):
    """Every rank packs the whole batch, and its packs have the choices for all layers."""

    made: Packs

    def _dealt(self, recipe: Recipe, given: Outline, values: Mapping[str, Tensor]) -> Packs:
        world = self.engine.world
        self.made = all_packs(recipe, given, values, world.dp_size, 0)  # 2 bytes a choice
        return [packs[world.dp_rank :: world.dp_size] for packs in self.made]


def scattered(
    model: str, parallel: dict[str, Any], groups: Sequence[Group], sections: dict[str, Any]
) -> dict[str, Any]:
    """A step from a batch that the first rank holds, and the same step from one that every rank
    packs: what differs in the packs, the bytes that came, of this rank's part and of all packs,
    this rank's place, and [what the step said] of both.
    """
    engine = Engine(recipe_for(model, parallel, **sections))
    world, recipe = engine.world, engine.recipe
    start = engine.snapshot()
    batch = Batch(1, tuple(groups), 0)
    known = outline_of(batch)
    from_first, whole = (
        make(recipe, engine, start, open_demonstrations(recipe, world))
        for make in (Lessons, Everywhere)
    )
    step_results: list[Any] = []
    parts: list[Packs] = []
    num_bytes: list[int] = []
    for lessons, is_held in ((from_first, world.is_first), (whole, True)):
        with Received() as received:
            packs = lessons.packs(replace(known, batch=batch if is_held else None))
        num_bytes.append(received.num_bytes)
        parts.append(packs)
        step_results.append([])
        for step_packs in packs:
            result = engine.step(step_packs, METHODS[recipe.method.name])
            step_results[-1].append((result.loss, result.grad_norm, result.metrics, result.router))
            engine.load(engine.source.reader(recipe, engine.model))  # moments alone stay
    assert isinstance(whole, Everywhere)
    layout_parts = Parts.of(recipe, engine.model, world.dp_size)
    wanted = replace(layout_parts, num_replicas=1).of_rank(parts[1], 0, world.pp_rank)
    return {
        "differences": differences(parts[0], wanted),
        "received": 0 if world.is_first else num_bytes[0] - num_bytes[1],
        "share": bytes_of(layout_parts.of_rank(whole.made, world.dp_rank, world.pp_rank)),
        "all": bytes_of(whole.made),
        "place": (world.dp_rank, world.pp_rank),
        "said": step_results,
    }
