"""Sums over the sequences of a pack."""

import torch

from moetrain.ops.segment import segment_sum

CU = torch.tensor([0, 2, 2, 5], dtype=torch.int32)


def test_sums_per_sequence() -> None:
    values = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0], requires_grad=True)
    assert segment_sum(values, CU).tolist() == [3.0, 0.0, 12.0]
    (segment_sum(values, CU) * torch.tensor([1.0, 7.0, 10.0])).sum().backward()
    assert values.grad is not None and values.grad.tolist() == [1.0, 1.0, 10.0, 10.0, 10.0]
