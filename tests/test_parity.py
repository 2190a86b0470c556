"""The layout proof: logits, gradients and losses of every layout against transformers and against
each other, fp32.
"""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moetrain.models import read_model
from moetrain.testing import ranks
from moetrain.testing.gloo import Workers
from moetrain.testing.tiny import layers_for, save_model
from moetrain.weights.fused import matrix_in

Tiny = Callable[..., tuple[str, Any]]

ONE = (1, {})
LAYOUTS: dict[str, tuple[int, dict[str, int]]] = {
    "one": ONE,
    "tp2-sp": (2, {"tp": 2}),
    "pp2": (2, {"pp": 2}),
    "pp2-vpp2": (2, {"pp": 2, "vpp": 2}),
    "ep2": (2, {"ep": 2}),
    "tp2-ep2": (2, {"tp": 2, "ep": 2}),
    "cp2": (2, {"cp": 2}),
    "pp2-ep2": (4, {"pp": 2, "ep": 2}),
}
CASES = [(family, layout) for family in ("qwen3_moe", "gpt_oss") for layout in LAYOUTS] + [
    (family, layout)
    for family in ("qwen3", "qwen2", "llama", "mixtral", "qwen2_moe")
    for layout in ("one", "tp2-sp", "pp2")
]


def sequences(seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(200) for _ in range(length)] for length in (13, 7, 20, 9, 16, 11)]


def reference_gradients(model: Any, data: list[list[int]]) -> tuple[float, dict[str, torch.Tensor]]:
    """Mean negative log-prob over all predicted tokens, sequence by sequence, by transformers and
    autograd.
    """
    model.zero_grad()
    total, count = torch.zeros(()), sum(len(s) - 1 for s in data)
    for s in data:
        ids = torch.tensor([s])
        logp = torch.log_softmax(model(ids).logits[0, :-1].float(), -1)
        total = total - logp.gather(1, ids[0, 1:, None]).sum()
    loss = total / count
    loss.backward()
    return loss.item(), as_on_disk(model, {n: p.grad.clone() for n, p in model.named_parameters()})


