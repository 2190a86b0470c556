"""A bound on what a GPU holds besides weights, gradients and optimizer state, by formula.

A layer keeps of each token what its parts say (`Part.activations`). A stage holds its layers for
each micro-batch in flight (1F1B; with vpp, Megatron's interleaving), with train.recompute=full a
layer's input alone. Then come one layer's gradients, and the head: fp32 logits of 1024 tokens at a
time, three times. Routing is taken as balanced: an expert-parallel rank with more than its share of
tokens needs more.
"""

from collections.abc import Sequence

from moetrain.config.recipe import Recipe
from moetrain.layout.mesh import MeshPlan, stage_layers
from moetrain.models import Model
from moetrain.models.parts.base import Shares

PROMPT = 0.25  # of a pack, where there are answers: the prompt's share
CHUNK = 1024  # tokens whose logits exist at a time (`ops/logprob.py`)


def shares_of(plan: MeshPlan, recipe: Recipe) -> Shares:
    """How the ranks of a layout share a token's values."""
    sequence = plan.tp if recipe.parallel.sp else 1
    return Shares(plan.tp, plan.etp, sequence, 4 if recipe.model.dtype == "fp32" else 2)


def answers_of_a_pack(recipe: Recipe) -> int:
    """Answers of rollout.max_tokens that a pack has room for behind their prompt, where a method
    samples them.
    """
    _, rollout = recipe.sampling
    room = int(recipe.data.seq_len * (1 - PROMPT))
    return max(1, min(rollout.group_size, room // rollout.max_tokens))


def num_micro_batches(recipe: Recipe, plan: MeshPlan) -> int:
    """Of a data-parallel rank in a step; sampled answers are taken to be as long as they may be."""
    packs = recipe.train.global_batch
    if recipe.method.samples:
        _, rollout = recipe.sampling
        answers = rollout.prompts_per_step * rollout.group_size
        packs = -(-answers // answers_of_a_pack(recipe))
        packs = -(-packs // plan.dp) * plan.dp
    return max(1, packs // (plan.dp * recipe.train.micro_batch))


def in_flight(plan: MeshPlan, stage: int, num: int) -> int:
    """Passes through a chunk of a stage that wait for their backward pass at once, where a step has
    `num` micro-batches.
    """
    ahead = plan.pp - stage - 1
    most = ahead + 1 if plan.vpp == 1 else 2 * ahead + (plan.vpp - 1) * plan.pp + 1
    return min(most, num * plan.vpp)


def of_layers(model: Model, shares: Shares) -> list[int]:
    """Bytes that each layer keeps of a token, at most."""
    return [round(layer.activations(shares)) for layer in model.layers]


def activation_bytes(
    model: Model, plan: MeshPlan, recipe: Recipe, sizes: Sequence[int] | None = None
) -> list[int]:
    """The bound for a GPU of each stage, in bytes.

    sizes: what `of_layers` gives, where it is known.
    """
    parallel, train = recipe.parallel, recipe.train
    shares = shares_of(plan, recipe)
    tokens = -(-recipe.data.seq_len * train.micro_batch // plan.cp)
    num = num_micro_batches(recipe, plan)
    chunks = stage_layers(
        model.num_layers,
        plan.pp,
        plan.vpp,
        parallel.first_stage_layers,
        parallel.last_stage_layers,
    )
    is_whole = train.recompute != "full"
    per_token = round(shares.width * model.hidden / shares.sequence)
    by_layer = of_layers(model, shares) if sizes is None else sizes
    totals: list[int] = []
    for stage, layers in enumerate(chunks):
        kept = [[by_layer[layer] for layer in chunk] for chunk in layers]
        largest = max(size for chunk in kept for size in chunk)
        held = max(sum(chunk) if is_whole else per_token * len(chunk) for chunk in kept)
        head = 0
        if stage in (0, plan.pp - 1):
            head = round(tokens * model.heads.activations(shares))
        if stage == plan.pp - 1:
            rows = 1 if model.heads.scalar else -(-model.heads.vocab // plan.tp)
            head += 3 * 4 * min(tokens, CHUNK) * rows
        held = held * in_flight(plan, stage, num) + largest * (1 if is_whole else 2)
        totals.append(tokens * held + head)
    return totals
