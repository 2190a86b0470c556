"""Worked answers that a method learns from beside its prompts, read as the instruction data that
they are.
"""

from moetrain.config.method import SftMethod
from moetrain.config.online import ChordMethod
from moetrain.config.recipe import Recipe
from moetrain.data.loader import RunData, describe_set
from moetrain.data.rejects import Reject, check_rejects, noted


def demonstration_recipe(recipe: Recipe) -> Recipe | None:
    """The recipe of fine-tuning on data.demonstrations; None for methods that take none."""
    method = recipe.method
    if not isinstance(method, ChordMethod):
        return None
    whole = {"train": recipe.data.demonstrations, "take": None, "eval": [], "eval_share": 0.0}
    data = recipe.data.model_copy(update=whole)
    # As often as answers are learned from, so train.epochs does not count them.
    train = recipe.train.model_copy(
        update={"global_batch": method.packs, "epochs": None, "steps": 1}
    )
    return recipe.model_copy(update={"method": SftMethod(), "data": data, "train": train})


def prepare_demonstrations(recipe: Recipe) -> tuple[list[str], list[Reject]]:
    """(what there is to say, the records that are skipped), as `prepare` of instruction data; both
    empty for methods that take none. Raises DataError.
    """
    demonstrated = demonstration_recipe(recipe)
    if demonstrated is None:
        return [], []
    data = RunData(demonstrated).packed(held_out=False)
    assert data is not None, "fine-tuning reads no corpus"
    rejects = data.rejects()
    check_rejects(rejects, data.stats.num_records, recipe.data.max_rejected)
    # What the template does to any record was reported for the prompts already.
    return [
        describe_set("demonstrations", data, demonstrated),
        *noted((), data.stats.notes),
    ], rejects
