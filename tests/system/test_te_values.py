"""Transformer Engine's own modules on a CPU, their kernels stood in by torch
(`testing/te_kernels.py`): logits and gradients against transformers, as a GPU run has them: fused
rope, gradients added up inside the matmuls.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moetrain.testing import ranks, te_ranks
from moetrain.testing.gloo import Workers
from moetrain.testing.mutations import MUTATIONS
from tests.test_parity import LAYOUTS, reference_gradients, sequences

Tiny = Callable[[str], tuple[str, Any]]

# Triton's interpreter takes seconds for each of the permutation's kernels: one test has them.
PLAIN = {"megatron": {"moe_permute_fusion": False}}
CASES: dict[str, tuple[str, int, dict[str, Any], dict[str, Any]]] = {
    # name: (family, world, layout, other sections)
    **{
        name: ("qwen3_moe", *LAYOUTS[name], PLAIN)
        for name in ("one", "tp2-sp", "pp2", "ep2", "tp2-ep2", "cp2")
    },
    "etp2": ("qwen3_moe", 2, {"tp": 2, "etp": 2}, PLAIN),
    "sinks, windows, biases": ("gpt_oss", 2, {"tp": 2, "ep": 2}, PLAIN),
    "a shared expert": ("qwen2_moe", 2, {"tp": 2, "ep": 2}, PLAIN),
    "dense, recomputed": ("llama", 2, {"tp": 2}, {"train": {"recompute": "full"}}),
}


@pytest.mark.parametrize("case", CASES)
def test_equal_transformers(te_workers: Workers, tiny: Tiny, case: str) -> None:
    family, world, parallel, sections = CASES[case]
    folder, model = tiny(family)
    loss, wanted = reference_gradients(model, sequences())
    tokens = sequences()[2]
    with torch.no_grad():
        wanted_logits = model(torch.tensor([tokens])).logits[0]
    found = te_workers.run(world, te_ranks.values, folder, parallel, sequences(), tokens, sections)
    for answer in found:
        if answer.logits is not None:
            assert (answer.logits - wanted_logits).abs().max() <= 1e-4
    assert found[0].loss == pytest.approx(loss, rel=1e-5)
    assert found[0].gradients.keys() == wanted.keys()
    for name, grad in found[0].gradients.items():
        assert (grad - wanted[name]).norm() <= 1e-4 * wanted[name].norm() + 1e-12, name


@pytest.mark.parametrize("layout", ["one", "tp2-sp", "ep2", "tp2-ep2", "cp2"])
def test_the_fused_permutation(te_workers: Workers, tmp_path: Path, layout: str) -> None:
    """Its kernels are Triton's, run by Triton's interpreter: nothing stands in."""
    from moetrain.testing.tiny import save_model

    model = save_model("qwen3_moe", tmp_path, num_hidden_layers=1)
    world, parallel = LAYOUTS[layout]
    data = [s[:7] for s in sequences()[:2]]
    loss, wanted = reference_gradients(model, data)
    arguments = (str(tmp_path), parallel, data, data[0], {})
    found = te_workers.run(world, te_ranks.values, *arguments)[0]
    assert found.loss == pytest.approx(loss, rel=1e-5)
    for name, grad in found.gradients.items():
        assert (grad - wanted[name]).norm() <= 1e-4 * wanted[name].norm() + 1e-12, name


def test_bf16_with_main_weights_in_fp32(te_workers: Workers, workers: Workers, tiny: Tiny) -> None:
    """As far from fp32 as the torch backend is, whose step it follows."""
    folder, _ = tiny("qwen3_moe")
    bf16 = {"model": {"dtype": "bf16"}}
    steps = [sequences(seed) for seed in range(3)]
    wanted = workers.run(1, ranks.losses, folder, {}, steps, 2, bf16)[0]
    found = te_workers.run(2, ranks.losses, folder, {"tp": 2}, steps, 2, bf16 | PLAIN)
    for (loss, norm, _), (other, other_norm, _) in zip(found[0], wanted, strict=True):
        assert loss == pytest.approx(other, rel=2e-3) and norm == pytest.approx(
            other_norm, rel=0.02
        )


def test_moments_in_bf16(te_workers: Workers, workers: Workers, tiny: Tiny) -> None:
    """They are as far from the exact ones as 8 bits allow, and main weights are exact."""
    folder, _ = tiny("llama")
    bf16 = {"model": {"dtype": "bf16"}}
    steps = [sequences(seed) for seed in range(3)]
    wanted = workers.run(1, ranks.losses, folder, {}, steps, 2, bf16)[0]
    low = bf16 | {"optim": {"state_dtype": "bf16"}}
    found = te_workers.run(1, ranks.losses, folder, {}, steps, 2, low)[0]
    assert [loss for loss, *_ in found] == pytest.approx([loss for loss, *_ in wanted], rel=5e-3)


ADAPTED = {
    "one": ("qwen3_moe", 1, {}, {"rank": 4, "alpha": 8, "target": "all-router"}),
    "tp2-ep2": ("qwen3_moe", 2, {"tp": 2, "ep": 2}, {"rank": 4, "target": "all-router"}),
    "dora, tp2": ("llama", 2, {"tp": 2}, {"rank": 4, "type": "dora", "target": ["o_proj"]}),
}


@pytest.mark.parametrize("case", ADAPTED)
def test_adapters_equal_the_torch_backends(
    te_workers: Workers, workers: Workers, tiny: Tiny, case: str
) -> None:
    """Which equal transformers' (tests/test_lora.py)."""
    family, world, parallel, adapter = ADAPTED[case]
    arguments = (tiny(family)[0], parallel, sequences(), 2, {"adapter": adapter})
    wanted = workers.run(world, ranks.adapter_gradients, *arguments)[0]
    sections = arguments[-1] | (PLAIN if "moe" in family else {})
    found = te_workers.run(world, ranks.adapter_gradients, *arguments[:-1], sections)[0]
    assert found[:2] == pytest.approx(wanted[:2], rel=1e-5)
    assert found[2].keys() == wanted[2].keys()
    for name, grad in found[2].items():
        assert (grad - wanted[2][name]).norm() <= 1e-4 * wanted[2][name].norm() + 1e-12, name


