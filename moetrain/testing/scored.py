"""What ranks score as a reward model that is served."""

from collections.abc import Sequence

from moetrain.engine import Engine
from moetrain.loops.reward_model import reward_recipe, score_rows


def scored(
    model: str, overrides: Sequence[str], batches: Sequence[Sequence[Sequence[int]]]
) -> list[list[float]]:
    """The scores of each batch of rows, on the first rank."""
    engine = Engine(reward_recipe(model, overrides), train=False)
    return [score_rows(engine, rows) for rows in batches]