def as_on_disk(model: Any, grads: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """transformers 5 holds experts fused in memory; give their gradients the names they have on
    disk.
    """
    hf = model.config.to_dict()
    slices = read_model(hf).fused_slices
    fused = {where.key for where in slices.values()}
    out = {name: grad for name, grad in grads.items() if name not in fused}
    for name, where in slices.items():
        if where.key in grads:
            out[name] = matrix_in(grads[where.key], where)
    return out


@pytest.mark.parametrize(("family", "layout"), CASES)
def test_logits_equal_transformers(workers: Workers, tiny: Tiny, family: str, layout: str) -> None:
    tokens = sequences()[2]
    world, parallel = LAYOUTS[layout]
    folder, model = tiny(family, parallel)
    with torch.no_grad():
        wanted = model(torch.tensor([tokens])).logits[0]
    found = [x for x in workers.run(world, ranks.logits, folder, parallel, tokens) if x is not None]
    assert found
    for logits in found:
        assert (logits - wanted).abs().max() <= 1e-4


@pytest.mark.parametrize(("family", "layout"), CASES)
def test_gradients_equal_transformers(
    workers: Workers, tiny: Tiny, family: str, layout: str
) -> None:
    data = sequences()
    world, parallel = LAYOUTS[layout]
    folder, model = tiny(family, parallel)
    loss, wanted = reference_gradients(model, data)
    answer = workers.run(world, ranks.gradients, folder, parallel, data, 2, {})
    assert answer[0][0] == pytest.approx(loss, rel=1e-5)
    assert answer[0][2].keys() == wanted.keys()
    for name, grad in answer[0][2].items():
        error = (grad - wanted[name]).norm() / wanted[name].norm().clamp(min=1e-12)
        assert error <= 1e-4, (name, error)
    norm = torch.stack([g.norm() for g in wanted.values()]).norm().item()
    for _, grad_norm, _ in answer:
        assert grad_norm == pytest.approx(norm, rel=1e-4)


# Of the four frequencies one is as before, one on the ramp and two are divided.
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "original_max_position_embeddings": 64,
}
MORE: dict[str, tuple[str, dict[str, Any], int, dict[str, Any], dict[str, Any]]] = {
    # name: (family, changes of its config, world, layout, other sections of the recipe)
    "etp2": ("qwen3_moe", {}, 2, {"etp": 2}, {}),
    "tp2-etp2": ("qwen3_moe", {}, 2, {"tp": 2, "etp": 2}, {}),
    "tp2-etp2-ep2": ("qwen3_moe", {}, 4, {"tp": 2, "etp": 2, "ep": 2}, {}),
    "tp2-cp2": ("qwen3_moe", {}, 4, {"tp": 2, "cp": 2}, {}),
    "tp2-etp2-ep2 of sinks and biases": ("gpt_oss", {}, 4, {"tp": 2, "etp": 2, "ep": 2}, {}),
    "tp2-cp2 of sinks and windows": ("gpt_oss", {}, 4, {"tp": 2, "cp": 2}, {}),
    "tp4 of 2 KV heads, with sinks": ("gpt_oss", {"num_key_value_heads": 2}, 4, {"tp": 4}, {}),
    "gates that are cut": ("gpt_oss", {"swiglu_limit": 0.2}, 1, {}, {}),
    "full recompute of sinks": ("gpt_oss", {}, 2, {"pp": 2}, {"train": {"recompute": "full"}}),
    "dp2": ("qwen3_moe", {}, 2, {}, {}),
    "pp2 of 5 layers": ("qwen3_moe", {"num_hidden_layers": 5}, 2, {"pp": 2}, {}),
    "pp2-vpp2 of 5 layers": ("qwen3_moe", {"num_hidden_layers": 5}, 2, {"pp": 2, "vpp": 2}, {}),
    "tp4 of 2 KV heads, tied": (
        "llama",
        {"num_key_value_heads": 2, "tie_word_embeddings": True},
        4,
        {"tp": 4},
        {},
    ),
    "tp4 of 2 KV heads, with norms on them": (
        "qwen3_moe",
        {"num_key_value_heads": 2},
        4,
        {"tp": 4},
        {},
    ),
    "pp2, one layer on the first": ("qwen3_moe", {}, 2, {"pp": 2, "first_stage_layers": 1}, {}),
    "pp2, tied": ("llama", {"tie_word_embeddings": True}, 2, {"pp": 2}, {}),
    "pp2, tied, with biases": ("qwen2", {"tie_word_embeddings": True}, 2, {"pp": 2}, {}),
    "tp4 of 2 KV heads, with biases": ("qwen2", {"num_key_value_heads": 2}, 4, {"tp": 4}, {}),
    "tp2-cp2, with biases": ("qwen2", {}, 4, {"tp": 2, "cp": 2}, {}),
    "tp2 without sp": ("llama", {}, 2, {"tp": 2, "sp": False}, {}),
    "dense layers between": ("qwen3_moe", {"decoder_sparse_step": 2}, 2, {"ep": 2}, {}),
    "llama 3's rotary scaling": (
        "llama",
        # Of the four wavelengths one is short, one between and two are long.
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "low_freq_factor": 0.125,
                "high_freq_factor": 2.0,
                "original_max_position_embeddings": 16,
            }
        },
        1,
        {},
        {},
    ),
    "a shared expert, tp2-etp2-ep2": ("qwen2_moe", {}, 4, {"tp": 2, "etp": 2, "ep": 2}, {}),
    "a shared expert, tp2-cp2": ("qwen2_moe", {}, 4, {"tp": 2, "cp": 2}, {}),
    "biases all through attention, tp2": ("llama", {"attention_bias": True}, 2, {"tp": 2}, {}),
    "biases all through attention, tp2-ep2": (
        "qwen3_moe",
        {"attention_bias": True},
        2,
        {"tp": 2, "ep": 2},
        {},
    ),
    "yarn": ("qwen3", {"rope_parameters": YARN}, 1, {}, {}),
    "yarn with its own numbers, tp2": (
        "qwen3_moe",
        {"rope_parameters": YARN | {"beta_fast": 2, "beta_slow": 0.5, "truncate": False}},
        2,
        {"tp": 2},
        {},
    ),
    "yarn that leaves attention as it is": (
        "llama",
        {"rope_parameters": YARN | {"attention_factor": 1.0}},
        1,
        {},
        {},
    ),
    "linear rotary scaling": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 3.0}},
        1,
        {},
        {},
    ),
    "top-k not renormalised": ("qwen3_moe", {"norm_topk_prob": False}, 1, {}, {}),
    "one expert, not renormalised": (
        "qwen3_moe",
        {"num_experts_per_tok": 1, "norm_topk_prob": False},
        1,
        {},
        {},
    ),
    "full recompute": ("qwen3_moe", {}, 2, {"tp": 2}, {"train": {"recompute": "full"}}),
    "full recompute, pp2-ep2": (
        "qwen3_moe",
        {},
        4,
        {"pp": 2, "ep": 2},
        {"train": {"recompute": "full"}},
    ),
    "selective recompute": ("qwen3_moe", {}, 1, {}, {"train": {"recompute": "selective"}}),
    "deterministic": ("qwen3_moe", {}, 1, {}, {"train": {"deterministic": True}}),
    "micro-batch of 2 packs": ("qwen3_moe", {}, 1, {}, {"train": {"micro_batch": 2}}),
}


