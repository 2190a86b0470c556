"""Learning rates by their formulas; what is decayed, and what is left as it was."""

import math
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from moetrain.config.optim import OptimConfig
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
    for schedule in ("constant", "linear", "cosine", "wsd"):
        assert rates(schedule=schedule)[:4] == [0.25, 0.5, 0.75, 1.0]


def test_a_warm_up_is_a_share_of_the_run_as_in_transformers() -> None:
    from transformers import TrainingArguments

    for share, num_steps in ((0.05, 40), (0.1, 25), (0.03, 7), (0.5, 1)):
        config = OptimConfig(lr=1.0, warmup=share)
        steps = TrainingArguments(warmup_steps=share, use_cpu=True).get_warmup_steps(num_steps)
        found = [learning_rate(step, config, num_steps) for step in range(1, num_steps + 1)]
        assert found.index(1.0) == steps - 1 and found[0] == 1 / steps
    assert OptimConfig(warmup=4.0).warmup == 4 and OptimConfig(warmup=1).warmup == 1
    for wrong in (1.5, -0.1):
        with pytest.raises(ValueError, match=r"warmup"):
            OptimConfig(warmup=wrong)


def test_constant_stays() -> None:
    assert set(rates(schedule="constant")[3:]) == {1.0}


def test_cosine_is_half_a_wave() -> None:
    found = rates(schedule="cosine")
    for step in (10, 22, 31):
        wave = (1 + math.cos(math.pi * (step - 5) / 36)) / 2
        assert found[step - 1] == pytest.approx(0.1 + 0.9 * wave)
    assert found[22] == pytest.approx(0.55)
    assert rates(schedule="cosine", decay_steps=18)[22:] == [pytest.approx(0.1)] * 18


@pytest.mark.parametrize("schedule", ["linear", "cosine", "wsd"])
def test_the_last_step_moves(schedule: str) -> None:
    """A run of one step too."""
    for num_steps in (1, 2, 7, 40):
        config = OptimConfig(lr=1.0, schedule=schedule)  # type: ignore[arg-type]
        assert learning_rate(1, config, num_steps) == 1.0
        assert learning_rate(num_steps, config, num_steps) > 1e-3


def test_rates_are_those_of_transformers() -> None:
    """After the warm-up: theirs is one step behind, so that their first step does not move."""
    from transformers import optimization

    warmup, ratio = 4, 0.1
    param = torch.nn.Parameter(torch.zeros(1))
    known = {
        "linear": partial(optimization.get_linear_schedule_with_warmup, num_training_steps=STEPS),
        "cosine": partial(
            optimization.get_cosine_with_min_lr_schedule_with_warmup,
            num_training_steps=STEPS,
            min_lr_rate=ratio,
        ),
    }
    known |= {
        f"wsd/{ours}": partial(
            optimization.get_wsd_schedule,
            num_decay_steps=10,
            num_training_steps=STEPS,
            min_lr_ratio=ratio,
            decay_type=theirs,
        )
        for ours, theirs in (("linear", "linear"), ("cosine", "cosine"), ("minus_sqrt", "1-sqrt"))
    }
    for name, make in known.items():
        optimizer = torch.optim.SGD([param], lr=1.0)
        scheduler = make(optimizer, num_warmup_steps=warmup)
        theirs = []
        for _ in range(STEPS):
            theirs.append(scheduler.get_last_lr()[0])
            optimizer.step()
            scheduler.step()
        kind, _, shape = name.partition("/")
        config = OptimConfig(
            lr=1.0,
            min_lr=0.0 if kind == "linear" else ratio,
            warmup=warmup,
            schedule=kind,  # type: ignore[arg-type]
            decay_steps=10 if shape else None,
            wsd_decay=shape or "linear",  # type: ignore[arg-type]
        )
        ours = [learning_rate(step, config, STEPS) for step in range(1, STEPS + 1)]
        assert ours[warmup:] == pytest.approx(theirs[warmup:]), name


@pytest.mark.parametrize("shape", ["linear", "cosine", "exponential", "minus_sqrt", None])
def test_rates_are_those_of_megatron(shape: str | None) -> None:
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = OptimizerParamScheduler(
        optimizer,  # type: ignore[arg-type]
        init_lr=0.0,
        max_lr=1.0,
        min_lr=0.1,
        lr_warmup_steps=4,
        lr_decay_steps=STEPS,
        lr_decay_style="WSD" if shape else "linear",
        start_wd=0.0,
        end_wd=0.0,
        wd_incr_steps=1,
        wd_incr_style="constant",
        wsd_decay_steps=10,
        lr_wsd_decay_style=shape,
    )
    theirs = []
    for _ in range(STEPS):
        theirs.append(optimizer.param_groups[0]["lr"])
        scheduler.step(1)
    given = {"schedule": "wsd", "decay_steps": 10, "wsd_decay": shape} if shape else {}
    assert rates(**(given or {"schedule": "linear"}))[4:] == pytest.approx(theirs[4:])


HALF_WAY = {"linear": 0.5, "cosine": 0.5, "exponential": 2 * 0.5**0.5 - 1, "minus_sqrt": 0.29289}


@pytest.mark.parametrize("shape", HALF_WAY)
def test_wsd_holds_and_then_decays(shape: str) -> None:
    found = rates(schedule="wsd", decay_steps=10, wsd_decay=shape)
    assert set(found[3:31]) == {1.0}
    assert found[35] == pytest.approx(0.1 + 0.9 * HALF_WAY[shape], rel=1e-4)
    assert found[-1] < 0.25
    assert all(a > b for a, b in pairwise(found[30:]))
    # A tenth of what follows the warm-up where no length is given.
    short = rates(schedule="wsd", wsd_decay=shape)
    assert short[37] == 1.0 and short[38] < 1.0


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
