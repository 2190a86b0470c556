"""What of a batch's packs each rank gets."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from moetrain.config.recipe import Recipe
from moetrain.layout.batch import routed_layers
from moetrain.models import Model
from moetrain.ops.packed import Packed
from moetrain.ops.routes import pack_routes

Packs = list[list[Packed]]
"""The packs of each optimizer step."""


@dataclass(frozen=True)
class Parts:
    """The share of a data-parallel rank (`replica`) and a stage: its packs, of the choices of
    experts those for its layers, and, where log-probs are taken, what could be drawn and what a
    teacher finds likeliest.
    """

    layers: Sequence[Sequence[int]]  # [stage]: its MoE layers, among those of the model
    num_replicas: int
    num_experts: int
    with_routes: bool = True  # rollouts of a run that replayed hold them for others, too

    @classmethod
    def of(cls, recipe: Recipe, model: Model, num_replicas: int) -> "Parts":
        """As the recipe's layout has them."""
        assert recipe.rollout is not None
        layers = routed_layers(model, recipe.parallel)
        return cls(layers, num_replicas, model.num_experts, recipe.rollout.routing_replay)

    def of_rank(self, steps: Packs, replica: int, stage: int) -> Packs:
        """Out of all packs, where they lie but for the choices of experts."""
        return [
            [self._of_stage(pack, stage) for pack in packs[replica :: self.num_replicas]]
            for packs in steps
        ]

    def _of_stage(self, pack: Packed, stage: int) -> Packed:
        per_token = dict(pack.per_token)
        routes = per_token.pop("routes", None)
        if stage < len(self.layers) - 1:
            for name in ("kept", "teacher_ids", "teacher_top"):
                per_token.pop(name, None)
        if routes is not None and self.with_routes:
            chosen = self.layers[stage]
            if len(chosen) < routes.size(1):
                first = chosen[0] if chosen else 0
                is_run = list(chosen) == list(range(first, first + len(chosen)))
                routes = routes[:, first : first + len(chosen)] if is_run else routes[:, chosen]
            per_token["routes"] = pack_routes(routes, self.num_experts)
        return replace(pack, per_token=per_token)