@pytest.mark.parametrize("case", MORE)
def test_gradients_of_further_layouts(workers: Workers, tmp_path: Path, case: str) -> None:
    family, changes, world, parallel, sections = MORE[case]
    changes = {"num_hidden_layers": layers_for(parallel)} | changes
    model = save_model(family, tmp_path, **changes)
    loss, wanted = reference_gradients(model, sequences())
    answer = workers.run(world, ranks.gradients, str(tmp_path), parallel, sequences(), 2, sections)
    assert answer[0][0] == pytest.approx(loss, rel=1e-5)
    assert answer[0][2].keys() == wanted.keys()
    for name, grad in answer[0][2].items():
        assert (grad - wanted[name]).norm() <= 1e-4 * wanted[name].norm() + 1e-12, name


def test_one_expert_of_weight_one(workers: Workers, tmp_path: Path) -> None:
    """Renormalised, it always has weight 1, and its router nothing to learn from."""
    model = save_model("qwen3_moe", tmp_path, num_experts_per_tok=1, num_hidden_layers=2)
    loss, wanted = reference_gradients(model, sequences())
    answer = workers.run(2, ranks.gradients, str(tmp_path), {"ep": 2}, sequences(), 2, {})
    assert answer[0][0] == pytest.approx(loss, rel=1e-5)
    for name, grad in answer[0][2].items():
        if name.endswith("mlp.gate.weight"):
            assert not grad.any() and wanted[name].norm() < 1e-7
        else:
            assert (grad - wanted[name]).norm() <= 1e-4 * wanted[name].norm() + 1e-12, name


def test_bf16_follows_fp32(workers: Workers, tiny: Tiny) -> None:
    folder, _ = tiny("qwen3_moe", {})
    steps = [sequences(seed) for seed in range(5)]
    wanted = workers.run(1, ranks.losses, folder, {}, steps, 2, {})[0]
    bf16 = {"model": {"dtype": "bf16"}}
    for found in workers.run(2, ranks.losses, folder, {"tp": 2}, steps, 2, bf16):
        for (a, _, _), (b, _, _) in zip(found, wanted, strict=True):
            assert a == pytest.approx(b, rel=0.02)


def test_weights_from_scratch_are_the_same_at_every_layout(workers: Workers, tiny: Tiny) -> None:
    folder, _ = tiny("qwen3_moe")
    scratch = {"model": {"init": "random"}}
    wanted = workers.run(1, ranks.losses, folder, {}, [sequences()], 2, scratch)[0][0]
    for layout in ("tp2-ep2", "pp2-vpp2", "pp2-ep2"):
        world, parallel = LAYOUTS[layout]
        found = workers.run(world, ranks.losses, folder, parallel, [sequences()], 2, scratch)[0][0]
        assert found[:2] == pytest.approx(wanted[:2], rel=1e-5), layout


