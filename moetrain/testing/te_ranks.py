"""What tests run on ranks that have Transformer Engine (`te_workers`)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from moetrain.engine import Engine
from moetrain.engine import engine as engine_module
from moetrain.methods import METHODS
from moetrain.testing import ranks, te_kernels
from moetrain.testing.gradients import gradients_of, keep_gradients

Lists = ranks.Lists


class Values(NamedTuple):
    """Of one step."""

    loss: float
    logits: Tensor | None  # [t, v] before it, from the last stage
    gradients: dict[str, Tensor]  # from the first rank


def _mine(engine: Engine, sequences: Lists) -> list[Any]:
    return ranks.packs_of(sequences, 2)[engine.world.dp_rank :: engine.world.dp_size]


def values(
    model: str,
    parallel: dict[str, Any],
    sequences: Lists,
    tokens: Sequence[int],
    sections: dict[str, Any],
) -> Values:
    """Logits of `tokens`, then a step over `sequences`."""
    engine = Engine(ranks.recipe_for(model, parallel, **sections))
    assert engine.backend == "te" and engine.config.gradient_accumulation_fusion
    logits = ranks.logits_of(engine, tokens)
    keep_gradients(engine)
    loss = engine.step(_mine(engine, sequences), METHODS["sft"]).loss
    gradients = gradients_of(engine)
    return Values(loss, logits, gradients if engine.world.is_first else {})


def unused(
    model: str, parallel: Any, sequences: Lists, tokens: Sequence[int], plain: Any, more: Any
) -> set[str]:
    """The stand-ins that `values` calls neither with `plain` nor with `more` beside."""
    te_kernels.called.clear()
    for sections in (plain, plain | more):
        values(model, parallel, sequences, tokens, sections)
    return te_kernels.KERNELS.keys() - te_kernels.called


def _engine(backend: str, model: str, parallel: dict[str, Any], sections: dict[str, Any]) -> Engine:
    """Of either backend; the torch one takes no fields of Transformer Engine's."""
    if backend == "torch":
        sections = {name: value for name, value in sections.items() if name != "megatron"}
    before = engine_module.choose_backend
    engine_module.choose_backend = lambda wanted, device: backend
    try:
        return Engine(ranks.recipe_for(model, parallel, **sections))
    finally:
        engine_module.choose_backend = before


def last_losses(
    backend: str,
    parallel: dict[str, Any],
    model: str,
    steps: Sequence[Lists],
    folder: Path,
    sections: dict[str, Any],
    from_checkpoint: bool,
) -> list[float]:
    """The losses of the last two of four steps, after the first two and a checkpoint of them, or
    from that checkpoint.
    """
    engine = _engine(backend, model, parallel, sections)
    if from_checkpoint:
        engine.restore(folder)
    else:
        for sequences in steps[:2]:
            engine.step(_mine(engine, sequences), METHODS["sft"])
        engine.save(folder, {})
    return [engine.step(_mine(engine, s), METHODS["sft"]).loss for s in steps[2:]]
