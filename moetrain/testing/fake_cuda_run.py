"""Recipes on fake CUDA tensors: `python -m moetrain.testing.fake_cuda_run`, in the environment that
`fake_cuda.environment` gives, reads cases and writes what came of them, both JSON.

A case is {"recipe": path, "overrides": [...], "rank": n, "mutation": of MUTATIONS}, and what came
of it {"problem": "" or what a GPU would refuse, "seen": the backend and operations of
REFUSES, "params": of the rank}. With --te the kernels of Transformer Engine are stood in.
"""

import json
import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.attention import varlen

from moetrain.config.load import load_recipe
from moetrain.config.recipe import Recipe
from moetrain.engine import Engine, compat_meta, device
from moetrain.engine.layers import attention
from moetrain.engine.world import World, with_groups
from moetrain.layout.mesh import plan_mesh
from moetrain.methods import METHODS
from moetrain.models import read_model
from moetrain.ops import grouped
from moetrain.ops.packed import Packed
from moetrain.planner.fewer_layers import with_layers
from moetrain.planner.packs import pack_of
from moetrain.planner.trace import without_weights
from moetrain.run.dry_run import world_size
from moetrain.testing import te_kernels
from moetrain.testing.fake_cuda import FakeCuda
from moetrain.testing.layouts import instead


def shortened(recipe: Recipe) -> Recipe:
    """With one layer in each chunk, two stages and two chunks of each at most: every local shape is
    the recipe's.
    """
    recipe = without_weights(recipe)
    model = read_model(recipe.model.hf or {}, value_head=recipe.method.value_head)
    vpp = min(recipe.parallel.vpp, 2) if recipe.parallel.vpp else None
    parallel = recipe.parallel.model_copy(update={"pp": min(recipe.parallel.pp, 2), "vpp": vpp})
    recipe = recipe.model_copy(update={"parallel": parallel})
    shorter = with_layers(recipe, model, parallel.pp * (parallel.vpp or 1))
    assert shorter is not None, "its layers are not alike"
    return shorter


def _same_of_all(gathered: list[Any], value: Any, group: Any = None) -> None:
    """Pickled objects have values: the others' are this rank's."""
    gathered[:] = [value] * len(gathered)


def fake_world(recipe: Recipe, rank: int) -> World:
    """Rank `rank` of the recipe's own world, on the GPU that this process believes in."""
    size = world_size(recipe, None)
    device_here = device.prepare()
    assert device_here.type == "cuda", "not in fake_cuda.environment"
    compat_meta.be_alone(rank, size)
    dist.all_gather_object = _same_of_all
    return with_groups("meta", device_here, recipe.parallel, 0)


FAKE = FakeCuda()  # one for a process: Megatron keeps some tensors from model to model


def step(recipe: Recipe, rank: int) -> int:
    """A whole step of a rank: how many parameters it has."""
    world = fake_world(recipe, rank)
    pack = pack_of(recipe)
    plan = plan_mesh(recipe.parallel, world.size)
    num = plan.pp if plan.vpp > 1 else 1
    with FAKE:
        engine = Engine(recipe, world)
        FAKE.seen.add(f"backend {engine.backend}")
        packs = [pack] * (num * recipe.train.micro_batch)
        if recipe.method.samples:
            engine.outputs(packs)
        engine.step(packs, METHODS[recipe.method.name])
        return sum(p.numel() for chunk in engine.chunks for p in chunk.parameters())


def _unpadded(owner: Any) -> AbstractContextManager[None]:
    return instead(owner, "F", SimpleNamespace(**vars(F) | {"pad": lambda x, by: x}))


def _short(*given: Any, **kwargs: Any) -> Any:
    """Flash attention told of one token less than the longest sequence has."""
    *tensors, max_q, max_k = given
    return varlen_attn(*tensors, max_q - 1, max_k, **kwargs)


def _masked_by_host(pack: Packed, device: torch.device) -> Packed:
    return replace(to_device(pack, device), valid=pack.valid)


varlen_attn: Any = varlen.varlen_attn
to_device = Packed.to
MUTATIONS: dict[str, Callable[[], AbstractContextManager[None]]] = {
    "": nullcontext,
    "heads are not padded": lambda: _unpadded(attention),
    "experts are not padded": lambda: _unpadded(grouped),
    "adapters are not padded": lambda: _unpadded(grouped),
    "heads of any size go to flash attention": lambda: instead(attention, "FLASH_HEAD", 1 << 20),
    "max_seqlen is too small": lambda: instead(varlen, "varlen_attn", _short),
    "a mask stays on the host": lambda: instead(Packed, "to", _masked_by_host),
    "counts stay on the host": lambda: instead(World, "_on_device", lambda world, x: x),
}


def run(case: Mapping[str, Any]) -> dict[str, Any]:
    recipe = load_recipe(Path(case["recipe"]), case["overrides"])
    rank = case["rank"] % world_size(recipe, None)
    FAKE.seen.clear()
    try:
        with MUTATIONS[case["mutation"]]():
            params = step(shortened(recipe), rank)
    except Exception as error:
        if "--raise" in sys.argv:
            raise
        return {"problem": f"{type(error).__name__}: {error}", "seen": [], "params": 0}
    return {"problem": "", "seen": sorted(FAKE.seen), "params": params}


if __name__ == "__main__":
    torch.set_num_threads(1)
    if "--te" in sys.argv:
        te_kernels.install(on_cpu=False)
    print(json.dumps([run(case) for case in json.load(sys.stdin)]))
