"""Any rank of any layout takes a whole step in a meta world, without data: nothing in the engine
asks for a value where shapes suffice.
"""

import resource
import time
from collections import Counter
from typing import Any

import pytest
import torch

from moetrain.config.hub_models import PUBLISHED
from moetrain.testing.gloo import apart
from moetrain.testing.tiny import CONFIGS

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="needs a process without CUDA")


class Kept:
    """Counts the bytes of tensors that are kept for backward passes. Scores of attention are left
    out: the meta device has a plain kernel for it, which keeps them.
    """

    def __init__(self, owned: set[Any], length: int):
        self.owned, self.length = owned, length
        self.now = self.most = 0
        self.held: Counter[Any] = Counter()

    def keep(self, tensor: torch.Tensor) -> "_Tensor":
        return _Tensor(self, tensor)


class _Tensor:
    def __init__(self, kept: Kept, tensor: torch.Tensor):
        storage = tensor.untyped_storage()
        self.kept, self.tensor, self.key = kept, tensor, storage._cdata
        skip = self.key in kept.owned or tensor.shape[-2:] == (kept.length, kept.length)
        self.size = 0 if skip else storage.nbytes()
        kept.held[self.key] += 1
        if kept.held[self.key] == 1:
            kept.now += self.size
            kept.most = max(kept.most, kept.now)

    def __del__(self) -> None:
        self.kept.held[self.key] -= 1
        if not self.kept.held[self.key]:
            self.kept.now -= self.size


def step(
    hf: dict[str, Any],
    parallel: dict[str, int],
    rank: int,
    size: int,
    num_packs: int,
    length: int,
    sections: dict[str, Any],
) -> tuple[int, float, float, int, int]:
    """(parameters of the rank, seconds, GiB, bytes kept for backward passes at most, the bound that
    a dry run says) of a process that builds an engine and steps.
    """
    from moetrain.engine import Engine
    from moetrain.engine.world import meta_world
    from moetrain.layout.activations import activation_bytes
    from moetrain.layout.mesh import plan_mesh
    from moetrain.methods import METHODS
    from moetrain.testing import ranks

    started = time.perf_counter()
    model = {"path": None, "hf": hf, "dtype": "bf16"}
    recipe = ranks.recipe_for("-", parallel, model=model, **sections)
    engine = Engine(recipe, meta_world(recipe.parallel, rank, size))
    params = [p for chunk in engine.chunks for p in chunk.parameters()]
    assert all(p.is_meta for p in params)
    kept = Kept({p.untyped_storage()._cdata for p in params}, length)
    with torch.autograd.graph.saved_tensors_hooks(kept.keep, lambda one: one.tensor):
        packs = [ranks.packs_of([[1] * length], 1)[0] for _ in range(num_packs)]
        engine.step(packs, METHODS["sft"])
    gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    bound = activation_bytes(engine.model, plan_mesh(recipe.parallel, size), recipe)
    num_params = sum(p.numel() for p in params)
    seconds = time.perf_counter() - started
    return num_params, seconds, gib, kept.most, bound[engine.world.pp_rank]


@pytest.mark.parametrize(
    ("rank", "parallel", "dense", "recompute"),
    [
        (7, {"tp": 2, "pp": 2, "ep": 2}, [], "full"),
        # A stage without experts, with two micro-batches in flight.
        (0, {"tp": 2, "etp": 2, "ep": 2, "pp": 2}, [0, 1], "none"),
    ],
)
def test_a_step_without_data(
    rank: int, parallel: dict[str, int], dense: list[int], recompute: str
) -> None:
    """And what it keeps is within the dry run's bound, and not far from it."""
    hf = {**CONFIGS["qwen3_moe"], "moe_intermediate_size": 32, "num_experts": 8}
    sections: dict[str, Any] = {"train": {"global_batch": 4, "recompute": recompute}}
    if not dense:
        sections |= {"optim": {"name": "muon"}, "router": {"aux_loss": 0.1, "balance": "global"}}
    *_, most, bound = apart(
        step, hf | {"mlp_only_layers": dense}, parallel, rank, 8, 2, 64, sections
    )
    assert bound / 4 < most <= bound


def test_a_step_of_a_rank_of_235b() -> None:
    """Of 256 GPUs: its parameters are those that the design counted, and a laptop does it."""
    hf = PUBLISHED["Qwen3-235B-A22B"]
    sections = {"train": {"global_batch": 16, "recompute": "full"}, "data": {"seq_len": 4096}}
    num_params, seconds, gib, *_ = apart(
        step, hf, {"tp": 2, "pp": 8, "ep": 32}, 0, 256, 1, 4096, sections
    )
    assert num_params == pytest.approx(1.651e9, rel=1e-3)
    assert seconds < 60
    assert gib < 4
