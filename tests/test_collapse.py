"""Warnings of collapse: what sets them off, and that healthy runs set off none."""

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moetrain.config.load import load_recipe
from moetrain.observe.collapse import APART, FAR, NEARLY_ALL, WINDOW, WORSE, Collapse
from moetrain.observe.reporter import Reporter
from moetrain.observe.runs import find_runs

Row = dict[str, Any]
ROOT = Path(__file__).parents[1]


def training(step: int, reward: float = 0.5, signal: float = 0.1, **more: float) -> Row:
    row = {"step": step, "loss": 0.01, "reward/mean": reward, "groups/no_signal": signal}
    return row | {"groups/graded": 8.0, "length/mean": 50.0, **more}


def held_out(step: int, reward: float, num: int = 200) -> Row:
    std = math.sqrt(max(0.0, reward * (1 - reward)))
    return {"step": step, "eval_reward/mean": reward, "eval_reward/std": std,
            "eval_reward/graded": float(num)}  # fmt: skip


def warnings(rows: list[Row], budget: float | None = None) -> list[tuple[int, str]]:
    watch = Collapse(budget)
    return [(row["step"], text) for row in rows if (text := watch.row(row))]


def collapsing() -> list[Row]:
    """0.40 -> 0.61 in training, 0.675 -> 0.55 held out, 0 -> 0.875 without signal: the run whose
    report said "warnings: none".
    """
    rows, rng = [held_out(0, 0.675)], random.Random(0)
    for step in range(1, 61):
        share = step / 60
        signal = round(8 * max(0.0, 0.875 * share + rng.gauss(0, 0.05))) / 8
        rows.append(training(step, 0.40 + 0.21 * share + rng.gauss(0, 0.05), min(1.0, signal)))
        if step % 10 == 0:
            rows.append(held_out(step, 0.675 - 0.125 * min(1.0, 1.2 * share)))
    return rows


def test_the_run_that_had_none_has_both() -> None:
    found = warnings(collapsing())
    assert any("of the groups have answers of one reward" in text for _, text in found)
    assert any("fallen from 0.675 at step 0 to 0.5" in text for _, text in found)
    assert len(found) <= 5, "said when it is new or worse, not at every step"


