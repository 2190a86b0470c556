"""Static bytes per GPU by pipeline stage: weights, gradients and optimizer state, counted from the
weight table.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from math import prod

from moetrain.config.recipe import Recipe
from moetrain.layout.mesh import MeshPlan, stage_layers
from moetrain.models import Model, Rule
from moetrain.models.adapter import AdapterSpec, adapter_table, trained_table
from moetrain.models.rates import by_muon, own_rates

GIB = 2**30
_BYTES = {"fp32": 4, "bf16": 2, "fp8": 1}


@dataclass(frozen=True)
class StageBytes:
    """What one GPU of a pipeline stage holds before any activation, in bytes."""

    stage: int
    num_params: int  # on one GPU, padding included
    weights: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer


def trained(recipe: Recipe, model: Model) -> Mapping[str, Rule]:
    """The weight table of what the recipe trains. Raises ConfigError for patterns that match
    nothing, those of optim.groups too.
    """
    adapters = None
    if recipe.adapter is not None:  # what one that is there already is, its folder says
        loaded = recipe.adapter.path is not None
        adapters = adapter_table(model, AdapterSpec.of(recipe.adapter), loaded=loaded)
    table = trained_table(model, recipe.trainable, adapters)
    if recipe.adapter is None or recipe.adapter.path is None:
        own_rates(recipe, table, adapters)
    return table


def static_bytes(
    model: Model,
    plan: MeshPlan,
    recipe: Recipe,
    trained: Mapping[str, Rule] | None = None,
) -> list[StageBytes]:
    """Bytes per GPU of each stage (tensor rank 0, expert rank 0), with the optimizer sharded over
    data parallelism.

    `trained` is the table of what has gradients and optimizer state: a part of the model's, or that
    of an adapter beside it; all of it when None.
    """
    trained = model.table if trained is None else trained
    layers = stage_layers(
        model.num_layers,
        plan.pp,
        plan.vpp,
        recipe.parallel.first_stage_layers,
        recipe.parallel.last_stage_layers,
    )
    stages: list[StageBytes] = []
    for stage in range(plan.pp):
        held = {layer for chunk in layers[stage] for layer in chunk}
        held_rules = partial(_on_rank, held=held, stage=stage, plan=plan, model=model)
        weights = held_rules({**model.table, **trained})
        muon = _sharded(held_rules(by_muon(recipe, trained)), plan)
        stages.append(_bytes(stage, sum(weights), held_rules(trained), muon, plan, recipe))
    return stages


def checkpoint_bytes(table: Mapping[str, Rule], recipe: Recipe, trained: Mapping[str, Rule]) -> int:
    """Bytes of one checkpoint of the recipe on disk: the weights (with an adapter its own alone),
    and of what is trained an fp32 copy and the two moments. Megatron writes that copy beside fp32
    weights too.
    """
    held = table if recipe.adapter is None else trained
    weights = _BYTES[recipe.model.dtype] * sum(rule.num_params for rule in held.values())
    if not recipe.checkpoint.save_optimizer:
        return weights
    state = 4 + 2 * _BYTES[recipe.optim.state_dtype]
    less = 4 * sum(rule.num_params for rule in by_muon(recipe, trained).values())
    return weights + state * sum(rule.num_params for rule in trained.values()) - less


def _on_rank(
    table: Mapping[str, Rule], *, held: set[int], stage: int, plan: MeshPlan, model: Model
) -> tuple[int, int]:
    """Parameters of a rank: (dense and attention, experts), padding included."""
    dense = expert = 0
    for rule in table.values():
        if not _is_held(rule, held, stage, plan, model):
            continue
        if rule.expert is None:
            dense += prod(rule.local_shape(0, plan.tp))
        elif rule.expert < model.num_experts // plan.ep:
            expert += prod(rule.local_shape(0, plan.etp))
    return dense, expert


def _is_held(rule: Rule, held: set[int], stage: int, plan: MeshPlan, model: Model) -> bool:
    if rule.layer is not None:
        return rule.layer in held
    first, last = stage == 0, stage == plan.pp - 1
    if rule.name.startswith("embedding."):
        return first or (last and model.heads.tied)
    return last


def _sharded(held: tuple[int, int], plan: MeshPlan) -> int:
    """Parameters of a rank whose optimizer state it has."""
    dense, expert = held
    return -(-dense // (plan.dp * plan.cp)) + -(-expert // plan.edp)


def _bytes(
    stage: int,
    num_params: int,
    trained: tuple[int, int],
    muon: int,
    plan: MeshPlan,
    recipe: Recipe,
) -> StageBytes:
    weight = _BYTES[recipe.model.dtype]
    gradient = _BYTES[recipe.optim.grad_dtype]
    # fp32 weights are their own main copy; bf16 ones have an fp32 copy beside the two moments.
    state = (0 if recipe.model.dtype == "fp32" else 4) + 2 * _BYTES[recipe.optim.state_dtype]
    optimizer = round(state * _sharded(trained, plan) * (1 - recipe.optim.offload)) - 4 * muon
    return StageBytes(stage, num_params, weight * num_params, gradient * sum(trained), optimizer)
