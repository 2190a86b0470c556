"""More depth without a change at first: LLaMA-Pro's block expansion (arXiv 2401.02415).

After every k-th block stands a copy of it whose attention output and whose MLP's (all experts')
down projection are zero, so that it adds nothing to the residual stream until it is trained.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moetrain.errors import ConfigError
from moetrain.models import Model, Rule, read_model
from moetrain.models.rules import HF_LAYER


@dataclass(frozen=True)
class Expansion:
    """Which block of the old model each of the new one is, and which of them are the new ones."""

    every: int
    sources: tuple[int, ...]  # [new number of layers]
    added: tuple[int, ...]  # new layer numbers

    @property
    def trainable(self) -> list[str]:
        """Patterns for the recipe's `trainable`."""
        return [f"layers.{layer}" for layer in self.added]


def plan(num_layers: int, every: int) -> Expansion:
    """A copy after each `every`-th block; blocks left over at the end have none."""
    if not 1 <= every <= num_layers:
        raise ConfigError(
            f"--every {every} cannot be with a model of {num_layers} layers; give 1 to {num_layers}"
        )
    sources: list[int] = []
    added: list[int] = []
    for layer in range(num_layers):
        sources.append(layer)
        if (layer + 1) % every == 0:
            added.append(len(sources))
            sources.append(layer)
    return Expansion(every, tuple(sources), tuple(added))


def expanded_config(hf: Mapping[str, Any], expansion: Expansion) -> dict[str, Any]:
    """The new config.json; what it says by layer is carried along."""
    result = dict(hf)
    result["num_hidden_layers"] = len(expansion.sources)
    if hf.get("layer_types"):
        if len(hf["layer_types"]) <= max(expansion.sources):
            raise ConfigError(
                f"model config: layer_types has {len(hf['layer_types'])} entries for"
                f" {max(expansion.sources) + 1} layers"
            )
        result["layer_types"] = [hf["layer_types"][source] for source in expansion.sources]
    model = read_model(hf)
    if "mlp_only_layers" in hf or "decoder_sparse_step" in hf:
        # every second block, say, is no longer every second one: name the dense ones
        result["decoder_sparse_step"] = 1
        result["mlp_only_layers"] = [
            layer
            for layer, source in enumerate(expansion.sources)
            if not model.moe_layers[source] and model.num_experts
        ]
    return result


@dataclass(frozen=True)
class Source:
    """Where a tensor of the new model comes from."""

    old: str
    zero: bool  # an output of an added block


def sources(model: Model, expansion: Expansion) -> dict[str, Source]:
    """By name of the new model's tensors."""
    by_layer: dict[int | None, list[Rule]] = {}
    for rule in model.table.values():
        by_layer.setdefault(rule.layer, []).append(rule)
    result = {key: Source(key, False) for rule in by_layer[None] for key in rule.hf}
    for new, old in enumerate(expansion.sources):
        for rule in by_layer[old]:
            zero = new in expansion.added and rule.writes
            for key in rule.hf:
                renamed = key.replace(HF_LAYER.format(l=old), HF_LAYER.format(l=new), 1)
                result[renamed] = Source(key, zero)
    return result


def note(expansion: Expansion) -> str:
    """Content of expanded.json."""
    content = {
        "every": expansion.every,
        "added": [f"model.layers.{layer}" for layer in expansion.added],
        "trainable": expansion.trainable,
    }
    return json.dumps(content, indent=2) + "\n"
