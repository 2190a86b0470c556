"""Bytes of a batch of rollouts: what the rank that packs it holds, what each rank gets of it, and
what of that is on a GPU at a time.

All answers are taken to be as long as they may be, behind prompts of a quarter of a pack.
"""

from dataclasses import dataclass

from moetrain.config.recipe import ParallelConfig, Recipe
from moetrain.config.rollout import MOST_KEPT, RolloutConfig
from moetrain.layout.activations import PROMPT, in_flight, num_micro_batches
from moetrain.layout.memory import GIB
from moetrain.layout.mesh import MeshPlan, stage_layers
from moetrain.models import Model

# Of a token: itself, its label and position (8 each), its loss mask (4), whether it is valid (1),
# the sampler's log-prob (4).
PLAIN, SAMPLED = 8 + 8 + 8 + 4 + 1, 4
# Of a sequence: its end and its prefix (4 each), its role and the number of its answer (8 each),
# reward, advantage, place and temperature (4 each).
SEQUENCE = 4 + 4 + 8 + 8 + 4 * 4


@dataclass(frozen=True)
class BatchBytes:
    """Of one step's batch."""

    answers: int  # as they were sampled: tokens, log-probs, choices of experts
    packs: int  # all of them
    shares: tuple[int, ...]  # [stage] what a rank gets
    on_gpu: tuple[int, ...]  # [stage] of the micro-batches in flight

    @property
    def driver(self) -> int:
        """What the rank that packs holds at most: all packs, and the part that it sends."""
        return self.answers + self.packs + max(self.shares)


def routed_layers(model: Model, parallel: ParallelConfig) -> list[list[int]]:
    """[stage] -> the MoE layers that it holds, chunk after chunk, as numbers among those of the
    model.
    """
    return [[layer for chunk in chunks for layer in chunk] for chunks in _routed(model, parallel)]


def _routed(model: Model, parallel: ParallelConfig) -> list[list[list[int]]]:
    p = parallel
    stages = stage_layers(
        model.num_layers, p.pp, p.vpp or 1, p.first_stage_layers, p.last_stage_layers
    )
    is_moe = model.moe_layers
    before = [sum(is_moe[:layer]) for layer in range(model.num_layers)]
    return [
        [[before[layer] for layer in chunk if is_moe[layer]] for chunk in chunks]
        for chunks in stages
    ]


def choice_bytes(model: Model) -> int:
    """Of the number of an expert, as `ops/routes.py` has it."""
    moe = model.moe
    if moe is None:
        return 0
    return 1 if moe.experts.num <= 255 + (moe.experts.top_k > 1) else 2


@dataclass(frozen=True)
class Sizes:
    """Of some packs: how many there are, and of what."""

    packs: int
    units: int  # a prompt with the answers behind it
    answers: int
    prompt: int  # tokens that stand before the answers of a unit
    answer: int  # tokens

    def bytes(self, per_token: int, per_sequence: int) -> int:
        """A prompt is a sequence, and a pack has one end more than it has sequences."""
        tokens = self.units * self.prompt + self.answers * self.answer
        sequences = self.units * (self.prompt > 0) + self.answers
        return per_token * tokens + per_sequence * sequences + 4 * self.packs


def batch_sizes(recipe: Recipe, dp: int, prompt: int | None = None) -> tuple[Sizes, Sizes]:
    """(of a batch's packs, of those of the replica that has most), behind prompts of `prompt`
    tokens.
    """
    _, rollout = recipe.sampling
    length, answer = recipe.data.seq_len, rollout.max_tokens
    before = min(length - answer, int(PROMPT * length)) if prompt is None else prompt - 1
    together = min(rollout.group_size, (length - before) // answer)
    units = rollout.prompts_per_step * -(-rollout.group_size // together)
    packs = max(dp, -(-units // (length // (before + together * answer))))
    answers = rollout.prompts_per_step * rollout.group_size
    most = -(-packs // dp)
    replica_units = min(units, most * -(-units // packs))
    return (
        Sizes(packs, units, answers, before, answer),
        Sizes(most, replica_units, min(answers, replica_units * together), before, answer),
    )


def batch_bytes(
    recipe: Recipe, model: Model, plan: MeshPlan, prompt: int | None = None
) -> BatchBytes:
    """Of a recipe whose method samples, at most."""
    method, rollout = recipe.sampling
    whole, replica = batch_sizes(recipe, plan.dp, prompt)
    k = 0 if model.moe is None or not rollout.routing_replay else model.moe.experts.top_k
    choice = choice_bytes(model) * k
    recorded = choice * sum(model.moe_layers)
    kept = 4 * most_kept(rollout)
    served, word = word_bytes(recipe)
    sequence = (
        SEQUENCE + 4 * (rollout.repetition_penalty != 1) + 4 * (recipe.method.name == "chord")
    )
    computed = 2 + (method.beta > 0) + 2 * method.value_head
    computed += 2 * (method.top_entropy_quantile < 1)
    tokens = recipe.data.seq_len * recipe.train.micro_batch
    num = num_micro_batches(recipe, plan)
    shares: list[int] = []
    on_gpu: list[int] = []
    for stage, chunks in enumerate(_routed(model, recipe.parallel)):
        per_token = PLAIN + SAMPLED + choice * sum(map(len, chunks))
        per_token += (kept + served - 4 * (served > 0)) * (stage == plan.pp - 1) + 4 * (served > 0)
        shares.append(replica.bytes(per_token, sequence))
        # Each token's sequence, its key and its choices for a chunk, as 8 bytes each.
        table = 8 * (2 + k * max(map(len, chunks))) // plan.cp
        held = tokens * (per_token + 4 * computed + word + table)
        on_gpu.append(held * in_flight(plan, stage, num))
    return BatchBytes(
        answers=whole.answers
        * (whole.answer * (8 + kept + served) + (whole.prompt + whole.answer) * recorded),
        packs=whole.bytes(PLAIN + SAMPLED + kept + served + recorded, sequence),
        shares=tuple(shares),
        on_gpu=tuple(on_gpu),
    )


def word_bytes(recipe: Recipe) -> tuple[int, int]:
    """Of a teacher's word on a token: (as it comes with the batch, as ranks take it by
    themselves).
    """
    if recipe.teacher is None or not recipe.method.taught:
        return 0, 0
    size = 4 + 8 * recipe.method.teacher_tokens
    return (size, 0) if recipe.teacher.address else (0, size)


def most_kept(rollout: RolloutConfig) -> int:
    """Tokens of a place that training has recorded, where not all may be drawn."""
    is_cut = rollout.top_p < 1 or rollout.min_p > 0
    return rollout.top_k or MOST_KEPT * is_cut


def describe(held: BatchBytes) -> str:
    """For a dry run."""

    def gib(num: int) -> str:
        return f"{num / GIB:.2f} GiB" if num >= GIB / 100 else f"{num / 2**20:.2f} MiB"

    return (
        f"# A batch takes at most {gib(held.driver)} of host memory on the first rank, which"
        f" packs it ({gib(held.answers)} of answers, {gib(held.packs)} of packs, and a part on its"
        f" way), {gib(max(held.shares))} on each of the others, and of a GPU"
        f" {gib(max(held.on_gpu))} for the micro-batches in flight."
    )
