"""Products of many experts at once, against one after the other."""

from typing import Any

import pytest
import torch

from moetrain.models.parts.mlp import SWIGLU, Glu
from moetrain.ops import swiglu
from moetrain.ops.grouped import grouped_linear
from moetrain.ops.swiglu import weighted_swiglu

WIDTHS = {"read by the kernel": (8, 12), "rows too narrow for it": (7, 5)}


@pytest.mark.parametrize("counts", [[3, 0, 4], [0, 0, 7], [0, 0, 0]], ids=str)
@pytest.mark.parametrize("widths", WIDTHS)
def test_equals_one_expert_after_the_other(widths: str, counts: list[int]) -> None:
    """Gradients too: a weight that nothing came to has one of zeros, since the data-parallel
    buckets wait for every weight's.
    """
    num_in, num_out = WIDTHS[widths]
    torch.manual_seed(0)
    x = torch.randn(sum(counts), num_in, requires_grad=True)
    weight = torch.randn(len(counts), num_out, num_in, requires_grad=True)
    ends = torch.tensor(counts).cumsum(0).to(torch.int32)
    found = grouped_linear(x, weight, ends)
    wanted = torch.cat([part @ w.T for part, w in zip(x.split(counts), weight, strict=True)])
    assert found.shape == (sum(counts), num_out)
    torch.testing.assert_close(found, wanted)
    scale = torch.randn_like(found)
    grads = [torch.autograd.grad((y * scale).sum(), (x, weight)) for y in (found, wanted)]
    for grad, other in zip(*grads, strict=True):
        torch.testing.assert_close(grad, other)


@pytest.mark.parametrize("frozen", [None, 0, 1])
@pytest.mark.parametrize("how", [SWIGLU, Glu(1.702, 1.0, 0.5)], ids=["silu", "clamped"])
def test_swiglu_keeps_its_input_alone(how: Glu, frozen: int | None) -> None:
    """Gradients to the bit those of plain autograd, which keeps two more tensors of its size."""
    torch.manual_seed(0)
    kept: list[int] = []

    def keep(x: torch.Tensor) -> torch.Tensor:
        kept.append(x.numel() * x.element_size())
        return x

    def run(function: Any) -> tuple[list[torch.Tensor], int]:
        kept.clear()
        inputs = [data.clone().requires_grad_(i != frozen) for i, data in enumerate(given)]
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            out = function(*inputs, how)
        size = sum(kept)
        out.sum().backward()
        return [out, *(x.grad for x in inputs if x.grad is not None)], size

    given = [torch.randn(9, 16, dtype=torch.bfloat16), torch.rand(9)]
    own, size = run(weighted_swiglu)
    plain, more = run(swiglu._weighted)
    assert len(own) == 3 - (frozen is not None)
    assert all(torch.equal(a, b) for a, b in zip(own, plain, strict=True))
    assert frozen == 0 or size < 0.7 * more
