"""The gradients of a step under their Hugging Face names, for tests.

A distributed optimizer scatters them: each rank holds the sum of its own part. Tests want all of
them, so their steps reduce at more traffic.
"""

from typing import Any

from torch import Tensor

from moetrain.engine import Engine
from moetrain.engine.params import LocalParam, canonical, coordinates
from moetrain.weights import transport


def keep_gradients(engine: Engine) -> None:
    """Let every following step leave the whole gradients on each rank."""
    finalize: Any = engine.config.finalize_model_grads_func

    def whole(models: Any, num_tokens: Any = None, **kwargs: Any) -> None:
        finalize(models, num_tokens, **{**kwargs, "force_all_reduce": True})

    engine.config.finalize_model_grads_func = whole
    for chunk in engine.wrapped:
        chunk.force_all_reduce = True


def gradients_of(engine: Engine) -> dict[str, Tensor]:
    """{Hugging Face name: fp32 gradient of the mean loss} after a step of an engine that keeps them
    and does not clip. Collective; every rank has them.
    """
    local = [
        LocalParam(full, grad, *coordinates(full, engine.world))
        for chunk in engine.chunks
        for name, param in chunk.named_parameters()
        if param.requires_grad
        for full, grad in canonical(name, param.main_grad, chunk, engine.world)  # type: ignore[arg-type]
    ]
    exported = transport.export(local, engine.trained_rules, engine.world, to="all")
    return {name: gradient.clone() for name, gradient in exported}
