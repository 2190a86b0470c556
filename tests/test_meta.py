"""Any rank of any layout takes a whole step in a meta world, without data: nothing in the engine
asks for a value where shapes suffice.
"""

import json
import subprocess
import sys
from typing import Any

import pytest
import torch

from moetrain.config.hub_models import PUBLISHED
from moetrain.testing.tiny import CONFIGS

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="needs a process without CUDA")

SCRIPT = """
import json, resource, sys, time
import torch
started = time.perf_counter()
hf, parallel, rank, size, num_packs, length, sections = json.loads(sys.argv[1])
from moetrain.engine import Engine
from moetrain.engine.world import meta_world
from moetrain.methods import METHODS
from moetrain.testing import ranks
recipe = ranks.recipe_for(
    "-", parallel, model={"path": None, "hf": hf, "dtype": "bf16"},
    **sections,
)
engine = Engine(recipe, meta_world(recipe.parallel, rank, size))
params = [p for chunk in engine.chunks for p in chunk.parameters()]
owned = {p.untyped_storage()._cdata for p in params}
held, now, most = {}, 0, 0
class Kept:
    # A tensor that is kept for a backward pass. Scores of attention are left out: the meta device
    # has a plain kernel for it, which keeps them.
    def __init__(self, tensor):
        global now, most
        self.tensor, self.key = tensor, tensor.untyped_storage()._cdata
        skip = self.key in owned or tensor.shape[-2:] == (length, length)
        self.size = 0 if skip else tensor.untyped_storage().nbytes()
        held[self.key] = held.get(self.key, 0) + 1
        if held[self.key] == 1:
            now, most = now + self.size, max(most, now + self.size)
    def __del__(self):
        global now
        held[self.key] -= 1
        if not held[self.key]:
            now -= self.size
assert all(p.is_meta for p in params)
with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
    engine.step([ranks.packs_of([[1] * length], 1)[0] for _ in range(num_packs)], METHODS["sft"])
gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
from moetrain.layout.activations import activation_bytes
from moetrain.layout.mesh import plan_mesh
bound = activation_bytes(engine.model, plan_mesh(recipe.parallel, size), recipe)
bound = bound[engine.world.pp_rank]
print(json.dumps([sum(p.numel() for p in params), time.perf_counter() - started, gib, most, bound]))
"""


def step(*given: Any) -> tuple[int, float, float, int, int]:
    """(parameters of the rank, seconds, GiB, bytes kept for backward passes at most, the bound that
    a dry run says) of a process that builds an engine and steps.
    """
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT, json.dumps(given)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return tuple(json.loads(done.stdout.splitlines()[-1]))


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
    *_, most, bound = step(hf | {"mlp_only_layers": dense}, parallel, rank, 8, 2, 64, sections)
    assert bound / 4 < most <= bound


def test_a_step_of_a_rank_of_235b() -> None:
    """Of 256 GPUs: its parameters are those that the design counted, and a laptop does it."""
    hf = PUBLISHED["Qwen3-235B-A22B"]
    sections = {"train": {"global_batch": 16, "recompute": "full"}, "data": {"seq_len": 4096}}
    num_params, seconds, gib, *_ = step(hf, {"tp": 2, "pp": 8, "ep": 32}, 0, 256, 1, 4096, sections)
    assert num_params == pytest.approx(1.651e9, rel=1e-3)
    assert seconds < 60
    assert gib < 4
