"""Measures what a `Gpu` says, on the device at hand: operations one by one at several sizes."""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
LEAST = 5  # times that an operation is repeated
WAIT = 0.05  # seconds at least for all of them
EXPERTS = 8
type Points = list[list[float]]


class Clock:
    """Seconds of operations on a device; on a CPU of the one thread that does them, so that what
    else the machine does counts little.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.on_gpu = device.type == "cuda"
        if not self.on_gpu:
            torch.set_num_threads(1)

    def seconds(self, do: Callable[[], Any]) -> float:
        """The median of several times, after one that is not counted."""
        do()
        found: list[float] = []
        while len(found) < LEAST or sum(found) < WAIT:
            found.append(self._once(do))
        return statistics.median(found)

    def _once(self, do: Callable[[], Any]) -> float:
        if not self.on_gpu:
            start = time.thread_time()
            do()
            return time.thread_time() - start
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        events[0].record()
        do()
        events[1].record()
        events[1].synchronize()
        return events[0].elapsed_time(events[1]) / 1e3

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Random numbers."""
        return torch.randn(shape, device=self.device).to(dtype)


def gemm_rates(clock: Clock, dtype: torch.dtype) -> Points:
    """[[smallest side, FLOP/s], ...]: the mean over which side it is."""
    large = 4096 if clock.on_gpu else 512
    found: Points = []
    for side in (16, 32, 64, 128, 256, large):
        seconds = flops = 0.0
        for m, n, k in ((side, large, large), (large, side, large), (large, large, side)):
            x, w = clock.normal(m, k, dtype=dtype), clock.normal(n, k, dtype=dtype)
            seconds += clock.seconds(lambda x=x, w=w: x @ w.t())
            flops += 2 * m * n * k
        found.append([side, flops / seconds])
    return found


def grouped_rates(clock: Clock, dtype: torch.dtype) -> Points:
    """[[rows an expert, FLOP/s], ...]: the mean over a product and its two gradients."""
    wide, narrow = (2048, 768) if clock.on_gpu else (256, 128)
    found: Points = []
    for rows in (16, 64, 256, 1024) if not clock.on_gpu else (16, 64, 256, 1024, 4096):
        t = rows * EXPERTS
        x, g = clock.normal(t, wide, dtype=dtype), clock.normal(t, narrow, dtype=dtype)
        w = clock.normal(EXPERTS, narrow, wide, dtype=dtype)
        ends = (torch.arange(EXPERTS, device=clock.device) + 1).mul(rows).int()
        seconds = sum(
            clock.seconds(do)
            for do in (
                lambda x=x, w=w, ends=ends: F.grouped_mm(x, w.transpose(1, 2), offs=ends),
                lambda g=g, w=w, ends=ends: F.grouped_mm(g, w, offs=ends),
                lambda g=g, x=x, ends=ends: F.grouped_mm(g.t(), x, offs=ends),
            )
        )
        found.append([rows, 3 * 2 * t * wide * narrow / seconds])
    return found


def attention_rates(clock: Clock, dtype: torch.dtype) -> tuple[Points, Points]:
    """[[keys, FLOP/s], ...] forward and backward, of the half that a causal mask leaves."""
    heads, groups, dim = (32, 4, 128) if clock.on_gpu else (8, 2, 32)
    forward: Points = []
    backward: Points = []
    for keys in (128, 256, 512, 1024) if not clock.on_gpu else (512, 2048, 8192, 32768):
        q = clock.normal(1, heads, keys, dim, dtype=dtype).requires_grad_()
        k, v = (clock.normal(1, groups, keys, dim, dtype=dtype).requires_grad_() for _ in range(2))

        def attend(q: Tensor = q, k: Tensor = k, v: Tensor = v) -> Tensor:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

        out = attend()
        grad = torch.ones_like(out)

        def back(out: Tensor = out, given: Any = (q, k, v), grad: Tensor = grad) -> Any:
            return torch.autograd.grad(out, given, grad, retain_graph=True)

        flops = 2 * heads * keys * keys * dim
        forward.append([keys, flops / clock.seconds(attend)])
        backward.append([keys, 2.5 * flops / clock.seconds(back)])
    return forward, backward


def memory_rates(clock: Clock) -> dict[str, Points]:
    """{kind: [[bytes moved, bytes a second], ...]}: the geometric mean over what is of a kind."""
    found: dict[str, Points] = {}
    for size in _sizes(clock):
        rates: dict[str, list[tuple[float, float]]] = {}
        for kind, num_bytes, do in _movers(clock, size):
            rates.setdefault(kind, []).append((num_bytes, num_bytes / clock.seconds(do)))
        for kind, own in rates.items():
            point = [statistics.geometric_mean(column) for column in zip(*own, strict=True)]
            found.setdefault(kind, []).append(point)
    return found


def _sizes(clock: Clock) -> Sequence[int]:
    """Elements."""
    return [2**n for n in ((16, 20, 24, 28) if clock.on_gpu else (12, 15, 18, 20, 22))]


def _movers(clock: Clock, n: int) -> Iterator[tuple[str, int, Callable[[], Any]]]:
    """(kind, bytes that are read and written, what does it)."""
    columns = 256
    a, b = clock.normal(n // columns, columns), clock.normal(n // columns, columns)
    low, other = a.bfloat16(), b.bfloat16()
    rows = a.size(0)
    some = torch.randint(rows, (rows,), device=clock.device)
    wide = some[:, None].expand(rows, columns)
    yield "stream", 6 * n, lambda: low * other
    yield "stream", 12 * n, lambda: a * b
    yield "stream", 8 * n, lambda: torch.cat([low, other], dim=1)
    yield "in_place", 12 * n, lambda: a.add_(b)
    yield "in_place", 8 * n, lambda: a.copy_(b)
    yield "in_place", 4 * n, lambda: torch.zeros_like(b)
    yield "convert", 6 * n, lambda: b.bfloat16()
    yield "convert", 6 * n, lambda: low.float()
    yield "function", 4 * n, lambda: F.silu(low)
    yield "function", 8 * n, lambda: b.softmax(1)
    yield "function", 8 * n, lambda: b.exp()
    yield "reduce", 4 * n, lambda: b.sum(1)
    yield "reduce", 4 * n, lambda: b.mean(1)
    yield "gather", 4 * n, lambda: low.index_select(0, some)
    yield "gather", 4 * n, lambda: low.gather(0, wide)
    yield "gather", 6 * n, lambda: low.index_add(0, some, other)
    yield "gather", 6 * n, lambda: low.scatter_add(0, wide, other)
    yield "sort", 4 * n, lambda: b.topk(8, dim=1)


def optimizer_rates(clock: Clock) -> Points:
    """[[bytes moved, bytes a second], ...] of torch's fused AdamW, four reads and three writes."""
    found: Points = []
    for n in _sizes(clock):
        params = [clock.normal(n) for _ in range(4)]
        step = torch.ones((), device=clock.device)

        def adamw(params: list[Tensor] = params, step: Tensor = step) -> None:
            torch._fused_adamw_(  # type: ignore[attr-defined]
                *([p] for p in params),
                *([], [step]),
                **dict(lr=1e-3, beta1=0.9, beta2=0.95, weight_decay=0.1, eps=1e-8),
                **dict(amsgrad=False, maximize=False),
            )

        found.append([28 * n, 28 * n / clock.seconds(adamw)])
    return found
