"""Warnings of over-optimisation: what sets them off, what does not, and how often they come."""

import json
import math
import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from moetrain.observe.overoptimisation import FALL, FALLS, STRIDE, WINDOW, WORSE, Watch
from moetrain.testing import ranks
from moetrain.testing.gloo import Workers

LENGTH = 50.0


def training(step: int, **figures: float) -> dict[str, Any]:
    """A row as the loop writes it; `logp` is a token's."""
    return {"step": step, "loss": 0.5, **named("", figures)}


def held_out(step: int, **figures: float) -> dict[str, Any]:
    return {"step": step, "eval_loss": 0.5, **named("eval_", figures)}


def named(prefix: str, figures: dict[str, float]) -> dict[str, float]:
    names = {"margin": "rewards/margins", "kl": "kl", "lengths": "lengths/chosen"}
    row = {prefix + names[k]: v for k, v in figures.items() if k != "logp"}
    if "logp" in figures:
        length = figures.get("lengths", LENGTH)
        row |= {f"{prefix}logps/chosen": figures["logp"] * length}
        row |= {f"{prefix}lengths/chosen": length}
    return row


def warnings(watch: Watch, rows: list[dict[str, Any]]) -> list[tuple[int, str]]:
    return [(row["step"], text) for row in rows if (text := watch.row(row)) is not None]


def test_chosen_falls_while_the_margin_rises() -> None:
    logps = [-0.8, -0.7, -0.74, -0.78, -0.82, -0.86]
    rows = [held_out(10 * i, logp=x, margin=0.1 * i) for i, x in enumerate(logps)]
    ((step, text),) = warnings(Watch(), rows)
    assert step == 40  # the third fall in a row, and the first FALL nats below the best
    assert "held-out" in text and "-0.700 to -0.820" in text and "since step 10" in text
    assert "0.1 to 0.4" in text


@pytest.mark.parametrize(
    "logps, margins",
    [
        ([-0.8, -0.7, -0.6, -0.5, -0.4, -0.3], [0, 1, 2, 3, 4, 5]),  # chosen rises
        ([-0.4, -0.5, -0.6, -0.7, -0.8, -0.9], [5, 4, 3, 2, 1, 0]),  # the margin falls too
        ([-0.40, -0.42, -0.44, -0.46, -0.48, -0.49], [0, 1, 2, 3, 4, 5]),  # less than FALL
        ([-0.4, -0.6, -0.5, -0.6, -0.7, -0.6], [0, 1, 2, 3, 4, 5]),  # never FALLS in a row
    ],
)
def test_runs_without_a_warning(logps: list[float], margins: list[float]) -> None:
    pairs = zip(logps, margins, strict=True)
    rows = [held_out(i, logp=x, margin=m, kl=1e6) for i, (x, m) in enumerate(pairs)]
    assert warnings(Watch(), rows) == []


def test_thresholds_are_where_they_are_said_to_be() -> None:
    def rows(fall: float, num: int) -> list[dict[str, Any]]:
        return [held_out(i, logp=-1 - fall * i / num, margin=float(i)) for i in range(num + 1)]

    assert warnings(Watch(), rows(FALL * 0.99, FALLS)) == []
    assert len(warnings(Watch(), rows(FALL * 1.01, FALLS))) == 1
    assert warnings(Watch(), rows(FALL * 10, FALLS - 1)) == []


def test_noise_over_training_rows_is_smoothed() -> None:
    """Batches that differ by more than FALL set nothing off; a trend beneath them does."""
    rng = random.Random(5)

    def rows(trend: float, since: float = 0.0) -> list[dict[str, Any]]:
        made: list[dict[str, Any]] = []
        for step in range(1, 2001):
            share = step / 2000
            logp = -0.8 - trend * share + rng.gauss(0, 0.1)
            margin = since + 2 * share + rng.gauss(0, 0.3)
            made.append(training(step, logp=logp, margin=margin, lengths=rng.uniform(20, 80)))
        return made

    for _ in range(20):
        assert warnings(Watch(), rows(0.0)) == []
    for _ in range(5):
        found = warnings(Watch(), rows(-0.5) + rows(3.0, since=2.0))
        assert found and "training" in found[0][1] and len(found) < 15


