"""The longest data.seq_len at which some layout fits. Imports no torch before it traces."""

from collections.abc import Callable
from dataclasses import replace

from moetrain.config.load import recipe_from
from moetrain.config.recipe import Recipe
from moetrain.errors import ConfigError, MoetrainError
from moetrain.layout.memory import GIB
from moetrain.planner.closed import Closed, fixed
from moetrain.planner.search import LEAN, Search

LEAST = 1024  # tokens
SURE = 0.5  # of the formula's bound on bytes of tensors: no layout has held less


def at_length(recipe: Recipe, seq_len: int) -> Recipe:
    """The recipe with packs of so many tokens. Raises ConfigError."""
    content = recipe.model_dump(mode="json")
    content["data"] |= {"seq_len": seq_len}
    return recipe_from(content, source=f"data.seq_len={seq_len}")


def lengths(search: Search) -> list[int]:
    """Those that are tried: powers of two, one and a half times them, and the model's most."""
    most = max(search.model.max_positions, search.recipe.data.seq_len)
    rollout = search.recipe.rollout
    least = max(LEAST, 0 if rollout is None else rollout.max_tokens + 1)
    tried_lengths = {most}
    power = LEAST
    while power <= most:
        tried_lengths |= {power, power * 3 // 2}
        power *= 2
    return sorted(n for n in tried_lengths if least <= n <= most)


def longest(search: Search, report: Callable[[str], None]) -> Search:
    """A search at the longest length that fits. Raises MoetrainError where none does."""
    tried = lengths(search)
    if not tried:
        raise ConfigError(
            "--goal longest: rollout.max_tokens leaves no length that the model takes. Give less."
        )
    low, high = -1, len(tried)  # fits, does not
    while high - low > 1:
        middle = (low + high) // 2
        fits = _fits(search, tried[middle])
        report(f"data.seq_len={tried[middle]} {'fits' if fits else 'does not fit'}")
        low, high = (middle, high) if fits else (low, middle)
    if low < 0:
        raise MoetrainError(
            f"no layout of {search.size} {search.gpu.name} holds this model's step at data.seq_len="
            f"{tried[0]} already. More GPUs, optim.offload=1 or an adapter would help."
        )
    return replace(search, recipe=at_length(search.recipe, tried[low]))


def _fits(search: Search, seq_len: int) -> bool:
    """Whether some layout does: by its formula, or traced, the leanest by their formulas first."""
    limit = search.gpu.memory_gib.value * GIB
    recipe = at_length(search.recipe, seq_len)
    closed = Closed(recipe, search.model, search.gpu)
    held: list[tuple[float, int]] = []
    layouts = list(replace(search, recipe=recipe).candidates(search.size))
    for i, candidate in enumerate(layouts):
        held.append((closed.rough(candidate, search.size).bytes, i))
    held.sort()
    libraries = fixed(search.gpu, search.size)
    if not held or (held[0][0] - libraries) * SURE > limit:
        return False
    if held[0][0] <= limit * LEAN:
        return True
    leanest = [layouts[i] for _, i in held[:2]]
    return any(planned.fits for planned in search.traced(leanest))
