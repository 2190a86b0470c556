"""Attention with sinks and windows: what flash kernels give, put right, against the formula."""

from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moetrain.engine.layers import attention
from moetrain.engine.layers.attention import Scoring
from moetrain.ops.sinks import cpu_kernel, with_sinks, with_sinks_plainly

TOKENS, KEYS, HEADS, SIZE = 9, 13, 4, 16


def inputs(num_q: int = TOKENS, num_k: int = KEYS) -> list[Tensor]:
    torch.manual_seed(0)
    shapes = [(num_q, HEADS, SIZE), (num_k, HEADS, SIZE), (num_k, HEADS, SIZE), (HEADS,)]
    return [torch.randn(shape, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("window", [None, 1, 4, 100])
@pytest.mark.parametrize("num_q", [TOKENS, KEYS])
def test_values_and_gradients_are_the_formulas(num_q: int, window: int | None) -> None:
    q, k, v, sinks = inputs(num_q)
    mask = Scoring(window=window).mask(num_q, KEYS, q.device)
    wanted = with_sinks_plainly(q, k, v, sinks, mask, 0.3)
    found = with_sinks(q, k, v, sinks, cpu_kernel(mask, 0.3))
    torch.testing.assert_close(found, wanted)
    grad = torch.randn_like(found)
    every = [q, k, v, sinks]
    for one, other in zip(
        torch.autograd.grad(found, every, grad), torch.autograd.grad(wanted, every, grad),
        strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_a_window_is_the_last_keys() -> None:
    """A query sees its own key and those before it, `window` together."""
    mask = Scoring(window=3).mask(4, 6, torch.device("cpu"))
    assert mask is not None
    assert mask.int().tolist() == [
        [1, 1, 1, 0, 0, 0],
        [0, 1, 1, 1, 0, 0],
        [0, 0, 1, 1, 1, 0],
        [0, 0, 0, 1, 1, 1],
    ]
    assert Scoring(window=6).mask(6, 6, torch.device("cpu")) is None


def flash(
    q: Tensor, k: Tensor, v: Tensor, ends_q: Tensor, ends_k: Tensor, max_q: int, max_k: int,
    *, scale: float | None, window_size: tuple[int, int], enable_gqa: bool, return_aux: Any = None,
) -> Any:  # fmt: skip
    """What torch's kernel computes: outputs, and the logarithm of what the softmax divides by."""
    assert enable_gqa and window_size[1] == 0
    k, v = (x.repeat_interleave(q.size(1) // k.size(1), 1) for x in (k, v))
    out: list[Tensor] = []
    sums: list[Tensor] = []
    for (a, b), (c, d) in zip(pairwise(ends_q.tolist()), pairwise(ends_k.tolist()), strict=True):
        seen = torch.ones(b - a, d - c, dtype=torch.bool).tril(d - c - (b - a))
        if window_size[0] >= 0:
            seen = seen.triu(d - c - (b - a) - window_size[0])
        logits = torch.einsum("tad,kad->atk", q[a:b], k[c:d]) * (scale or q.size(-1) ** -0.5)
        logits = logits.masked_fill(~seen, float("-inf"))
        out.append(torch.einsum("atk,kad->tad", logits.softmax(-1), v[c:d]))
        sums.append(logits.logsumexp(-1))
    whole = torch.cat(out)
    return (whole, torch.cat(sums, 1)) if return_aux and return_aux.lse else whole


@pytest.mark.parametrize("size", [SIZE, 20])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("has_sinks", [False, True])
def test_both_ways_through_a_pack(
    monkeypatch: pytest.MonkeyPatch, has_sinks: bool, window: int | None, size: int
) -> None:
    """One kernel for a pack with shared prompts, as on a GPU, and a call for each span."""
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", flash)
    torch.manual_seed(0)
    q, k, v = torch.randn(12, 4, size), torch.randn(12, 2, size), torch.randn(12, 2, size)
    how = Scoring(0.3, window, torch.randn(4) if has_sinks else None)
    pieces = attention.spans([[0, 4, 9, 12], [-1, 0, -1]], [(0, 12)])
    wanted = attention._attend_sdpa(q, k, v, pieces, how)
    torch.testing.assert_close(attention._attend_varlen(q, k, v, pieces, how), wanted)
    other = attention._attend_sdpa(q, k, v, pieces, Scoring(0.3))
    assert (window is None and not has_sinks) == torch.equal(wanted, other)


def test_without_sinks_nothing_is_lost() -> None:
    q, k, v, _ = inputs(KEYS)
    none = torch.full((HEADS,), -1e4)
    found = with_sinks(q, k, v, none, cpu_kernel(None, 0.3))
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    wanted = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3)
    torch.testing.assert_close(found, wanted[0].transpose(0, 1))
