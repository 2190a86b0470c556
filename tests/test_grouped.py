"""Products of many experts at once, against one after the other."""

import pytest
import torch

from moetrain.ops.grouped import grouped_linear

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
