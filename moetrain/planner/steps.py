"""What a step is made of: how many micro-batches, and models with fewer layers that stand for large
ones. Imports no torch.
"""

from typing import Any

from moetrain.config.recipe import Recipe
from moetrain.layout.activations import num_micro_batches
from moetrain.layout.mesh import MeshPlan
from moetrain.models import Model

PROMPT = 0.25  # of a pack, where there are answers: the prompt's share


def answers_of_a_pack(recipe: Recipe) -> int:
    """Whole answers that stand behind one prompt in a pack, where methods sample them."""
    _, rollout = recipe.sampling
    room = int(recipe.data.seq_len * (1 - PROMPT))
    return max(1, min(rollout.group_size, room // rollout.max_tokens))


def micro_batches(recipe: Recipe, plan: MeshPlan) -> int:
    """Of a data-parallel rank in a step; sampled answers are all as long as they may be."""
    if not recipe.method.samples:
        return num_micro_batches(recipe, plan)
    _, rollout = recipe.sampling
    answers = rollout.prompts_per_step * rollout.group_size
    packs = -(-answers // answers_of_a_pack(recipe))
    return max(1, -(-packs // (plan.dp * recipe.train.micro_batch)))


def with_layers(recipe: Recipe, model: Model, num: int) -> Recipe | None:
    """The recipe with a model of fewer layers; None where they are not alike."""
    if any(layer != model.layers[0] for layer in model.layers):
        return None
    hf: dict[str, Any] = {
        name: value[:num] if isinstance(value, list) and len(value) == model.num_layers else value
        for name, value in (recipe.model.hf or {}).items()
    }
    smaller = recipe.model.model_copy(update={"hf": hf | {"num_hidden_layers": num}})
    even = {"first_stage_layers": None, "last_stage_layers": None}
    parallel = recipe.parallel.model_copy(update=even)
    return recipe.model_copy(update={"model": smaller, "parallel": parallel})
