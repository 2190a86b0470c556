"""More depth without a change at first: LLaMA-Pro's block expansion (arXiv 2401.02415).

After every k-th block stands a copy of it whose attention output and whose MLP's (all experts')
down projection are zero, so that it adds nothing to the residual stream until it is trained.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moetrain.errors import ConfigError
from moetrain.models import BoundRule, Dims, Family, family_of
from moetrain.models import expand as expand_table
from moetrain.models.rules import H, L
from moetrain.weights.adapter_init import whole
from moetrain.weights.reader import Reader

# Whatever goes back into the residual stream goes through one of these.
_OUTPUTS = tuple(
    L + name
    for name in (
        "self_attention.linear_proj.weight",
        "mlp.linear_fc2.weight",
        "mlp.experts.linear_fc2.weight{e}",
    )
)


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
    dims = family_of(hf).dims(hf)
    if "mlp_only_layers" in hf or "decoder_sparse_step" in hf:
        # every second block, say, is no longer every second one: name the dense ones
        result["decoder_sparse_step"] = 1
        result["mlp_only_layers"] = [
            layer
            for layer, source in enumerate(expansion.sources)
            if not dims.moe_layers[source] and dims.experts
        ]
    return result


@dataclass(frozen=True)
class Source:
    """Where a tensor of the new model comes from."""

    old: str
    zero: bool  # an output of an added block


def sources(family: Family, dims: Dims, expansion: Expansion) -> dict[str, Source]:
    """By name of the new model's tensors."""
    by_layer: dict[int | None, list[BoundRule]] = {}
    for rule in expand_table(family, dims).values():
        by_layer.setdefault(rule.layer, []).append(rule)
    result = {key: Source(key, False) for rule in by_layer[None] for key in rule.hf}
    for new, old in enumerate(expansion.sources):
        for rule in by_layer[old]:
            outputs = {name.format(l=old, e=rule.expert) for name in _OUTPUTS}
            zero = new in expansion.added and rule.name in outputs
            for key in rule.hf:
                result[key.replace(H.format(l=old), H.format(l=new), 1)] = Source(key, zero)
    return result


def expanded(reader: Reader, names: Mapping[str, Source]) -> Iterator[tuple[str, Tensor]]:
    """Yield (new name, tensor), each in its own dtype, one in memory at a time."""
    for new, source in names.items():
        tensor = whole(reader, source.old)
        yield new, torch.zeros_like(tensor) if source.zero else tensor


def note(expansion: Expansion) -> str:
    """Content of expanded.json."""
    content = {
        "every": expansion.every,
        "added": [f"model.layers.{layer}" for layer in expansion.added],
        "trainable": expansion.trainable,
    }
    return json.dumps(content, indent=2) + "\n"