def test_length_of_the_answers_is_no_fall() -> None:
    rows = [
        held_out(i, logp=-0.8, margin=float(i), lengths=length)
        for i, length in enumerate([20, 40, 60, 80, 100, 120])
    ]
    assert warnings(Watch(), rows) == []


def test_a_fall_is_told_again_only_when_worse() -> None:
    rows = [held_out(i, logp=-1 - 0.05 * i, margin=float(i)) for i in range(20)]
    falls = [round(0.05 * step, 2) for step, _ in warnings(Watch(), rows)]
    assert falls[0] == 0.15
    assert 2 < len(falls) < 7
    assert all(b >= WORSE * a - 1e-9 for a, b in pairwise(falls))


def test_kl_budget() -> None:
    rows = [held_out(i, kl=kl) for i, kl in enumerate([1, 9.9, 10.1, 11, 12, 15.2, 9, 15.3, 40])]
    found = warnings(Watch(kl_budget=10), rows)
    assert [step for step, _ in found] == [2, 5, 8]
    assert "10.1 nats" in found[0][1] and "method.kl_budget=10" in found[0][1]
    assert warnings(Watch(), rows) == []


def test_training_kl_is_a_mean_over_rows_until_there_is_a_held_out_one() -> None:
    spikes = [training(i, kl=50.0 if i == 3 else 6.0) for i in range(STRIDE)]
    assert [step for step, _ in warnings(Watch(kl_budget=10), spikes)] == [STRIDE - 1]
    assert warnings(Watch(kl_budget=11), spikes) == []
    assert warnings(Watch(kl_budget=10), [held_out(0, kl=6.0), *spikes]) == []


def test_training_rows_speak_until_enough_held_out_ones_can() -> None:
    falling = [training(i, logp=-1 - 0.01 * i, margin=0.1 * i) for i in range(3 * WINDOW)]
    steady = [held_out(0, logp=-1.0, margin=0.0)] * (FALLS + 1)
    assert len(warnings(Watch(), steady[:-1] + falling)) >= 1
    assert warnings(Watch(), steady + falling) == []


def test_both_reasons_are_in_one_text() -> None:
    rows = [held_out(i, logp=-1 - 0.1 * i, margin=float(i), kl=4.0 * i) for i in range(FALLS + 1)]
    ((step, text),) = warnings(Watch(kl_budget=11), rows)
    assert step == FALLS and "log-prob" in text and "KL" in text


def test_rows_without_the_figures_and_infinite_ones_are_passed_over() -> None:
    rows = [{"step": i, "loss": 1.0} for i in range(50)]
    rows += [held_out(i, logp=-math.inf, margin=math.nan, kl=math.inf) for i in range(50)]
    assert warnings(Watch(kl_budget=1), rows) == []


def test_earlier_rows_bring_a_resumed_run_to_the_same_state() -> None:
    rows = [training(i, logp=-1 - 0.004 * i, margin=0.1 * i, kl=0.3 * i) for i in range(200)]
    whole = warnings(Watch(kl_budget=5), rows)
    resumed = Watch(kl_budget=5)
    warnings(resumed, rows[:87])
    assert whole and warnings(resumed, rows[87:]) == [w for w in whole if w[0] >= 87]


@pytest.mark.gloo
def test_a_run_that_likes_both_answers_better_passes_its_budget(
    workers: Workers, tmp_path: Path
) -> None:
    """The mean log-ratio, which `kl` was, only falls there."""
    recipe = Path(__file__).parents[1] / "examples" / "dpo_tiny.yaml"
    settings = (
        f"run_dir={tmp_path} train.steps=6 train.eval_every=3 train.eval_packs=2 data.seq_len=128"
        " checkpoint.every=null observe.tensorboard=false optim.lr=3e-3 optim.warmup=0"
    ).split()
    method = "method={name: dpo, rpo_alpha: 5, kl_budget: 1}"
    assert workers.run(1, ranks.trained, str(recipe), [*settings, method]) == [0]
    rows = [json.loads(line) for line in (tmp_path / "ledger.jsonl").read_text().splitlines()]
    (last,) = (row for row in rows if row["step"] == 6 and "eval_kl" in row)
    assert last["eval_rewards/chosen"] > 0 and last["eval_rewards/rejected"] > 0
    assert last["eval_kl"] > 1 and all(row.get("kl", 0.0) >= 0 for row in rows)
    assert any("past method.kl_budget=1" in row.get("warning", "") for row in rows)
