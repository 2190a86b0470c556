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
started = time.perf_counter()
hf, parallel, rank, size, num_packs, length, sections = json.loads(sys.argv[1])
from moetrain.engine import Engine
from moetrain.engine.world import meta_world
from moetrain.methods import METHODS
from moetrain.testing import ranks
recipe = ranks.recipe_for(
    "-", parallel, model={"path": None, "hf": hf, "dtype": "bf16"},
    megatron={"batch_p2p_comm": False}, **sections,
)
engine = Engine(recipe, meta_world(recipe.parallel, rank, size))
params = [p for chunk in engine.chunks for p in chunk.parameters()]
assert all(p.is_meta for p in params)
engine.step([ranks.packs_of([[1] * length], 1)[0] for _ in range(num_packs)], METHODS["sft"])
gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
print(json.dumps([sum(p.numel() for p in params), time.perf_counter() - started, gib]))
"""
FULL = {"train": {"global_batch": 4, "recompute": "full"}}


def step(*given: Any) -> tuple[int, float, float]:
    """(parameters of the rank, seconds, GiB) of a process that builds an engine and steps."""
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT, json.dumps(given)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return tuple(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize(
    ("rank", "parallel", "dense"),
    [
        (7, {"tp": 2, "pp": 2, "ep": 2}, []),
        (0, {"tp": 2, "etp": 2, "ep": 2, "pp": 2}, [0, 1]),  # a stage without experts
    ],
)
def test_a_step_without_data(rank: int, parallel: dict[str, int], dense: list[int]) -> None:
    hf = {**CONFIGS["qwen3_moe"], "moe_intermediate_size": 32, "num_experts": 8}
    step(hf | {"mlp_only_layers": dense}, parallel, rank, 8, 2, 64, FULL)


def test_a_step_of_a_rank_of_235b() -> None:
    """Of 256 GPUs: its parameters are those that the design counted, and a laptop does it."""
    hf = PUBLISHED["Qwen3-235B-A22B"]
    sections = {"train": {"global_batch": 16, "recompute": "full"}, "data": {"seq_len": 4096}}
    num_params, seconds, gib = step(hf, {"tp": 2, "pp": 8, "ep": 32}, 0, 256, 1, 4096, sections)
    assert num_params == pytest.approx(1.651e9, rel=1e-3)
    assert seconds < 60
    assert gib < 4
