"""What a process holds and does while it is watched: bytes by what they are for, operations, and
collectives.

It works on any device, so what a trace without values predicts and what a run on CPUs does are
counted by the same code.
"""

import functools
import gc
import re
import weakref
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from moetrain.planner.allocator import Allocator

type Block = tuple[int, int, int]
SMALLEST = 1024  # bytes; of a storage that is counted

# Class of a module -> the part whose activations are made in it, unless a module inside says other.
PARTS = {
    "LanguageModelEmbedding": "embedding",
    "RMSNorm": "norms",
    "SelfAttention": "attention",
    "MLP": "mlp",
    "PackedMoE": "dispatch",
    "PackedRouter": "router",
    "GroupedExperts": "experts",
    "SharedExpertMLP": "mlp",
}
# torch 2.13 has no formula for a CPU's attention: (operations a product of query and key, where the
# queries stand among the arguments).
_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: (4, 0),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (10, 1),
}
# torch 2.13 counts F.grouped_mm's operations nowhere.
_GROUPED = torch.ops.aten._grouped_mm
_COUNTED = (*_ATTENTION, _GROUPED)  # here
# What they write they do not read first.
_WRITE_ONLY = {"copy_", "zero_", "fill_", "_foreach_copy_", "_foreach_zero_"}
_VARIANTS = r"(_into)?(_tensor)?(_base|_coalesced)?$"  # of one collective
POINTS = 2048  # of a timeline, at most twice as many while it is made
OUTSIDE = "head"  # in a forward pass, of no module: the log-probs and the loss


@dataclass(frozen=True)
class Op:
    """One kind of operation."""

    phase: str
    part: str
    name: str
    shapes: tuple[tuple[int, ...], ...]  # of its tensors
    dtype: str  # of the first


@dataclass
class Cost:
    """Of all operations of a kind."""

    times: int = 0
    flops: int = 0  # of all of them
    num_bytes: int = 0  # read and written by all of them


@dataclass(frozen=True)
class Collective:
    """One kind of communication."""

    phase: str
    name: str
    group: str
    ranks: int


@dataclass(frozen=True)
class Moment:
    """When something of a category is made, in a phase."""

    phase: str
    category: str


@dataclass
class Profile:
    """What was counted. Bytes are those of floating-point tensors on the device."""

    reserved: int = 0  # what torch's allocator takes of a GPU for them, with what lies between
    on_host: int = 0  # parameters that the optimizer steps on the host (planner/offload.py)
    most: dict[Moment, dict[str, int]] = field(default_factory=dict[Moment, dict[str, int]])
    """Category -> bytes, when most was held then."""
    ops: dict[Op, Cost] = field(default_factory=dict[Op, Cost])
    collectives: dict[Collective, Cost] = field(default_factory=dict[Collective, Cost])
    timeline: list[dict[str, int]] = field(default_factory=list[dict[str, int]])
    """Category -> bytes after each allocation, thinned to the fuller ones, where it is wanted."""

    def peaks(self) -> dict[str, int]:
        """Phase -> most bytes in it."""
        most_bytes: dict[str, int] = {}
        for moment, held in self.most.items():
            most_bytes[moment.phase] = max(most_bytes.get(moment.phase, 0), sum(held.values()))
        return most_bytes

    @property
    def at_peak(self) -> dict[str, int]:
        """Category -> bytes, when most was held."""
        return max(self.most.values(), key=lambda held: sum(held.values()))

    @property
    def peak(self) -> int:
        return max(self.peaks().values())


