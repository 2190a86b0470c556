"""The same steps at many layouts, to be compared with one process: what each rank does, how far
apart two of them are, and reductions that are wrong on purpose.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from moetrain.engine import Engine
from moetrain.engine.optim import forget_state
from moetrain.methods import METHODS
from moetrain.ops.packed import Packed
from moetrain.testing.ranks import Noise, recipe_for


@dataclass(frozen=True)
class Case:
    """Two steps of a recipe: `packs` are the global batch of both."""

    name: str
    model: str  # folder
    packs: Sequence[Packed]
    sections: dict[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True)
class Found:
    """What a case gave on one rank; tensors from the first rank alone."""

    losses: list[float]
    norms: list[float]
    metrics: list[dict[str, float]]
    evaluated: dict[str, float]  # after the steps
    logps: list[Tensor]  # of every pack before and after
    values: list[Tensor]  # what a value head or a scalar head says of them
    weights: dict[str, Tensor]  # after the steps


def run(parallel: dict[str, Any], cases: Sequence[Case]) -> list[Found]:
    """All cases at one layout. Neighbours that need the same model share an engine."""
    engine: Any = None
    before: tuple[Any, ...] = ()
    results: list[Found] = []
    for case in cases:
        recipe = recipe_for(case.model, parallel, **case.sections)
        method = recipe.method
        needed = (case.model, method.scalar_head, method.value_head, recipe.adapter,
                  recipe.trainable, recipe.router, recipe.train, recipe.megatron)  # fmt: skip
        if needed != before:
            engine, before = Engine(recipe), needed
        engine.recipe = recipe
        results.append(_steps(engine, case.packs))
    return results


def _steps(engine: Any, packs: Sequence[Packed]) -> Found:
    _start_anew(engine)
    method = METHODS[engine.recipe.method.name]
    mine = list(packs)[engine.world.dp_rank :: engine.world.dp_size]
    outputs = engine.outputs(packs)
    results = [engine.step(mine, method) for _ in range(2)]
    outputs += engine.outputs(packs)
    evaluated = engine.evaluate(mine, method)
    exported = engine.export() if engine.adapters is None else engine.export_adapter()
    weights = {name: w.clone() for name, w in exported}
    speaks = engine.world.is_first
    # A scalar head speaks of every token, and what is asked of it is the last of a sequence.
    masks = [pack.loss_mask for pack in packs] * 2
    pairs = zip(outputs, masks, strict=True)
    values = [out.value * mask for out, mask in pairs if out.value is not None]
    return Found(
        losses=[r.loss for r in results],
        norms=[r.grad_norm for r in results],
        metrics=[r.metrics | r.router for r in results],
        evaluated=evaluated,
        logps=[out.logp for out in outputs] if speaks else [],
        values=values if speaks else [],
        weights=weights if speaks else {},
    )


def _start_anew(engine: Any) -> None:
    engine.load(engine.source.reader(engine.recipe, engine.model))
    if engine.adapters is not None:
        engine.load_adapter(Noise(engine.adapters))
    forget_state(engine.optimizer)
    engine.steps_done = 0


def differences(wanted: Found, found: Found, bound: float = 1e-6) -> list[str]:
    """What of `found` is not `wanted`: losses, gradient norms, log-probs and weights to `bound`,
    tensors by their norms. Metrics and heads' values, many of them differences of larger numbers,
    to ten times that.
    """
    gaps: list[str] = []

    def compare(name: str, a: Any, b: Any, least: float, times: int = 1) -> None:
        a, b = torch.as_tensor(a).double(), torch.as_tensor(b).double()
        assert a.shape == b.shape, name
        gap = (a - b).norm().item() / max(b.norm().item(), least)
        if not gap <= bound * times:
            gaps.append(f"{name}: off by {gap:.1e}")

    for step in range(len(wanted.losses)):
        after = f"step {step + 1}"
        compare(f"loss of {after}", found.losses[step], wanted.losses[step], 0.1)
        compare(f"gradient norm of {after}", found.norms[step], wanted.norms[step], 0.0)
        assert found.metrics[step].keys() == wanted.metrics[step].keys()
        for name, value in found.metrics[step].items():
            compare(f"{name} of {after}", value, wanted.metrics[step][name], 0.1, 10)
    assert found.evaluated.keys() == wanted.evaluated.keys()
    for name, value in found.evaluated.items():
        compare(f"held-out {name}", value, wanted.evaluated[name], 0.1, 10)
    if found.weights:
        for i, (a, b) in enumerate(zip(found.logps, wanted.logps, strict=True)):
            compare(f"log-probs {i}", a, b, 1e-3)
        for i, (a, b) in enumerate(zip(found.values, wanted.values, strict=True)):
            compare(f"values {i}", a, b, a.numel() ** 0.5, 10)
        assert found.weights.keys() == wanted.weights.keys()
        for name, weight in found.weights.items():
            compare(name, weight, wanted.weights[name], 1e-6)
    return gaps


# Wrong on purpose


@contextmanager
def instead(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def _replaced(module: str, name: str, value: Any) -> Callable[[], Any]:
    return lambda: instead(import_module(module), name, value)


def _nothing(*args: Any, **kwargs: Any) -> None:
    pass


@contextmanager
def _own_counts() -> Iterator[None]:
    """Each replica divides by what it has itself."""
    from moetrain.engine import objective

    def counts(self: Any, batches: Sequence[Packed]) -> tuple[dict[str, float], float]:
        counts_here = [self.method.count(batch, self.cfg) for batch in batches]
        tokens = sum(float(batch.valid.sum()) for batch in batches)
        return {
            name: sum(float(c[name]) for c in counts_here) or 1.0 for name in counts_here[0]
        }, tokens

    with instead(objective.Objective, "counts", counts):
        yield


@contextmanager
def _unreduced_keys() -> Iterator[None]:
    """Each context rank keeps the gradients of the keys that it used itself."""
    from moetrain.engine import context
    from moetrain.engine.layers import attention

    def gather(x: Tensor, group: Any, *, reduce_grad: bool) -> Tensor:
        return context.gather(x, group, reduce_grad=False)

    with instead(attention, "gather", gather):
        yield


@contextmanager
def _batched_exchange() -> Iterator[None]:
    """Interleaved stages send to both neighbours in one batch."""
    from moetrain.engine import model

    fields = model._default_fields

    def changed(*args: Any) -> dict[str, Any]:
        return fields(*args) | {"overlap_p2p_comm": False, "batch_p2p_comm": True}

    with instead(model, "_default_fields", changed):
        yield


_FINALIZE = "megatron.core.distributed.finalize_model_grads"
WRONG: dict[str, Callable[[], Any]] = {
    "sequence-parallel norms are not summed": _replaced(
        _FINALIZE, "_allreduce_non_tensor_model_parallel_grads", _nothing
    ),
    "tied embeddings are not summed": _replaced(
        _FINALIZE, "_allreduce_word_embedding_grads", _nothing
    ),
    "the norm counts replicated weights once a rank": _replaced(
        "megatron.core.tensor_parallel",
        "param_is_not_tensor_parallel_duplicate",
        lambda *args, **kwargs: True,
    ),
    "keys keep their own gradients": _unreduced_keys,
    "counts of one replica": _own_counts,
    "one batch to both neighbours": _batched_exchange,
}


def run_wrong(wrong: str, parallel: dict[str, Any], cases: Sequence[Case]) -> list[Found]:
    """As `run`, with one of WRONG."""
    with WRONG[wrong]():
        return run(parallel, cases)
