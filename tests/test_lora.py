"""Adapters in the engine: their gradients at every layout against transformers, and what a merged,
saved or resumed one is.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_parity import reference_gradients, sequences

from moetrain.models import read_model
from moetrain.models.adapter import AdapterSpec, adapter_table
from moetrain.testing import ranks
from moetrain.testing.gloo import Workers
from moetrain.weights.convert import hf2mcore

pytestmark = pytest.mark.gloo
Tiny = Callable[..., tuple[str, Any]]

ROUTER = {"rank": 4, "alpha": 8, "target": "all-router"}
CASES: dict[str, tuple[str, int, dict[str, Any], dict[str, Any]]] = {
    # name: (family, world, layout, adapter)
    "one": ("qwen3_moe", 1, {}, ROUTER),
    "tp2-sp": ("qwen3_moe", 2, {"tp": 2}, ROUTER),
    "pp2": ("qwen3_moe", 2, {"pp": 2}, ROUTER),
    "pp2-vpp2": ("qwen3_moe", 2, {"pp": 2, "vpp": 2}, ROUTER),
    "ep2": ("qwen3_moe", 2, {"ep": 2}, ROUTER),
    "etp2": ("qwen3_moe", 2, {"etp": 2}, ROUTER),
    "tp2-etp2-ep2": ("qwen3_moe", 4, {"tp": 2, "etp": 2, "ep": 2}, ROUTER),
    "cp2": ("qwen3_moe", 2, {"cp": 2}, ROUTER),
    "dp2": ("qwen3_moe", 2, {}, ROUTER),
    "pp2-ep2": ("qwen3_moe", 4, {"pp": 2, "ep": 2}, ROUTER),
    "some of q, k, v": ("qwen3_moe", 2, {"tp": 2}, {"rank": 3, "target": ["q_proj", "v_proj"]}),
    "experts alone, rslora": (
        "qwen3_moe", 2, {"ep": 2}, {"rank": 2, "type": "rslora", "target": "experts"}
    ),
    "mixtral ep2": ("mixtral", 2, {"ep": 2}, ROUTER),
    "dense, tied": ("qwen3", 1, {}, {"rank": 4, "target": "all-linear"}),
    "dense, tied, pp2": ("qwen3", 2, {"pp": 2}, {"rank": 4, "target": "all-linear"}),
    "dense, tp2": ("llama", 2, {"tp": 2}, {"rank": 4, "target": "all-linear"}),
    "a shared expert, tp2-ep2": ("qwen2_moe", 2, {"tp": 2, "ep": 2}, ROUTER),
    "sinks and biases, tp2-ep2": ("gpt_oss", 2, {"tp": 2, "ep": 2}, ROUTER),
    "dense, biases, tp2": ("qwen2", 2, {"tp": 2}, {"rank": 4, "target": ["q_proj", "v_proj"]}),
    "dense, tp2 without sp": ("llama", 2, {"tp": 2, "sp": False}, {"rank": 4}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_gradients_follow_from_those_of_the_merged_model(
    workers: Workers, tiny: Tiny, tmp_path: Path, case: str
) -> None:
    """With W' = W + s B A: dA = s B' dW' and dB = s dW' A', dW' from transformers and autograd."""
    family, world, parallel, adapter = CASES[case]
    folder, model = tiny(family, parallel)
    answers = workers.run(
        world, ranks.adapter_gradients, folder, parallel, sequences(), 2, {"adapter": adapter}
    )
    loss, norm, grads, values, merged = answers[0]
    loss_wanted, dw = reference_gradients(put(model, merged, tmp_path), sequences())
    assert loss == pytest.approx(loss_wanted, rel=1e-5)
    hf = model.config.to_dict()
    spec = AdapterSpec.of(ranks.recipe_for(folder, {}, adapter=adapter).adapter)
    table = adapter_table(read_model(hf), spec)
    assert grads.keys() == values.keys() == table.places.keys()
    whole_a: dict[str, torch.Tensor] = {}
    total = 0.0
    for name, place in table.places.items():
        if not place.live:
            assert not grads[name].any()
            continue
        d = torch.cat([dw[key] for key in place.matrix.weights])
        b_names = [n for n, p in table.places.items()
                   if p.matrix == place.matrix and p.tensors == "lora_B"]  # fmt: skip
        a_name = next(n for n, p in table.places.items()
                      if p.matrix == place.matrix and p.tensors == "lora_A")  # fmt: skip
        if place.tensors == "lora_A":
            wanted = spec.scale * torch.cat([values[n] for n in b_names]).T @ d
            whole_a[name] = wanted
        else:
            wanted = spec.scale * d[slice(*place.rows)] @ values[a_name].T
        total += wanted.square().sum().item()
        error = (grads[name] - wanted).norm() / wanted.norm().clamp(min=1e-12)
        assert error <= 1e-4, (name, error)
    assert norm == pytest.approx(total**0.5, rel=1e-4)


KINDS: dict[str, dict[str, Any]] = {
    "attention": {"rank": 4, "target": ["q_proj", "k_proj", "v_proj", "o_proj"]},
    "all-linear": {"rank": 4, "alpha": 16},
    "all-router": {"rank": 4, "target": "all-router"},
    "rslora": {"rank": 4, "type": "rslora"},
    "olora": {"rank": 4, "type": "olora", "alpha": 4},
    "pissa": {"rank": 4, "type": "pissa", "alpha": 4},
    "dora": {"rank": 4, "type": "dora", "target": ["q_proj", "v_proj", "o_proj"]},
}


def adapted_names(folder: str, adapter: dict[str, Any]) -> set[str]:
    """Of all tensors that share a parameter with one that the adapter is for."""
    recipe = ranks.recipe_for(folder, {}, adapter=adapter)
    model = read_model(json.loads((Path(folder) / "config.json").read_text()))
    table = adapter_table(model, AdapterSpec.of(recipe.adapter))
    return {name for rule in table.base.values() for name in rule.hf}


EVERYWHERE = [("qwen3_moe", kind) for kind in KINDS]
EVERYWHERE += [("qwen2", "attention"), ("qwen2", "dora")]  # q, k and v have biases


@pytest.mark.parametrize(("family", "kind"), EVERYWHERE)
def test_a_trained_adapter_is_the_same_everywhere(
    workers: Workers, tiny: Tiny, tmp_path: Path, family: str, kind: str
) -> None:
    """Trained at TP2 EP2: the live model, the merged one, the checkpoint at one process, the PEFT
    folder in PEFT and the PEFT folder gone on from all say the same.
    """
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    folder, model = tiny(family)
    experts = {"ep": 2} if family == "qwen3_moe" else {}
    tokens = sequences()[0]
    sections = {"adapter": KINDS[kind], "optim": {"lr": 1e-2}}
    arguments = (sequences(), tmp_path, sections)
    answers = workers.run(2, ranks.trained_adapter, folder, {"tp": 2} | experts, *arguments)
    live, merged, before, moved = answers[0]
    assert all(torch.equal((before | moved)[name], merged[name]) for name in merged)
    assert moved.keys() <= adapted_names(folder, KINDS[kind]), "the base has not moved"
    with torch.no_grad():
        base = model(torch.tensor([tokens])).logits[0]
        assert (live - base).abs().max() > 0.05, "three steps changed nothing"
        close = {"rtol": 0, "atol": 1e-4}
        wanted = put(model, merged, tmp_path / "merged")(torch.tensor([tokens])).logits[0]
        torch.testing.assert_close(live, wanted, **close)
        (restored,) = workers.run(1, ranks.restored_adapter, folder, {}, tokens, tmp_path, sections)
        torch.testing.assert_close(restored, live, **close)
        fresh = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        in_peft = PeftModel.from_pretrained(fresh, tmp_path / "peft").eval()
        found = in_peft(torch.tensor([tokens])).logits[0]
        torch.testing.assert_close(found, live, **close)
        if experts:
            sections["router"] = {"freeze": True}  # and its adapter with it
        for layout, world in ((experts, 2), ({"pp": 2}, 2)):
            answers = workers.run(
                world, ranks.continued_adapter, folder, layout, tokens, tmp_path, sections
            )
            lent, found = answers[-1]
            torch.testing.assert_close(lent, base, **close)
            torch.testing.assert_close(found, live, **close)


def put(model: Any, merged: dict[str, torch.Tensor], folder: Path) -> Any:
    """A transformers model of the same configuration with other weights."""
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    model.config.save_pretrained(folder)
    save_file({n: w.contiguous() for n, w in merged.items()}, folder / "model.safetensors")
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


TRAINABLE: dict[str, tuple[int, dict[str, Any], list[str]]] = {
    # name: (world, layout, patterns)
    "one": (1, {}, ["layers.1", "norm"]),
    "one stage of two": (2, {"pp": 2}, ["layers.0"]),
    "tp2-ep2": (2, {"tp": 2, "ep": 2}, ["experts", "mlp.gate"]),
    "fewer than the ranks that share them": (2, {}, ["model.norm"]),
    "full recompute": (1, {}, ["layers.3"]),
}


@pytest.mark.parametrize("case", TRAINABLE)
def test_only_what_is_named_is_trained(
    workers: Workers, tiny: Tiny, tmp_path: Path, case: str
) -> None:
    world, parallel, patterns = TRAINABLE[case]
    folder, model = tiny("qwen3_moe")
    sections: dict[str, Any] = {"trainable": patterns, "optim": {"lr": 1e-2}}
    if case == "full recompute":
        sections["train"] = {"recompute": "full"}
    _, wanted = reference_gradients(model, sequences())
    _, _, grads = workers.run(world, ranks.gradients, folder, parallel, sequences(), 2, sections)[0]
    for name, grad in grads.items():
        assert (grad - wanted[name]).norm() <= 1e-4 * wanted[name].norm()
    before, after, resumed = workers.run(
        world, ranks.trained_and_resumed, folder, parallel, sequences(), tmp_path, sections
    )[0]
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == grads.keys()
    assert all(torch.equal(after[name], resumed[name]) for name in after)


@pytest.mark.parametrize("type", ["pissa", "dora"])
def test_adapters_start_from_a_megatron_checkpoint(
    workers: Workers, tiny: Tiny, tmp_path: Path, type: str
) -> None:
    """Those that read the base's matrices too: merged, they are the base before the first step."""
    folder, _ = tiny("qwen3_moe", {})
    hf2mcore(Path(folder), tmp_path / "mcore")
    target = ["q_proj", "o_proj"]
    sections = {"adapter": {"type": type, "rank": 4, "target": target}}
    before, after = workers.run(
        1, ranks.stepped, str(tmp_path / "mcore"), sequences(), sections, timeout=300
    )[0]
    base = load_file(f"{folder}/model.safetensors")
    assert before.keys() == base.keys()
    for name, tensor in base.items():
        assert torch.allclose(before[name], tensor, atol=1e-6), name
    moved = {name for name in base if not torch.equal(before[name], after[name])}
    assert moved and all(any(word in name for word in target) for name in moved)
