"""Measures what a `Gpu` says of operations, on the device at hand, at several sizes.

They are done in turn, one of each, over and over, as in a step, where an operation seldom comes
twice. What meets weights, gradients and moments finds them out of the caches: a step has been
through all others since. Activations have just been made, so operations on them take turns with
those of their size alone.
"""

import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
ROUNDS = 25  # times that each operation is done, after one that is not counted
EXPERTS, MORE = 8, 64
SMALL_ROWS, SMALL_SIDE = 16, 64  # of an expert whose product is next to nothing
COLUMNS = 256  # of what goes over memory
type Points = list[list[float]]


@dataclass(frozen=True)
class Operation:
    """One to be measured, for a point of a curve.

    size: operations of one size make a point.
    x: of the point; None: the mean of their bytes.
    amount: FLOPs, or bytes that are read and written.
    """

    curve: tuple[str, str]  # field of a Gpu and key in it
    size: int
    x: float | None
    amount: float
    do: Callable[[], Any]


class Clock:
    """Seconds of operations on a device; on a CPU of the one thread that does them, so that what
    else the machine does counts little.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.on_gpu = device.type == "cuda"
        if not self.on_gpu:
            torch.set_num_threads(1)

    def in_turn(self, operations: Sequence[Operation]) -> list[float]:
        """The median of each."""
        order = list(range(len(operations)))
        random.Random(0).shuffle(order)
        seconds: list[list[float]] = [[] for _ in operations]
        for number in range(ROUNDS + 1):
            for i in order:
                once = self.once(operations[i].do)
                if number:
                    seconds[i].append(once)
        return [statistics.median(times) for times in seconds]

    def once(self, do: Callable[[], Any]) -> float:
        """Of one time."""
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

    def finish(self) -> None:
        """Wait until the device has done everything."""
        if self.on_gpu:
            torch.cuda.synchronize()

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Random numbers."""
        return torch.randn(shape, device=self.device).to(dtype)


def expert_seconds(clock: Clock) -> float:
    """That a grouped product takes for each expert beside its FLOPs."""

    def small(experts: int) -> list[Operation]:
        products = _products(clock, torch.bfloat16, experts, SMALL_ROWS, SMALL_SIDE, SMALL_SIDE)
        return [Operation(("", ""), experts, None, 0, do) for do in products]

    operations = [*small(EXPERTS), *small(MORE)]
    seconds = clock.in_turn(operations)
    few, more = (sum(seconds[i : i + 3]) / 3 for i in (0, 3))
    return max(0.0, more - few) / (MORE - EXPERTS)


def rates(
    clock: Clock, dtypes: dict[str, torch.dtype], of_expert: float
) -> dict[tuple[str, str], Points]:
    """{(field of a Gpu, key in it): [[x, FLOP/s or bytes a second], ...]}.

    of_expert: `expert_seconds`, which are not in the rates of grouped products.
    """
    cold: list[Operation] = []
    warm: list[list[Operation]] = []
    for name, dtype in dtypes.items():
        cold += [*_gemms(clock, name, dtype), *_grouped(clock, name, dtype)]
        warm += [[*_attention(clock, name, dtype, keys)] for keys in _keys(clock)]
    for size in _sizes(clock):
        cold += [*_in_place(clock, size), _adamw(clock, size)]
        warm.append([*_movers(clock, size)])
    same: dict[tuple[Any, ...], list[tuple[Operation, float]]] = {}
    for operations in (cold, *warm):
        for one, seconds in zip(operations, clock.in_turn(operations), strict=True):
            if one.curve[0] == "grouped":
                seconds = max(seconds - EXPERTS * of_expert, seconds / EXPERTS)
            same.setdefault((one.curve, one.size), []).append((one, seconds))
    curves: dict[tuple[str, str], Points] = {}
    for (curve, _), measured in same.items():
        curves.setdefault(curve, []).append(_point(measured))
    return curves


def _point(measured: Sequence[tuple[Operation, float]]) -> list[float]:
    """Of operations of a size: all FLOPs over all seconds; of what goes over memory geometric
    means, since they move different numbers of bytes.
    """
    x = measured[0][0].x
    if x is not None:
        return [x, sum(one.amount for one, _ in measured) / sum(s for _, s in measured)]
    num_bytes = statistics.geometric_mean(one.amount for one, _ in measured)
    return [num_bytes, statistics.geometric_mean(one.amount / s for one, s in measured)]


def _gemms(clock: Clock, name: str, dtype: torch.dtype) -> Iterator[Operation]:
    """By the smallest side, whichever it is."""
    large = 4096 if clock.on_gpu else 512
    for side in (16, 32, 64, 128, 256, large):
        for m, n, k in ((side, large, large), (large, side, large), (large, large, side)):
            x, w = clock.normal(m, k, dtype=dtype), clock.normal(n, k, dtype=dtype)
            do = partial(_product, x, w)
            yield Operation(("gemm", name), side, side, 2 * m * n * k, do)


def _product(x: Tensor, w: Tensor) -> Tensor:
    return x @ w.t()


