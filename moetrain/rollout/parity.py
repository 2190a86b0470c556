"""The push proof: the same tokens, scored by the rollout engine and by the trainer."""

import math
from collections.abc import Sequence

from moetrain.config.recipe import Recipe
from moetrain.rollout.base import Probe

# Of a log-prob in nats. bf16 kernels of two engines differ by the rounding of every layer.
TOLERANCE = {"fp32": 1e-3, "bf16": 0.25}


def tolerance_of(recipe: Recipe) -> float:
    """The recipe's, or the one of its precision."""
    _, rollout = recipe.sampling
    given = rollout.tolerance
    return TOLERANCE[recipe.model.dtype] if given is None else given


def gap_of(probe: Probe, scored: Sequence[Sequence[float]]) -> float:
    """The largest difference, over all tokens that both sides scored; infinite when there are none
    or one is not finite.
    """
    gaps = [
        abs(theirs - ours)
        for served, trained in zip(probe.logprobs, scored, strict=True)
        for theirs, ours in zip(served, trained, strict=True)
        if not math.isnan(theirs)
    ]
    gap = max(gaps, default=math.inf)
    return gap if math.isfinite(gap) else math.inf