def test_a_reporter_puts_them_into_the_ledger_and_a_resume_says_the_same(tmp_path: Path) -> None:
    def ledger(name: str, *parts: slice) -> list[Row]:
        recipe = load_recipe(
            ROOT / "examples" / "grpo_tiny.yaml",
            [f"run_dir={tmp_path / name}", "observe.tensorboard=false", "observe.progress=false"],
        )
        recipe.run_dir.mkdir()
        for part in parts:
            step = rows[part.start - 1]["step"] if part.start else 0
            with Reporter(recipe, 60, step, speaks=True) as report:
                for row in rows[part]:
                    (report.step if "loss" in row else report.held_out)(row)
        lines = (recipe.run_dir / "ledger.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    rows = collapsing()
    whole = ledger("whole", slice(0, None))
    assert sum("warning" in row for row in whole) >= 2
    assert ledger("resumed", slice(0, 45), slice(45, None)) == whole
    (run,) = find_runs([tmp_path / "whole"])
    assert [step for step, _ in run.warnings] == [row["step"] for row in whole if "warning" in row]


def test_signal_is_missed_when_it_goes_or_was_never_there() -> None:
    assert warnings([training(i, signal=0.45) for i in range(100)]) == []
    assert warnings([training(i, signal=0.75) for i in range(100)]) == [], (
        "as it was from the start"
    )
    ((step, text),) = warnings([training(i, signal=NEARLY_ALL) for i in range(100)])
    assert step == WINDOW - 1 and "at first" not in text
    rising = [training(i, signal=min(0.7, i / 50)) for i in range(200)]
    ((step, text),) = warnings(rising)
    assert 25 < step < 45 and "0.09 at first" in text
    again = warnings(rising + [training(200 + i, signal=min(1.0, 0.7 + i / 50)) for i in range(60)])
    assert len(again) == 2, f"again when {WORSE} times as bad"
    two = [training(i, signal=min(0.6, i / 50)) | {"groups/graded": 1.0} for i in range(200)]
    assert warnings(two) == [], "ten groups a window are too few to be sure of that"


def test_kl_out_of_bounds() -> None:
    for key, near, far in (("kl", FAR * 50, "reference"), ("mismatch/kl", APART, "apart")):
        inside = [training(i, **{key: 0.8 * near}) for i in range(50)]
        spike = training(50, **{key: 1.9 * near})
        assert warnings([*inside, spike]) == [], "one batch is none"
        ((step, text),) = warnings(
            [*inside, *(training(i, **{key: 1.1 * near}) for i in range(50))]
        )
        assert step == 6 and far in text and key in text
    beyond = [training(i, kl=100.0) for i in range(50)]
    assert warnings(beyond) and warnings(beyond, budget=1000.0) == [], "the recipe's bound wins"


def test_held_out_falls_only_beyond_chance_and_while_training_climbs() -> None:
    def rows(rise: float, last: float, num: int) -> list[Row]:
        made = [held_out(0, 0.6, num)]
        for step in range(1, 61):
            made.append(training(step, 0.4 + rise * step / 60 + 0.02 * (step % 2)))
            if step % 20 == 0:
                made.append(held_out(step, last, num))
        return made

    assert len(warnings(rows(0.3, 0.45, 200))) == 1
    assert warnings(rows(0.3, 0.45, 40)) == [], "that few answers do not say so"
    assert warnings(rows(0.0, 0.45, 200)) == [], "training does not rise: it is no over-fitting"
    assert warnings(rows(0.3, 0.62, 200)) == [], "it rose"
    assert warnings([*rows(0.3, 0.6, 200), held_out(61, 0.4)]) == [], "one evaluation"


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([8, 32]), st.floats(0.0, 0.6), st.booleans())
def test_healthy_runs_have_none(seed: int, groups: int, signal: float, learns: bool) -> None:
    """Noisy but stationary, or learning: training and held-out reward rise to a plateau."""
    rng = random.Random(seed)

    def share(p: float, num: int) -> float:
        return sum(rng.random() < p for _ in range(num)) / num

    rows: list[Row] = []
    for step in range(301):
        level = 0.4 + 0.5 * (1 - math.exp(-step / 80)) if learns else 0.5
        if step:
            noise = {"kl": rng.uniform(0, 20), "mismatch/kl": rng.uniform(0, 0.05)}
            rows.append(training(step, share(level, 64), share(signal, groups), **noise))
            rows[-1]["groups/graded"] = float(groups)
        if step % 25 == 0:
            rows.append(held_out(step, share(level - 0.05, 100), 100))
    assert warnings(rows) == []


@pytest.mark.parametrize("value", [math.nan, math.inf, None, "x", True, -1, 1e308])
def test_rows_that_are_no_figures_are_passed_over(value: Any) -> None:
    rows = [{key: value if key not in ("step", "loss") else own for key, own in training(i).items()}
            for i in range(50)]  # fmt: skip
    rows += [held_out(i, 0.5) | {"eval_reward/mean": value} for i in range(5)]
    rows += [held_out(i, 0.5) | {"eval_reward/std": value} for i in range(5)]
    assert warnings(rows) == []


def test_a_policy_that_is_far_on_pairs() -> None:
    """33 nats an answer of 3 tokens, as a run had that told pairs apart and said nothing more."""
    row = {"step": 5, "eval_kl": 33.0, "eval_lengths/chosen": 3.0, "eval_lengths/rejected": 3.0}
    warning = Collapse().row(row)
    assert warning is not None and "11.00 nats a token" in warning
    assert Collapse().row(row | {"eval_kl": 2.9}) is None
    long = {"eval_lengths/chosen": 200.0, "eval_lengths/rejected": 150.0}
    assert Collapse().row(row | long) is None
