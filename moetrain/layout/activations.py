"""A bound on what a GPU holds besides weights, gradients and optimizer state, by formula.

Legend: t tokens of a micro-batch on this rank (seq_len x micro_batch / cp), h hidden width, q and k
width of the queries and of the keys, f columns of an MLP, e bytes of a value (2 in bf16), s = tp
with sequence parallelism, else 1. Bytes that a layer keeps of a token for its backward pass:

  norms and residuals    h/s (2 (8 + e) + 2 e)
  attention              (e (q + 2 k) + (q + k) (e + 8 where both are normed) + 2 e q) / tp
  dense MLP              e (5 f/tp + h/s)
  experts                top_k e (2 h + 5 f/etp) + 16 experts, and 5 e f/tp of a shared one

The fp32 copies that a norm makes without a fused kernel are in it, scores of attention are not: no
kernel that is used keeps them. Routing is taken as balanced: an expert-parallel rank with more than
its share of tokens needs more. A stage holds its layers for each micro-batch in flight (1F1B; with
vpp, Megatron's interleaving), with train.recompute=full the h/s e of a layer's input alone. Then
come one layer's gradients, and the head: e h + fp32 logits of 1024 tokens at a time, three times.
"""

from moetrain.config.recipe import Recipe
from moetrain.layout.mesh import MeshPlan, stage_layers
from moetrain.models import Model

CHUNK = 1024  # tokens whose logits exist at a time (`ops/logprob.py`)


def layer_bytes(model: Model, layer: int, plan: MeshPlan, recipe: Recipe) -> int:
    """What a layer keeps of one token."""
    parallel, wide = recipe.parallel, 4 if recipe.model.dtype == "fp32" else 2
    shards = plan.tp if parallel.sp else 1
    hidden, attention = model.hidden / shards, model.layers[layer].attention
    queries, keys = attention.queries / plan.tp, attention.keys / plan.tp
    total = hidden * (2 * (8 + wide) + 2 * wide)
    total += wide * (queries + 2 * keys) + 2 * wide * queries
    total += (queries + keys) * (wide + 8 * attention.qk_norm)
    moe = model.moe if model.moe_layers[layer] else None
    if moe is None:
        assert model.dense is not None
        return round(total + wide * (5 * model.dense.ffn / plan.tp + hidden))
    experts, columns = moe.experts, moe.experts.ffn / plan.etp
    total += experts.top_k * wide * (2 * model.hidden + 5 * columns) + 16 * experts.num
    if moe.shared is not None:
        total += wide * 5 * moe.shared.ffn / plan.tp
    return round(total)


def activation_bytes(model: Model, plan: MeshPlan, recipe: Recipe) -> list[int]:
    """The bound for a GPU of each stage, in bytes."""
    parallel, train = recipe.parallel, recipe.train
    wide = 4 if recipe.model.dtype == "fp32" else 2
    tokens = -(-recipe.data.seq_len * train.micro_batch // plan.cp)
    num = max(1, train.global_batch // (plan.dp * train.micro_batch))
    if recipe.method.samples:
        num = plan.pp  # how many packs answers make is not known before
    chunks = stage_layers(
        model.num_layers,
        plan.pp,
        plan.vpp,
        parallel.first_stage_layers,
        parallel.last_stage_layers,
    )
    is_whole = train.recompute != "full"
    kept = round(wide * model.hidden / (plan.tp if parallel.sp else 1))
    found: list[int] = []
    for stage, own in enumerate(chunks):
        ahead = plan.pp - stage - 1
        in_flight = ahead + 1 if plan.vpp == 1 else 2 * ahead + (plan.vpp - 1) * plan.pp + 1
        in_flight = min(in_flight, num * plan.vpp)
        sizes = [[layer_bytes(model, layer, plan, recipe) for layer in chunk] for chunk in own]
        largest = max(size for chunk in sizes for size in chunk)
        held = max(sum(chunk) if is_whole else kept * len(chunk) for chunk in sizes)
        head = 0
        if stage in (0, plan.pp - 1):
            head = tokens * model.hidden * (8 + 2 * wide)
        if stage == plan.pp - 1:
            rows = 1 if model.heads.scalar else -(-model.heads.vocab // plan.tp)
            head += 3 * 4 * min(tokens, CHUNK) * rows
        found.append(tokens * (held * in_flight + largest * (1 if is_whole else 2)) + head)
    return found
