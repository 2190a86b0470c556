"""Experts chosen at rollout, replayed in training: gradients against transformers with the same
choices forced on it, at every layout.
"""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from test_parity import reference_gradients, sequences
from torch import Tensor

from moetrain.ops.packed import Packed, concat, from_tokens
from moetrain.testing import ranks
from moetrain.testing.gloo import Workers

pytestmark = pytest.mark.gloo
Tiny = Callable[[str], tuple[str, Any]]

LAYOUTS: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "one": (1, {}, {}),
    "one, recomputed": (1, {}, {"train": {"recompute": "full"}}),
    "tp2": (2, {"tp": 2}, {}),
    "pp2": (2, {"pp": 2}, {}),
    "pp2-vpp2": (2, {"pp": 2, "vpp": 2}, {}),
    "ep2": (2, {"ep": 2}, {}),
    "cp2": (2, {"cp": 2}, {}),
}


def some_choices(model: Any, data: list[list[int]]) -> list[Tensor]:
    """Per sequence [t, MoE layers, k] int64: distinct experts at random, as nobody would choose."""
    rng = random.Random(3)
    config = model.config
    num_layers = sum(1 for name, _ in model.named_modules() if name.endswith("mlp.gate"))
    one = range(config.num_experts)
    return [
        torch.tensor(
            [
                [rng.sample(one, config.num_experts_per_tok) for _ in range(num_layers)]
                for _ in tokens
            ]
        )
        for tokens in data
    ]


@contextmanager
def forced(model: Any, data: list[list[int]], choices: list[Tensor]) -> Iterator[None]:
    """transformers' routers choose what `choices` says, sequence after sequence."""
    gates = [m for name, m in model.named_modules() if name.endswith("mlp.gate")]
    calls = dict.fromkeys(range(len(gates)), 0)

    def force(layer: int) -> Callable[..., Any]:
        def hook(module: Any, args: Any, output: Any) -> Any:
            logits, _, _ = output
            chosen = choices[calls[layer]][:, layer]
            calls[layer] += 1
            values = torch.softmax(logits.float(), -1).gather(1, chosen)
            if module.norm_topk_prob:
                values = values / values.sum(-1, keepdim=True)
            return logits, values, chosen

        return hook

    handles = [gate.register_forward_hook(force(i)) for i, gate in enumerate(gates)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def with_routes(tokens: list[int], chosen: Tensor) -> Packed:
    return replace(from_tokens(tokens), per_token={"routes": (chosen + 1).to(torch.int16)})


@pytest.mark.parametrize("layout", LAYOUTS)
def test_replayed_choices_are_those_of_transformers(
    workers: Workers, tiny: Tiny, layout: str
) -> None:
    folder, model = tiny("qwen3_moe")
    data = sequences()
    choices = some_choices(model, data)
    with forced(model, data, choices):
        loss, wanted = reference_gradients(model, data)
    assert loss != pytest.approx(reference_gradients(model, data)[0], rel=1e-3)
    world, parallel, sections = LAYOUTS[layout]
    packs = [with_routes(tokens, chosen) for tokens, chosen in zip(data, choices, strict=True)]
    packs = [concat(packs[i::2]) for i in range(2)]
    found = workers.run(world, ranks.gradients_of_packs, folder, parallel, packs, sections)[0]
    assert found[0] == pytest.approx(loss, rel=1e-5)
    for name, grad in found[2].items():
        error = (grad - wanted[name]).norm() / wanted[name].norm().clamp(min=1e-12)
        assert error <= 1e-4, (name, error)


def test_tokens_without_recorded_choices_are_routed_as_ever(workers: Workers, tiny: Tiny) -> None:
    folder, model = tiny("qwen3_moe")
    data = sequences()
    loss, _ = reference_gradients(model, data)
    chosen = torch.full_like(torch.cat(some_choices(model, data)), -1)
    pack = concat([from_tokens(tokens) for tokens in data])
    pack = replace(pack, per_token={"routes": (chosen + 1).to(torch.int16)})
    found = workers.run(1, ranks.gradients_of_packs, folder, {}, [pack], {})[0]
    assert found[0] == pytest.approx(loss, rel=1e-5)
