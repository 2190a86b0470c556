"""What a dry run says of the data: what is not there, what a sample of it would become."""

from moetrain.config.recipe import Recipe
from moetrain.data.preview import Preview, lengths, previews
from moetrain.data.rejects import check_rejects
from moetrain.data.sample_prompts import read_sample_prompts
from moetrain.errors import DataError
from moetrain.rewards.columns import check_columns


def look_ahead(recipe: Recipe) -> list[str]:
    """Lines on the recipe's data, from a bounded sample (`data/preview.py`). Raises DataError where
    the run would, if all records were looked at: too many are unusable, rewards want columns that
    are not there; of a sample that is a warning.
    """
    previewed = previews(recipe)
    lines = [line for one in previewed for line in one.lines(recipe.data.seq_len)]
    lines += lengths(recipe, previewed)
    for one in previewed:
        lines += _too_many(one, recipe.data.max_rejected)
        if one.prompts:
            lines += _rewards(recipe, one)
    return lines + read_sample_prompts(recipe)[1]


def _too_many(found: Preview, max_rejected: float) -> list[str]:
    if found.is_whole:
        check_rejects(found.rejects, found.num_seen, max_rejected)
    if found.share_rejected <= max_rejected:
        return []
    return [
        f"WARNING: {found.share_rejected:.1%} of the sample of {found.key} would be rejected, and"
        f" the run stops above data.max_rejected={max_rejected:g}. Mend the data or raise it."
    ]


def _rewards(recipe: Recipe, found: Preview) -> list[str]:
    try:
        message = check_columns(recipe.rewards, found.prompts)
    except DataError as error:
        if found.is_whole:
            raise
        message = f"of a sample: {error}"
    return [f"WARNING: {message}"] if message else []
