#!/usr/bin/env bash
# torch 2.13.0, torch.utils.flop_counter.FlopCounterMode, which people take for a model's FLOPs (MFU).
#
# Input: the product of a mixture's experts, torch.nn.functional.grouped_mm of 64 rows of 32 numbers
# with 4 weights of [32, 48] in bf16, and its backward pass; beside it the same rows times one weight.
# Expected: the same number for both forward passes, 2 * 64 * 32 * 48 = 196,608, since every row meets
# one matrix in either; and three times as much with the backward pass.
# Seen: 0 for the grouped product and for its backward pass, without a warning. A mixture whose experts
# are computed by it has all of their FLOPs left out.
# moetrain meets it where a trace counts a step: it has a formula of its own (planner/watch.py).
#
# Output seen:
#   one product: 196608, with backward 589824
#   grouped product: 0, with backward 0
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0

"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import sys

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

ROWS, COLUMNS, WIDTH, EXPERTS = 64, 32, 48, 4
ends = (torch.arange(EXPERTS) + 1).mul(ROWS // EXPERTS).int()


def flops(shape, product):
    x = torch.randn(ROWS, COLUMNS, dtype=torch.bfloat16, requires_grad=True)
    w = torch.randn(shape, dtype=torch.bfloat16, requires_grad=True)
    with FlopCounterMode(display=False) as forward:
        y = product(x, w)
    with FlopCounterMode(display=False) as backward:
        y.backward(torch.ones_like(y))
    assert y.shape == (ROWS, WIDTH) and w.grad.abs().sum() > 0
    return forward.get_total_flops(), forward.get_total_flops() + backward.get_total_flops()


one = flops((COLUMNS, WIDTH), torch.matmul)
grouped = flops((EXPERTS, COLUMNS, WIDTH), lambda x, w: F.grouped_mm(x, w, offs=ends))
print(f"one product: {one[0]}, with backward {one[1]}")
print(f"grouped product: {grouped[0]}, with backward {grouped[1]}")
expected = 2 * ROWS * COLUMNS * WIDTH
sys.exit(not (one == (expected, 3 * expected) and grouped == (0, 0)))
PYTHON
