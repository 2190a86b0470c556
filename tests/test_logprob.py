"""Chunked vocabulary-parallel log-probs against torch's log_softmax."""

from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import spawn
from torch.utils._python_dispatch import TorchDispatchMode

from moetrain.ops.logprob import token_logprobs

T, H, V, PADDED = 23, 6, 13, 20


def make_inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(T, H, generator=g).to(dtype)
    weight = torch.randn(PADDED, H, generator=g).to(dtype)
    labels = torch.randint(0, V, (T,), generator=g)
    return hidden, weight, labels, torch.randn(T, generator=g)


def reference(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    out_grad: Tensor,
    temperature: float | Tensor,
    bonus: float = 0.0,
) -> tuple[Tensor, ...]:
    """logp, entropy, log sum p^2, gradient of hidden, gradient of weight by the plain formula;
    `bonus`: how much of the gradient, token by token the other way round, is the entropy's.
    """
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    logits = (hidden @ weight.t())[:, :V].float() / torch.as_tensor(temperature).reshape(-1, 1)
    full = logits.log_softmax(-1)
    logp = full.gather(1, labels[:, None])[:, 0]
    entropy = -(full.exp() * full).sum(-1)
    (logp * out_grad + bonus * entropy * out_grad.flip(0)).sum().backward()
    assert hidden.grad is not None and weight.grad is not None
    others = entropy, full.exp().square().sum(-1).log()
    return logp.detach(), *(x.detach() for x in others), hidden.grad, weight.grad


@pytest.mark.parametrize("chunk", [1, 5, 1024])
@pytest.mark.parametrize("temperature", [1.0, 0.7, "one a token"])
@pytest.mark.parametrize("bonus", [0.0, 1.3])
def test_equals_log_softmax(chunk: int, temperature: float | Tensor | str, bonus: float) -> None:
    hidden, weight, labels, out_grad = make_inputs()
    if isinstance(temperature, str):
        temperature = torch.linspace(0.5, 2, T)
    expected = reference(hidden, weight, labels, out_grad, temperature, bonus)
    hidden.requires_grad_()
    weight.requires_grad_()
    logp, entropy, squares = token_logprobs(
        hidden,
        weight,
        labels,
        group=None,
        vocab_start=0,
        vocab_size=V,
        chunk=chunk,
        temperature=temperature,
        with_entropy=True,
        with_squares=True,
    )
    assert entropy is not None
    assert squares is not None and not squares.requires_grad
    total = (logp * out_grad).sum()
    (total + bonus * (entropy * out_grad.flip(0)).sum() if bonus else total).backward()
    near = 1e-5 if bonus else 2e-6  # of gradients of about 6, in fp32
    found = (logp, entropy, squares, hidden.grad, weight.grad)
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got, want, atol=near, rtol=2e-6)
    assert weight.grad is not None and weight.grad[V:].abs().max() == 0


def test_bfloat16_weights_and_fp32_hidden() -> None:
    hidden, weight, labels, out_grad = make_inputs(torch.bfloat16)
    expected = reference(hidden.float(), weight.float(), labels, out_grad, 1.0)
    hidden, weight = hidden.float().requires_grad_(), weight.requires_grad_()
    logp, entropy, squares = token_logprobs(
        hidden, weight, labels, group=None, vocab_start=0, vocab_size=V, chunk=4
    )
    (logp * out_grad).sum().backward()
    assert entropy is None and squares is None and logp.dtype == torch.float32
    assert hidden.grad is not None and weight.grad is not None
    assert hidden.grad.dtype == torch.float32 and weight.grad.dtype == torch.bfloat16
    torch.testing.assert_close(logp, expected[0], atol=0.05, rtol=0.02)
    torch.testing.assert_close(hidden.grad, expected[3], atol=0.05, rtol=0.05)
    torch.testing.assert_close(weight.grad.float(), expected[4], atol=0.1, rtol=0.05)


def test_extreme_logits_stay_finite() -> None:
    hidden, weight, labels, _ = make_inputs()
    hidden = (hidden * 1e4).requires_grad_()
    logp, entropy, _ = token_logprobs(
        hidden, weight, labels, group=None, vocab_start=0, vocab_size=V, with_entropy=True
    )
    assert (
        logp.isfinite().all()
        and entropy is not None
        and entropy.isfinite().all()
        and entropy.min() >= -1e-6
    )
    entropy.sum().backward()
    assert hidden.grad is not None and hidden.grad.isfinite().all()


def check_vocab_parallel(rank: int, world: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=60),
    )
    hidden, weight, labels, out_grad = make_inputs()
    for vocab_rows in (PADDED, 2 * PADDED):  # at 40 rows the second rank of two holds padding only
        whole = torch.cat([weight, torch.full((vocab_rows - PADDED, H), 50.0)])
        expected = reference(hidden, whole, labels, out_grad, 0.9, bonus=0.7)
        rows = vocab_rows // world
        local = whole[rank * rows : (rank + 1) * rows].clone().requires_grad_()
        inputs = hidden.clone().requires_grad_()
        logp, entropy, squares = token_logprobs(
            inputs,
            local,
            labels,
            group=dist.group.WORLD,
            vocab_start=rank * rows,
            vocab_size=V,
            chunk=7,
            temperature=0.9,
            with_entropy=True,
            with_squares=True,
        )
        assert entropy is not None
        (logp * out_grad + 0.7 * entropy * out_grad.flip(0)).sum().backward()
        assert inputs.grad is not None and local.grad is not None
        dist.all_reduce(inputs.grad)
        got = (logp, entropy, squares, inputs.grad, local.grad)
        want = (*expected[:4], expected[4][rank * rows : (rank + 1) * rows])
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, atol=2e-6, rtol=2e-6)
    dist.destroy_process_group()


def test_vocabulary_parallel_on_gloo(tmp_path: Path) -> None:
    spawn(check_vocab_parallel, args=(2, str(tmp_path / "store")), nprocs=2)


class LargestTensor(TorchDispatchMode):
    """Remembers the most elements that any operator's output has had."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, tuple | list) else [out]:
            if isinstance(value, Tensor):
                self.largest = max(self.largest, value.numel())
        return out


@pytest.mark.parametrize("bonus", [False, True])
def test_no_tensor_of_all_logits_exists(bonus: bool) -> None:
    t, v, chunk = 512, 4096, 32
    hidden = torch.randn(t, 8, requires_grad=True)
    weight = torch.randn(v, 8, requires_grad=True)
    labels = torch.randint(0, v, (t,))
    with LargestTensor() as seen:
        logp, entropy, _ = token_logprobs(
            hidden,
            weight,
            labels,
            group=None,
            vocab_start=0,
            vocab_size=v,
            chunk=chunk,
            with_entropy=True,
        )
        assert entropy is not None
        (logp + entropy if bonus else logp).sum().backward()
    assert seen.largest == chunk * v  # a sixteenth of [t, v]
