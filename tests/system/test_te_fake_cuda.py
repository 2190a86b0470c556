"""Every recipe for GPUs takes a step with Transformer Engine's modules on fake CUDA tensors, at its
real sizes: their kernels are stood in by torch, all else takes its branches for CUDA.
"""

import json
import subprocess
from pathlib import Path

import pytest

from moetrain.testing import fake_cuda
from moetrain.testing.te_workers import FOLDER
from tests.test_fake_cuda import CASES


def test_every_recipe_takes_a_step(tmp_path: Path) -> None:
    """But for the fused permutation, whose kernels are Triton's and want values."""
    if not (FOLDER / "bin" / "python").exists():
        pytest.skip("no .venv-te (make te-cpu), so this stays unproven: the te backend on CUDA")
    plain = "megatron.moe_permute_fusion=false"
    cases = [one | {"overrides": [*one["overrides"], plain]} for one in CASES[::2]]
    done = subprocess.run(
        [FOLDER / "bin" / "python", "-m", "moetrain.testing.fake_cuda_run", "--te"],
        input=json.dumps(cases),
        env=fake_cuda.environment(tmp_path) | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    for one, found in zip(cases, json.loads(done.stdout.splitlines()[-1]), strict=True):
        assert not found["problem"], (one, found["problem"])
        assert {"backend te", "torch_attn._varlen_attn_backward"} <= set(found["seen"])