def _grouped(clock: Clock, name: str, dtype: torch.dtype) -> Iterator[Operation]:
    """By the rows of an expert: a product and its two gradients."""
    wide, narrow = (2048, 768) if clock.on_gpu else (512, 256)
    for rows in (16, 64, 256, 1024) if not clock.on_gpu else (16, 64, 256, 1024, 4096):
        for do in _products(clock, dtype, EXPERTS, rows, wide, narrow):
            flops = 2 * EXPERTS * rows * wide * narrow
            yield Operation(("grouped", name), rows, rows, flops, do)


def _products(
    clock: Clock, dtype: torch.dtype, experts: int, rows: int, wide: int, narrow: int
) -> Iterator[Callable[[], Tensor]]:
    """Of so many experts with so many rows each."""
    t = experts * rows
    x, g = clock.normal(t, wide, dtype=dtype), clock.normal(t, narrow, dtype=dtype)
    w = clock.normal(experts, narrow, wide, dtype=dtype)
    ends = (torch.arange(experts, device=clock.device) + 1).mul(rows).int()
    for a, b in ((x, w.transpose(1, 2)), (g, w), (g.t(), x)):
        yield partial(F.grouped_mm, a, b, offs=ends)


def _keys(clock: Clock) -> Sequence[int]:
    return (512, 2048, 8192, 32768) if clock.on_gpu else (128, 256, 512, 1024)


def _attention(clock: Clock, name: str, dtype: torch.dtype, keys: int) -> Iterator[Operation]:
    """By keys; of the half that a causal mask leaves."""
    heads, groups, dim = (32, 4, 128) if clock.on_gpu else (8, 2, 32)
    q = clock.normal(1, heads, keys, dim, dtype=dtype).requires_grad_()
    k, v = (clock.normal(1, groups, keys, dim, dtype=dtype).requires_grad_() for _ in range(2))
    attend = partial(F.scaled_dot_product_attention, q, k, v, is_causal=True, enable_gqa=True)
    out = attend()
    back = partial(torch.autograd.grad, out, (q, k, v), torch.ones_like(out), retain_graph=True)
    flops = 2 * heads * keys * keys * dim
    yield Operation(("attention", name), keys, keys, flops, attend)
    yield Operation(("attention_backward", name), keys, keys, 2.5 * flops, back)


def _sizes(clock: Clock) -> Sequence[int]:
    """Elements."""
    return [2**n for n in ((16, 20, 24, 28) if clock.on_gpu else (12, 15, 18, 20, 22))]


def _movers(clock: Clock, n: int) -> Iterator[Operation]:
    """What goes over memory, by kind."""
    a, b = clock.normal(n // COLUMNS, COLUMNS), clock.normal(n // COLUMNS, COLUMNS)
    low, other = a.bfloat16(), b.bfloat16()
    rows = a.size(0)
    some = torch.randint(rows, (rows,), device=clock.device)
    wide = some[:, None].expand(rows, COLUMNS)
    gate = torch.cat([low, other], dim=1)[:, :COLUMNS]  # a half of what experts project to
    movers: dict[str, list[tuple[int, Callable[[], Any]]]] = {
        "stream": [
            (6, lambda: low * other),
            (12, lambda: a * b),
            (8, lambda: torch.cat([low, other], dim=1)),
        ],
        "convert": [(6, lambda: b.bfloat16()), (6, lambda: low.float())],
        "function": [(4, lambda: F.silu(gate)), (8, lambda: b.softmax(1)), (8, lambda: b.exp())],
        "reduce": [(4, lambda: b.sum(1)), (4, lambda: b.mean(1))],
        "gather": [
            (4, lambda: low.index_select(0, some)),
            (4, lambda: low.gather(0, wide)),
            (6, lambda: low.index_add(0, some, other)),
            (6, lambda: low.scatter_add(0, wide, other)),
        ],
        "sort": [(4, lambda: b.topk(8, dim=1))],
    }
    for kind, these in movers.items():
        for num_bytes, do in these:
            yield Operation(("memory", kind), n, None, num_bytes * n, do)


def _in_place(clock: Clock, n: int) -> Iterator[Operation]:
    """What is written into: gradients and weights."""
    a, b = clock.normal(n), clock.normal(n)
    for num_bytes, do in (
        (12, lambda: a.add_(b)),
        (8, lambda: a.copy_(b)),
        (4, lambda: torch.zeros_like(b)),
    ):
        yield Operation(("memory", "in_place"), n, None, num_bytes * n, do)


def _adamw(clock: Clock, n: int) -> Operation:
    """torch's fused one: four reads and three writes."""
    params = [[clock.normal(n)] for _ in range(4)]
    step = torch.ones((), device=clock.device)
    do = partial(
        torch._fused_adamw_,  # type: ignore[attr-defined]
        *(*params, [], [step]),
        **dict(lr=1e-3, beta1=0.9, beta2=0.95, weight_decay=0.1, eps=1e-8),
        **dict(amsgrad=False, maximize=False),
    )
    return Operation(("optimizer", ""), n, None, 28 * n, do)
