"""Every recipe for GPUs takes a step on fake CUDA tensors, at its real sizes with a layer in each
chunk: what a GPU's kernels would refuse is found without one.
"""

import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moetrain.config.hub_models import PUBLISHED
from moetrain.config.load import load_recipe
from moetrain.engine.layers import attention
from moetrain.testing import fake_cuda

EXAMPLES = Path(__file__).parents[1] / "examples"
RECIPES = [path for path in sorted(EXAMPLES.glob("*.yaml")) if load_recipe(path).cluster.nodes]
# A head and experts of sizes that no kernel takes as they are, and adapters of too low a rank.
ODD = PUBLISHED["Qwen3-30B-A3B"] | {"head_dim": 20, "moe_intermediate_size": 100}
ODD_CASES = {
    "sizes": ["adapter=null"],
    "adapters": ["adapter.rank=3"],
    "context parallel": ["adapter=null", "parallel.cp=2", "parallel.tp=2"],
    "a head of 320": ["model.hf.head_dim=320", "data.seq_len=1024"],
}
# What is wrong in the product (testing/fake_cuda_run.py) -> with which sizes, and what is then said
MUTATIONS = {
    "heads are not padded": ("sizes", "flash: heads of 20"),
    "experts are not padded": ("sizes", "16 bytes"),
    "adapters are not padded": ("adapters", "16 bytes"),
    "heads of any size go to flash attention": ("a head of 320", "flash: heads of 320"),
    "max_seqlen is too small": ("sizes", "flash: max_seqlen"),
    "a mask stays on the host": ("sizes", "the same device"),
    "counts stay on the host": ("sizes", "nccl: a tensor on cpu"),
}

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")


def run(cases: list[dict[str, Any]], folder: Path) -> list[dict[str, Any]]:
    """In a process that takes this machine for one with a GPU."""
    done = subprocess.run(
        [sys.executable, "-m", "moetrain.testing.fake_cuda_run"],
        input=json.dumps(cases),
        env=fake_cuda.environment(folder),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def case(recipe: Path, rank: int, *overrides: str, mutation: str = "") -> dict[str, Any]:
    return {
        "recipe": str(recipe), "overrides": overrides, "rank": rank, "mutation": mutation,
    }  # fmt: skip


def odd(name: str, mutation: str = "") -> dict[str, Any]:
    model = ["model.path=null", f"model.hf={json.dumps(ODD)}", "data.seq_len=1024"]
    overrides = (*model, *ODD_CASES[name])
    return case(EXAMPLES / "dpo_30b.yaml", 0, *overrides, mutation=mutation)


CASES = [case(path, rank) for path in RECIPES for rank in (0, -1)]
WHOLE = [odd(name) for name in ODD_CASES]
WRONG = [odd(name, mutation) for mutation, (name, _) in MUTATIONS.items()]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[list[dict[str, Any]]]:
    """Of CASES, WHOLE and WRONG."""
    left = iter(run(CASES + WHOLE + WRONG, tmp_path_factory.mktemp("cuda")))
    return [[next(left) for _ in own] for own in (CASES, WHOLE, WRONG)]


def test_every_recipe_takes_a_step(found: list[list[dict[str, Any]]]) -> None:
    """Of the first stage and of the last, backward and optimizer included."""
    assert len(RECIPES) >= 11
    for one, own in zip(CASES, found[0], strict=True):
        assert not own["problem"], (one, own["problem"])
        assert set(own["seen"]) >= {
            "backend torch",
            "aten._grouped_mm",
            "torch_attn._varlen_attn",
            "torch_attn._varlen_attn_backward",
        }
        assert own["params"] > 5e7


def test_odd_sizes_are_padded(found: list[list[dict[str, Any]]]) -> None:
    for name, own in zip(ODD_CASES, found[1], strict=True):
        assert not own["problem"], (name, own["problem"])


def test_what_a_gpu_refuses_is_found(found: list[list[dict[str, Any]]]) -> None:
    for (mutation, (_, wanted)), own in zip(MUTATIONS.items(), found[2], strict=True):
        assert wanted in own["problem"], (mutation, own["problem"])


def flash(
    q: Tensor, k: Tensor, v: Tensor, ends_q: Tensor, ends_k: Tensor, max_q: int, max_k: int,
    *, scale: float, window_size: Any, enable_gqa: bool,
) -> Tensor:  # fmt: skip
    """What torch's kernel computes, for the heads that it takes."""
    assert q.size(-1) % 8 == 0 and window_size == (-1, 0)
    out: list[Tensor] = []
    for (a, b), (c, d) in zip(pairwise(ends_q.tolist()), pairwise(ends_k.tolist()), strict=True):
        mask = torch.ones(b - a, d - c, dtype=torch.bool).tril(d - c - (b - a))
        heads = (x.transpose(0, 1)[None] for x in (q[a:b], k[c:d], v[c:d]))
        one = F.scaled_dot_product_attention(
            *heads, attn_mask=mask, scale=scale, enable_gqa=enable_gqa
        )
        out.append(one[0].transpose(0, 1))
    return torch.cat(out)


@pytest.mark.parametrize("scale", [None, 0.3])
def test_padded_heads_change_nothing(monkeypatch: pytest.MonkeyPatch, scale: float | None) -> None:
    """Nor do the keys of a shared prompt: the two ways through a pack agree."""
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", flash)
    torch.manual_seed(0)
    q, k, v = torch.randn(12, 4, 20), torch.randn(12, 2, 20), torch.randn(12, 2, 20)
    pieces = attention.spans([[0, 4, 9, 12], [-1, 0, -1]], [(0, 12)])
    wanted = attention._attend_sdpa(q, k, v, pieces, attention.Scoring(scale))
    found = attention._attend_varlen(q, k, v, pieces, attention.Scoring(scale))
    torch.testing.assert_close(found, wanted)