SAVED = {
    # (backend, layout) of the run and of the one that goes on, other sections
    "te to torch": (("te", {}), ("torch", {}), {}),
    "torch to te": (("torch", {}), ("te", {}), {}),
    "ep2 to one with adamw in bf16": (("te", {"ep": 2}), ("te", {}), {"model": {"dtype": "bf16"}}),
    "one to ep2": (("te", {}), ("te", {"ep": 2}), {}),
    "muon, to torch": (("te", {}), ("torch", {}), {"optim": {"name": "muon"}}),
}


@pytest.mark.parametrize("case", SAVED)
def test_a_run_goes_on_at_the_other_backend_and_layout(
    te_workers: Workers, tiny: Tiny, tmp_path: Path, case: str
) -> None:
    """Optimizer included."""
    first, second, sections = SAVED[case]
    world = 1 + (max(len(first[1]), len(second[1])))
    steps = [sequences(seed) for seed in range(4)]
    arguments = (tiny("qwen3_moe")[0], steps, tmp_path / "saved", sections | PLAIN)
    wanted = te_workers.run(world, te_ranks.last_losses, *first, *arguments, False)[0]
    found = te_workers.run(world, te_ranks.last_losses, *second, *arguments, True)[0]
    assert found == pytest.approx(wanted, rel=2e-3 if "bf16" in case else 1e-5)


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_logits_catch_a_wrong_table(te_workers: Workers, tiny: Tiny, mutation: str) -> None:
    folder, model = tiny("qwen3_moe")
    tokens = sequences()[1]
    with torch.no_grad():
        wanted = model(torch.tensor([tokens])).logits[0]
    arguments = (folder, tokens, mutation, PLAIN)
    found, exact = te_workers.run(1, ranks.mutated_logits, *arguments)[0]
    gap = (found - wanted).abs().max().item()
    assert exact and (gap <= 1e-4 if mutation == "none" else gap > 1e-2), gap


def test_every_stand_in_was_called(te_workers: Workers, tiny: Tiny) -> None:
    """So that none stands in for nothing, and the list in the docs is the whole one."""
    sections = PLAIN | {"model": {"dtype": "bf16"}}
    arguments = (tiny("qwen3_moe")[0], {}, sequences(), sequences()[2], sections)
    low = {"optim": {"state_dtype": "bf16"}}
    assert te_workers.run(1, te_ranks.unused, *arguments, low)[0] == set()