class Watch(TorchDispatchMode):
    """Counts what is made on `device` inside of it."""

    def __init__(self, device: torch.device, *, timeline: bool = False):
        super().__init__()
        self.device = device.type
        self._wants_timeline = timeline
        self.profile = Profile()
        self._now: Counter[str] = Counter()  # category -> bytes
        self._total = 0
        self._most: Counter[Moment] = Counter()  # bytes in all
        self._phase = "build"
        self._parts: list[str] = []  # of the modules whose forward pass runs
        self._passes = False
        self._held: dict[int, tuple[int, str, Block]] = {}
        self._memory = Allocator()
        self._hooks: list[Any] = []

    def __enter__(self) -> "Watch":
        gc.collect()
        gc.disable()  # what it frees by chance would be counted by chance
        hook = nn.modules.module
        self._hooks = [
            hook.register_module_forward_pre_hook(self._enters),
            hook.register_module_forward_hook(self._leaves, always_call=True),
            register_optimizer_step_pre_hook(self._steps),
            register_optimizer_step_post_hook(self._leaves),
        ]
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        gc.enable()
        for handle in self._hooks:
            handle.remove()
        super().__exit__(*error)

    def start_over(self) -> Profile:
        """What was counted so far; from now on it is counted anew, and what is held stays held."""
        before, self.profile = self.profile, Profile()
        self._most.clear()
        return before

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Inside it, what happens counts as this phase."""
        before, self._phase = self._phase, name
        self._at(OUTSIDE)
        try:
            yield
        finally:
            self._phase = before

    @contextmanager
    def passes(self) -> Iterator[None]:
        """Inside it are the passes of a step over its micro-batches; what of a step is outside of
        it is done once, and counts as the optimizer's.
        """
        before, self._passes = self._passes, True
        try:
            yield
        finally:
            self._passes = before

    def label(self, tensors: Sequence[Tensor], category: str) -> None:
        """What has been made already is of this category."""
        for tensor in tensors:
            key = tensor.untyped_storage()._cdata
            if key in self._held:
                size, old, block = self._held[key]
                self._held[key] = size, category, block
                self._now[old] -= size
                self._now[category] += size

    def _enters(self, module: nn.Module, args: Any) -> None:
        part = PARTS.get(type(module).__name__)
        self._parts.append(part or (self._parts[-1] if self._parts else OUTSIDE))

    def _steps(self, *args: Any) -> None:
        self._parts.append("optimizer")

    def _leaves(self, *args: Any) -> None:
        self._parts.pop()

    @property
    def _category(self) -> str:
        if self._parts:
            return self._parts[-1]
        if torch._C._current_graph_task_id() != -1:
            return "backward"
        if self._phase != "step":
            return self._phase
        return OUTSIDE if self._passes else "optimizer"

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = self.run(func, args, kwargs)
        if func.namespace == "c10d":
            self._record_collective(func, args)
            return result
        if func.is_view:
            return result
        outputs = [x for x in tensors_in(result) if x.device.type == self.device]
        for output in outputs:
            self._track(output)
        if outputs or func._schema.is_mutable:
            self._record_op(func, args, kwargs, result, outputs)
        return result

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        return func(*args, **kwargs)

    def flops(self, func: Any, args: Any, kwargs: Any, result: Any) -> int:
        """Floating-point operations in matrix products, by torch's own formulas."""
        name = func._overloadpacket
        if name in _ATTENTION:
            factor, first = _ATTENTION[name]
            q, k = args[first], args[first + 1]
            return factor * q.numel() * k.size(-2)
        if name is _GROUPED:
            # A product of rows with their expert's weight, or the weights' gradient: in both every
            # row meets one matrix.
            rows, columns = args[0].shape[-2:]
            return 2 * rows * columns * args[1].size(-1)
        return int(flop_registry[name](*args, **kwargs, out_val=result))

    def _track(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._held or size < SMALLEST or not tensor.is_floating_point():
            return
        category = self._category
        self._held[key] = size, category, self._memory.take(size)
        self.profile.reserved = self._memory.reserved
        weakref.finalize(storage, self._freed, key)
        self._add(category, size)

    def _freed(self, key: int) -> None:
        size, category, block = self._held.pop(key)
        self._memory.give(block)
        self._add(category, -size)

    def _add(self, category: str, size: int) -> None:
        self._now[category] += size
        self._total += size
        if size > 0:
            self._at(category)
            if self._wants_timeline and self._phase != "build":
                self.profile.timeline.append({name: num for name, num in self._now.items() if num})
                if len(self.profile.timeline) > 2 * POINTS:
                    self.profile.timeline = thinned(self.profile.timeline)

    def _at(self, category: str) -> None:
        """Something of this category has been made."""
        moment = Moment(self._phase, category)
        if self._total > self._most[moment]:
            self._most[moment] = self._total
            self.profile.most[moment] = {name: num for name, num in self._now.items() if num}

    def _record_op(
        self, func: Any, args: Any, kwargs: Any, result: Any, outputs: Sequence[Tensor]
    ) -> None:
        inputs = [*tensors_in(args), *tensors_in(kwargs)]
        if not outputs:  # only written into what was given, as fused optimizers do
            outputs = [x for x in inputs if x.device.type == self.device][:1]
            if not outputs:
                return
        shapes = tuple(tuple(x.shape) for x in (*inputs, *outputs))
        name = func._schema.name.removeprefix("aten::")
        dtype = (inputs or outputs)[0].dtype  # a product of bf16 may come as fp32
        op = Op(self._phase, self._category, name, shapes, str(dtype)[6:])
        cost = self.profile.ops.setdefault(op, Cost())
        cost.times += 1
        cost.num_bytes += _traffic(func, args, kwargs, result)
        if func._overloadpacket in _COUNTED or func._overloadpacket in flop_registry:
            cost.flops += self.flops(func, args, kwargs, result)

    def _record_collective(self, func: Any, args: Any) -> None:
        group = next(x for x in args if isinstance(x, torch.ScriptObject) and _is_group(x))
        unboxed = torch.distributed.ProcessGroup.unbox(group)
        name = re.sub(_VARIANTS, "", func._schema.name.removeprefix("c10d::").strip("_"))
        sizes = [sum(x.nbytes for x in tensors_in([arg])) for arg in args[:2]]
        kind = Collective(self._phase, name, unboxed.group_desc, unboxed.size())
        cost = self.profile.collectives.setdefault(kind, Cost())
        cost.times += 1
        cost.num_bytes += max(sizes)


def thinned(points: Sequence[dict[str, int]]) -> list[dict[str, int]]:
    """Of two neighbours the fuller one."""
    pairs = (points[i : i + 2] for i in range(0, len(points), 2))
    return [max(pair, key=lambda held: sum(held.values())) for pair in pairs]


def tensors_in(values: Any) -> Iterator[Tensor]:
    """Among the arguments or results of an operation: torch's own walk over trees takes half of the
    time of a trace.
    """
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, list | tuple):
        for value in values:
            yield from tensors_in(value)
    elif isinstance(values, dict):
        for value in values.values():
            yield from tensors_in(value)


def _is_group(value: torch.ScriptObject) -> bool:
    return "ProcessGroup" in str(value._type())


def _traffic(func: Any, args: Any, kwargs: Any, result: Any) -> int:
    """Bytes that an operation reads and writes."""
    written, is_new = _aliases(func)
    reads = func._schema.name.removeprefix("aten::") not in _WRITE_ONLY
    total = 0
    for place, value in (*enumerate(args), *kwargs.items()):
        times = 1 if place not in written else 1 + reads
        total += times * sum(map(_stored, tensors_in(value)))
    if is_new:
        total += sum(map(_stored, tensors_in(result)))
    return total


@functools.cache
def _aliases(func: Any) -> tuple[frozenset[int | str], bool]:
    """Places and names of the arguments that are written into; whether what it returns is new."""
    schema = func._schema
    written: set[int | str] = set()
    for place, argument in enumerate(schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            written |= {place, argument.name}
    return frozenset(written), all(one.alias_info is None for one in schema.returns)


def _stored(x: Tensor) -> int:
    """Bytes, without those that an expanded tensor only seems to have."""
    size = x.element_size()
    for length, stride in zip(x.shape, x.stride(), strict=True):
        size *= length if stride else min(length, 1)
    return size
