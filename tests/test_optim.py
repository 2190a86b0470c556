"""Learning rates by their formulas; what is decayed, and what is left as it was."""

import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from moetrain.config.recipe import OptimConfig
from moetrain.engine.optim import learning_rate
from moetrain.testing import ranks
from moetrain.testing.gloo import Workers

STEPS = 40
DATA = [[3, 14, 15, 92, 65, 35, 89], [79, 32, 38, 46], [26, 43, 38, 32, 79, 50, 28, 84]]


def rates(**cfg: Any) -> list[float]:
    """Of steps 1 to STEPS."""
    config = OptimConfig(lr=1.0, min_lr=0.1, warmup=4, **cfg)
    return [learning_rate(step, config, STEPS) for step in range(1, STEPS + 1)]


def test_every_schedule_warms_up() -> None:
    for schedule in ("constant", "cosine", "wsd"):
        assert rates(schedule=schedule)[:4] == [0.25, 0.5, 0.75, 1.0]


def test_constant_stays() -> None:
    assert set(rates(schedule="constant")[3:]) == {1.0}


def test_cosine_is_half_a_wave() -> None:
    found = rates(schedule="cosine")
    for step in (10, 22, 31):
        wave = (1 + math.cos(math.pi * (step - 4) / 36)) / 2
        assert found[step - 1] == pytest.approx(0.1 + 0.9 * wave)
    assert found[21] == pytest.approx(0.55) and found[-1] == pytest.approx(0.1)
    assert rates(schedule="cosine", decay_steps=18)[22:] == [pytest.approx(0.1)] * 18


HALF_WAY = {"linear": 0.5, "cosine": 0.5, "exponential": 0.1}


@pytest.mark.parametrize("shape", HALF_WAY)
def test_wsd_holds_and_then_decays(shape: str) -> None:
    found = rates(schedule="wsd", decay_steps=10, wsd_decay=shape)
    assert set(found[3:30]) == {1.0}
    assert found[34] == pytest.approx(0.1 + 0.9 * HALF_WAY[shape])
    assert found[-1] == pytest.approx(0.1, abs=0.01)
    assert all(a > b for a, b in pairwise(found[29:]))
    # A tenth of what follows the warm-up where no length is given.
    short = rates(schedule="wsd", wsd_decay=shape)
    assert short[36] == 1.0 and short[37] < 1.0


def stepped(workers: Workers, folder: str, **sections: Any) -> Any:
    return workers.run(1, ranks.stepped, folder, DATA, sections)[0]


def test_matrices_decay_and_norms_do_not(
    workers: Workers, tiny: Callable[[str], tuple[str, Any]]
) -> None:
    """AdamW, arXiv 1711.05101, algorithm 2: the decay is apart from the gradient's step."""
    folder, _ = tiny("qwen3_moe")
    before, plain = stepped(workers, folder, optim={"lr": 1e-2, "weight_decay": 0.0})
    _, decayed = stepped(workers, folder, optim={"lr": 1e-2, "weight_decay": 2.0})
    for name, weight in before.items():
        factor = 0.02 if weight.dim() > 1 else 0.0
        gap = plain[name] - decayed[name]
        torch.testing.assert_close(
            gap,
            factor * weight,
            rtol=1e-4,
            atol=1e-6,
            msg=lambda text, name=name: f"{name}: {text}",
        )


def test_a_frozen_router_stays(workers: Workers, tiny: Callable[[str], tuple[str, Any]]) -> None:
    folder, _ = tiny("qwen3_moe")
    before, after = stepped(workers, folder, router={"freeze": True, "aux_loss": 0.1})
    for name, weight in before.items():
        assert torch.equal(weight, after[name]) == name.endswith("mlp.gate.weight"), name


def test_checkpoints_name_weights_as_transformer_engine_does(
    workers: Workers, tmp_path: Path
) -> None:
    """So that a run may change its backend, and Megatron's own tools find what they know."""
    from moetrain.testing.tiny import save_model

    save_model("qwen3_moe", tmp_path, decoder_sparse_step=2, num_hidden_layers=2)
    names = workers.run(1, ranks.names_on_disk, str(tmp_path))[0]
    dense, moe = "decoder.layers.0.", "decoder.layers.1."
    assert {name for name in names if "norm" in name and name.startswith(dense)} == {
        f"{dense}self_attention.linear_qkv.layer_norm_weight",
        f"{dense}self_attention.q_layernorm.weight",
        f"{dense}self_attention.k_layernorm.weight",
        f"{dense}mlp.linear_fc1.layer_norm_weight",
    }
    assert f"{moe}pre_mlp_layernorm.weight" in names
    assert f"{moe}mlp.experts.experts.linear_fc1.weight" in names
    assert not [name for name in names if "_extra_state" in name]
