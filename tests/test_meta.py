"""One rank of a job takes a whole step on the meta device, without data: nothing in the engine asks
for a value where shapes suffice.
"""

import subprocess
import sys

import pytest
import torch

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="needs a process without CUDA")

# What stands in here is upstream's: coalesced collectives and batched P2P have no meta kernel, the
# dispatcher's splits and the gradient norm are values.
SCRIPT = """
import contextlib, os
os.environ.update(RANK="7", WORLD_SIZE="8")
import torch, torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from moetrain.engine import compat_megatron, compat_torch, device
META = torch.device("meta")
compat_torch.install(META); compat_megatron.install()
dist.init_process_group("fake", rank=7, world_size=8, store=FakeStore())
device.prepare = device.start = lambda **_: META

import megatron.core.distributed.param_and_grad_buffer as buffers
import megatron.core.transformer.moe.moe_layer as moe_layer
import megatron.core.transformer.moe.token_dispatcher as dispatchers
class OneByOne(contextlib.nullcontext):
    def __init__(self, *args, **kwargs): super().__init__(self)
    def wait(self): pass
buffers._coalescing_manager = OneByOne
class Balanced(dispatchers.MoEAlltoAllTokenDispatcher):
    def preprocess(self, routing_map):
        each = routing_map.size(0) * self.config.moe_router_topk // self.num_experts
        local = self.num_local_experts
        full = lambda *shape: torch.full(shape, each, dtype=torch.long, device="cpu")
        self.num_out_tokens = each * self.num_experts
        self.input_splits = self.output_splits = (full(self.ep_size) * local).numpy()
        self.output_splits_tp = (full(self.tp_size) * local * self.ep_size).numpy()
        self.num_global_tokens_per_local_expert = full(self.tp_size * self.ep_size, local)
        return full(local) * self.tp_size * self.ep_size
    def _maybe_dtoh_and_synchronize(self, point, counts=None): return counts
moe_layer.MoEAlltoAllTokenDispatcher = Balanced

from moetrain.engine.engine import Engine
from moetrain.methods import METHODS
from moetrain.testing import ranks
from moetrain.testing.tiny import CONFIGS
Engine._load_source = lambda self: None
hf = {**CONFIGS["qwen3_moe"], "moe_intermediate_size": 32, "num_experts": 8}
recipe = ranks.recipe_for(
    "-", {"tp": 2, "pp": 2, "ep": 2}, model={"path": None, "hf": hf, "dtype": "bf16"},
    train={"global_batch": 4, "recompute": "full"}, megatron={"batch_p2p_comm": False},
)
engine = Engine(recipe)
assert all(p.is_meta for chunk in engine.chunks for p in chunk.parameters())
engine.optimizer.get_grad_norm = lambda: 0.0
engine.step([ranks.packs_of([[1] * 64], 1)[0] for _ in range(2)], METHODS["sft"])
"""


def test_a_step_without_data() -> None:
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
