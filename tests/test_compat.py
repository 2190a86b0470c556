"""Each mend of upstream is still needed: when one of these fails, the mend it names can go."""

import json
import subprocess
import sys

import pytest
import torch

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(),
    reason="the mends are for machines without a GPU; with one they stay unproven",
)

NEEDED = {
    "compat_megatron: to_host": (
        "import torch; from megatron.core.transformer.moe.token_dispatcher import "
        "maybe_move_tensor_to_cpu as f;"
        "assert torch.is_tensor(f(torch.ones(2), as_numpy=True))"
    ),
    "compat_megatron: rng": (
        "import torch, megatron.core.tensor_parallel.random as r\n"
        "try: r._get_cuda_rng_state()\n"
        "except Exception: pass\n"
        "else: raise SystemExit('runs without a GPU now')"
    ),
    "compat_torch: current_device": (
        "import torch\n"
        "try: torch.cuda.current_device()\n"
        "except Exception: pass\n"
        "else: raise SystemExit('runs without a GPU now')"
    ),
    "compat_torch: Tensor.type": (
        "import inspect, megatron.core.optimizer.distrib_optimizer as d;"
        "assert 'torch.cuda.FloatTensor' in inspect.getsource(d)"
    ),
    "compat_megatron: a plain queue for a save's results": (
        "import inspect\n"
        "from megatron.core.dist_checkpointing.strategies import filesystem_async as f\n"
        "assert 'Manager().Queue()' in inspect.getsource(f.get_write_results_queue)"
    ),
    "backend.RMSNorm: upstream refuses sequence parallelism": (
        "import inspect; from megatron.core.transformer.torch_norm import WrappedTorchNorm as W;"
        "assert 'not config.sequence_parallel' in inspect.getsource(W)"
    ),
    "compat_megatron: a head asks for Apex": (
        "import inspect; from megatron.core.tensor_parallel import ColumnParallelLinear as C;"
        "assert 'not _grad_accum_fusion_available' in inspect.getsource(C.__init__)"
    ),
    "compat_megatron: uncompiled": (
        "import sys, megatron.core\nassert 'torch._inductor.compile_fx' in sys.modules"
    ),
    "compat_megatron: fail together": (
        "import inspect\n"
        "from megatron.core.dist_checkpointing.strategies import state_dict_saver as s\n"
        "source = inspect.getsource(s.save_state_dict_async_finalize)\n"
        "assert source.index('writer.finish(') < source.index('broadcast(')\n"
        "assert 'try:' not in source"
    ),
    "router.PackedMoE: padding_mask becomes a bool": (
        "import inspect; from megatron.core.transformer.moe.moe_layer import MoELayer as L;"
        "assert 'padding_mask.transpose(0, 1).bool()' in inspect.getsource(L.forward)"
    ),
}


# Each in a process of its own, forked from one that has imported megatron-core without the mends.
LOOK = """
import json, os, sys, traceback
import megatron.core
for name, code in json.loads(sys.argv[1]).items():
    if os.fork() == 0:
        try:
            exec(code, {})
        except BaseException:
            print(json.dumps([name, traceback.format_exc()[-500:]]), flush=True)
        os._exit(0)
    os.wait()
"""


@pytest.fixture(scope="module")
def unneeded() -> dict[str, str]:
    command = [sys.executable, "-W", "ignore", "-c", LOOK, json.dumps(NEEDED)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return dict(json.loads(line) for line in done.stdout.splitlines())


@pytest.mark.parametrize("mend", NEEDED)
def test_the_mend_is_still_needed(mend: str, unneeded: dict[str, str]) -> None:
    assert mend not in unneeded, f"{mend} can go: {unneeded[mend]}"


def test_the_fields_of_megatrons_config_are_known() -> None:
    import dataclasses

    from megatron.core.transformer.transformer_config import TransformerConfig

    from moetrain.config.megatron import FIELDS

    assert {field.name for field in dataclasses.fields(TransformerConfig)} == FIELDS


def test_a_device_context_still_counts() -> None:
    """transformers builds a model `with torch.device("meta")` in the same process."""
    code = (
        "import torch; from moetrain.engine import device; device.prepare()\n"
        "with torch.device('meta'): assert torch.tensor([1.0]).is_meta and torch.ones(2).is_meta\n"
        "assert torch.ones(2, device='cuda').device.type == 'cpu'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-500:]
