"""What optimizer steps do, as far as it can be told apart: so that a setting that does nothing
is found by looking, not by reading.
"""

import hashlib
import sys
from collections import Counter
from collections.abc import Sequence
from types import CodeType
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from moetrain.engine import Engine
from moetrain.methods import METHODS
from moetrain.testing.ranks import Lists, packs_of, recipe_for

Footprint = dict[str, Counter[str]]
"""part of a step -> what was seen there, and how often."""


def _shown(value: Any) -> Any:
    if isinstance(value, Tensor):
        return (tuple(value.shape), str(value.dtype))
    if isinstance(value, (list, tuple)):
        return [_shown(each) for each in value]
    return value if isinstance(value, (int, float, bool, str, type(None))) else type(value).__name__


class _Ops(TorchDispatchMode):
    """Counts every operation of torch, collectives too, with shapes and plain arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen[f"{func} {_shown(args)} {sorted(_shown(kwargs or {}))}"] += 1
        return func(*args, **(kwargs or {}))


class _Calls:
    """Counts calls of Megatron's functions and of ours."""

    def __init__(self) -> None:
        self.seen: Counter[str] = Counter()

    def _see(self, code: CodeType, offset: int) -> Any:
        if not any(folder in code.co_filename for folder in ("/megatron/", "/moetrain/engine/")):
            return sys.monitoring.DISABLE  # this function is not heard of again
        self.seen[f"{code.co_filename} {code.co_qualname}"] += 1
        return None

    def __enter__(self) -> "_Calls":
        tool, starts = sys.monitoring.PROFILER_ID, sys.monitoring.events.PY_START
        sys.monitoring.use_tool_id(tool, "footprint")
        sys.monitoring.register_callback(tool, starts, self._see)
        sys.monitoring.set_events(tool, starts)
        return self

    def __exit__(self, *exc: Any) -> None:
        sys.monitoring.set_events(sys.monitoring.PROFILER_ID, 0)
        sys.monitoring.free_tool_id(sys.monitoring.PROFILER_ID)


def _digest(tensors: dict[str, Tensor]) -> Counter[str]:
    return Counter(
        f"{name} {hashlib.sha256(t.float().cpu().numpy().tobytes()).hexdigest()[:12]}"
        for name, t in tensors.items()
    )


def footprint(model: str, sequences: Lists, sections: dict[str, Any]) -> Footprint:
    """Of building an engine and taking two steps over `sequences` in four packs."""
    recipe = recipe_for(model, sections.get("parallel", {}), **sections)
    ops = _Ops()
    with _Calls() as calls:
        engine = Engine(recipe)
        with ops:
            packs = packs_of(sequences, 4)[engine.world.dp_rank :: engine.world.dp_size]
            engine.step(packs, METHODS[recipe.method.name])
            result = engine.step(packs, METHODS[recipe.method.name])
    chunks = engine.chunks
    return {
        "modules": Counter(
            f"{n} {type(m).__name__}" for chunk in chunks for n, m in chunk.named_modules()
        ),
        "weights": Counter(
            f"{n} {_shown(p)}" for chunk in chunks for n, p in chunk.named_parameters()
        ),
        "calls": calls.seen,
        "operations": ops.seen,
        "results": Counter([f"{result.loss} {result.grad_norm} {result.lr} {result.router}"]),
        "learned": _digest(dict(engine.export())),
    }


def differences(
    model: str, sequences: Lists, base: dict[str, Any], others: Sequence[dict[str, Any]]
) -> list[dict[str, int]]:
    """For each of `others`, laid over `base`: part of a step -> how much of it is other than with
    `base` alone. What differs between two runs of `base` does not count.
    """

    def changed(a: Footprint, b: Footprint) -> Footprint:
        return {part: (a[part] - b[part]) + (b[part] - a[part]) for part in a}

    footprint(model, sequences, base)  # imports and first calls
    plain = footprint(model, sequences, base)
    noise = changed(plain, footprint(model, sequences, base))
    counts_of_runs: list[dict[str, int]] = []
    for other in others:
        over = {
            name: base.get(name, {}) | value if isinstance(value, dict) else value
            for name, value in other.items()
        }
        changes = changed(plain, footprint(model, sequences, base | over))
        counts = {
            part: sum(n for what, n in seen.items() if what not in noise[part])
            for part, seen in changes.items()
        }
        counts_of_runs.append({part: n for part, n in counts.items() if n})
    return counts_of_runs