def test_first_twenty_losses_agree_across_layouts(workers: Workers, tiny: Tiny) -> None:
    steps = [sequences(seed) for seed in range(20)]
    router = {"router": {"aux_loss": 0.01, "z_loss": 0.001}}
    alone: dict[str, Any] = {}
    for name, (world, parallel) in LAYOUTS.items():
        folder, _ = tiny("qwen3_moe", parallel)
        if folder not in alone:
            alone[folder] = workers.run(1, ranks.losses, folder, {}, steps, 2, router)[0]
            assert alone[folder][-1][0] < alone[folder][0][0]
        wanted = alone[folder]
        for found in workers.run(world, ranks.losses, folder, parallel, steps, 2, router):
            for (a, norm_a, router_a), (b, norm_b, router_b) in zip(found, wanted, strict=True):
                assert a == pytest.approx(b, rel=1e-5), name
                assert norm_a == pytest.approx(norm_b, rel=1e-4), name
                assert router_a["aux_loss"] == pytest.approx(router_b["aux_loss"], rel=1e-4), name
                assert router_a["z_loss"] == pytest.approx(router_b["z_loss"], rel=1e-4), name
            assert found[0][2] == pytest.approx(wanted[0][2], rel=1e-4), name  # every layer's load


OVERLAPPED: dict[str, tuple[str, dict[str, Any], int, dict[str, int]]] = {
    # name: (family, changes of its config, world, layout)
    "dp2-pp2, tied": ("llama", {"tie_word_embeddings": True}, 4, {"pp": 2}),
    "dp2-ep2": ("qwen3_moe", {}, 2, {"ep": 2}),
}


@pytest.mark.parametrize("case", OVERLAPPED)
def test_overlapped_traffic_changes_nothing(workers: Workers, tmp_path: Path, case: str) -> None:
    """Not a bit, over steps between which the weights are read: the gather of one step is due in
    the next.
    """
    family, changes, world, parallel = OVERLAPPED[case]
    save_model(family, tmp_path, **changes)
    steps = [sequences(seed) for seed in range(3)]
    apart, overlapped = (
        workers.run(
            world, ranks.losses, str(tmp_path), parallel, steps, 4, {"train": {"overlap": overlap}}
        )
        for overlap in (False, True)
    )
    assert apart == overlapped


@pytest.mark.parametrize("num_packs", [1, 2, 3, 6])
def test_packing_changes_nothing(workers: Workers, tiny: Tiny, num_packs: int) -> None:
    folder, _ = tiny("qwen3_moe", {})
    router = {"router": {"aux_loss": 0.01, "z_loss": 0.001}}
    loss, _, wanted = workers.run(1, ranks.gradients, folder, {}, sequences(), 6, router)[0]
    found_loss, _, found = workers.run(
        1, ranks.gradients, folder, {}, sequences(), num_packs, router
    )[0]
    assert found_loss == pytest.approx(loss, rel=1e-5)
    for name, grad in found.items():
        assert (grad - wanted[name]).norm() <= 1e-5 * wanted[name].norm() + 1e-9, name


ROUND_TRIPS = [
    (family, layout)
    for layout in ("one", "tp2-ep2", "pp2")
    for family in ("qwen3_moe", "qwen2_moe", "qwen3", "qwen2", "llama", "mixtral", "gpt_oss")
]


@pytest.mark.parametrize(
    ("family", "layout"), [*ROUND_TRIPS, ("qwen3_moe", "pp2-vpp2"), ("qwen3_moe", "etp2")]
)
def test_round_trip_is_bit_exact(workers: Workers, tiny: Tiny, family: str, layout: str) -> None:
    """And a checkpoint's parts are what Megatron's own modules would write."""
    from safetensors import safe_open

    world, parallel = (LAYOUTS | {"etp2": (2, {"tp": 2, "etp": 2})})[layout]
    folder, _ = tiny(family, parallel)
    if family in ("qwen3", "qwen2", "llama"):
        parallel = {k: v for k, v in parallel.items() if k != "ep"}
    found = workers.run(world, ranks.round_trip, folder, parallel)[0]
    with safe_open(f"{folder}/model.safetensors", "pt") as file:
        assert set(file.keys()) == set(found)
        for name in file.keys():
            assert torch.equal(file.get_tensor(name), found[name]), name
