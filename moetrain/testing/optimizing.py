"""Optimizer steps as numbers: gradients and weights under their Hugging Face names, on every rank.

A test makes the same steps of the gradients with an optimizer that knows no layout.
"""

from pathlib import Path
from typing import Any

from torch import Tensor

from moetrain.engine import Engine
from moetrain.methods import METHODS
from moetrain.testing.gradients import gradients_of, keep_gradients
from moetrain.testing.ranks import Lists, Noise, packs_of, recipe_for
from moetrain.weights import transport

Step = tuple[dict[str, Tensor], dict[str, Tensor]]  # gradients, and the weights after it


def _trained(engine: Engine) -> dict[str, Tensor]:
    """The weights that are trained, adapters not merged."""
    from moetrain.engine.optim import gathered
    from moetrain.engine.params import local_adapters, local_params

    local = local_params(engine.chunks, engine.world) + local_adapters(engine.chunks, engine.world)
    rules = engine.trained_rules
    local = [param for param in local if param.name in rules]
    with gathered(engine.wrapped):
        exported = transport.export(local, rules, engine.world, to="all")
        return {name: weight.clone() for name, weight in exported}


def _step(engine: Engine, sequences: Lists, batch: int) -> Step:
    packs = packs_of([[*s[batch:], *s[:batch]] for s in sequences], 2)
    engine.step(packs[engine.world.dp_rank :: engine.world.dp_size], METHODS["sft"])
    return gradients_of(engine), _trained(engine)


def steps(
    model: str,
    parallel: dict[str, Any],
    sequences: Lists,
    sections: dict[str, Any],
    folder: Path | None = None,
) -> tuple[dict[str, Tensor], list[Step]]:
    """The weights before, and three steps; with a folder a checkpoint there before the last."""
    engine = Engine(recipe_for(model, parallel, **sections))
    if engine.adapters is not None:
        engine.load_adapter(Noise(engine.adapters))
    keep_gradients(engine)
    before, steps_taken = _trained(engine), list[Step]()
    for batch in range(3):
        if folder is not None and batch == 2:
            engine.save(folder, {})
        steps_taken.append(_step(engine, sequences, batch))
    return before, steps_taken


def resumed(
    model: str, parallel: dict[str, Any], sequences: Lists, sections: dict[str, Any], folder: Path
) -> dict[str, Tensor]:
    """The weights after the last of `steps`, from its checkpoint."""
    engine = Engine(recipe_for(model, parallel, **sections))
    engine.restore(folder)
    keep_gradients(engine)
    return _step(engine, sequences, 2)[1]


def unlearned(
    model: str, sequences: Lists, sections: dict[str, Any]
) -> tuple[float, list[Tensor], float]:
    """The held-out loss and the log-probs of a random adapter, and the loss of a step."""
    engine = Engine(recipe_for(model, {}, **sections))
    assert engine.adapters is not None
    engine.load_adapter(Noise(engine.adapters))
    packs = packs_of(sequences, 2)
    held_out, logp = engine.evaluate(packs, METHODS["sft"]), engine.logprobs(packs)
    return held_out["loss"], logp, engine.step(packs, METHODS["sft"]).loss
