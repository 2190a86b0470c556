"""The resume proof: a run killed anywhere and resumed equals the uninterrupted, bit for bit."""

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from moetrain.run.starts import read_starts
from moetrain.testing import command
from moetrain.testing.command import Started
from moetrain.weights.compare import compare

EXAMPLES = Path(__file__).parents[1] / "examples"
RECIPE = EXAMPLES / "pretrain_tiny.yaml"
STEPS = 12
SETTINGS = (
    f"train.steps={STEPS} checkpoint.every=4 data.seq_len=64 train.eval_every=6 train.eval_packs=4"
    " checkpoint.export_hf=true observe.tensorboard=false"
).split()
# What a clock or the machine decides.
MEASURED = {"seconds", "tokens_per_s", "memory_gib"}


def start(run_dir: Path, *more: str, recipe: Path = RECIPE, fresh: bool = False) -> Started:
    words = ("train", recipe, "--nproc", "2", "parallel.ep=2", *SETTINGS, f"run_dir={run_dir}")
    return command.start(*words, *more, fresh=fresh)


def finish(run_dir: Path, *more: str, recipe: Path = RECIPE, fresh: bool = False) -> None:
    process = start(run_dir, *more, recipe=recipe, fresh=fresh)
    _, err = process.communicate(timeout=240)
    assert process.returncode == 0, err


def rows(run_dir: Path) -> list[dict[str, float]]:
    file = run_dir / "ledger.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return [{k: v for k, v in json.loads(r).items() if k not in MEASURED} for r in lines]


def wait_for(condition: Callable[[], bool], process: Started) -> None:
    end = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < end
        time.sleep(0.005)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    finish(run_dir)
    return run_dir


def equal(run_dir: Path, whole: Path) -> None:
    assert rows(run_dir) == rows(whole)
    assert list(compare(run_dir / "hf", whole / "hf")) == []


def test_killed_in_the_middle_of_a_run(whole: Path, tmp_path: Path) -> None:
    """It is resumed in interpreters of its own, as users have it; the others are forked."""
    run_dir = tmp_path / "run"
    process = start(run_dir)
    wait_for(lambda: len(rows(run_dir)) >= 7, process)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert [p.name for p in (run_dir / "checkpoints").glob("step_*")] == ["step_00000004"]
    finish(run_dir, fresh=True)
    equal(run_dir, whole)


def test_killed_dpo_with_an_adapter(tmp_path: Path) -> None:
    """Only the adapter is in the checkpoint, and the mean reward of the steps before; base and
    reference come from where they came from. Answers on the way change nothing.
    """
    recipe = EXAMPLES / "lora_dpo_tiny.yaml"
    losses = ("method.loss_type=[sigmoid,bco_pair]", "method.ld_alpha=0.5")
    settings = ("data.seq_len=128", "method.kl_budget=1", *losses)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finish(whole, *settings, recipe=recipe)
    # At first policy and reference are one, tails of longer answers counted less in both.
    first = rows(whole)[0]
    assert first["step"] == 0 and abs(first["eval_rewards/margins"]) < 1e-5
    (tmp_path / "asked.jsonl").write_text('{"prompt": "Which word?"}\n')
    settings = (*settings, f"train.sample_prompts={tmp_path}/asked.jsonl", "train.sample_tokens=4")
    process = start(killed, *settings, recipe=recipe)
    wait_for(lambda: len(rows(killed)) >= 7, process)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    finish(killed, *settings, recipe=recipe)
    equal(killed, whole)
    files = [run / "adapter" / "adapter_model.safetensors" for run in (killed, whole)]
    assert files[0].read_bytes() == files[1].read_bytes()
    steps = {0} | {int(row["step"]) for row in rows(killed) if "eval_loss" in row}
    assert {int(path.stem) for path in (killed / "answers").iterdir()} == steps


def test_killed_in_the_middle_of_a_save(whole: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    process = start(run_dir)
    writing = run_dir / "checkpoints" / ".writing_00000008"
    wait_for(lambda: writing.is_dir() and any(writing.iterdir()), process)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    time.sleep(0.5)  # the ranks die with their parent, a moment later
    names = sorted(p.name for p in (run_dir / "checkpoints").glob("step_*"))
    assert names == ["step_00000004"], "the half-written checkpoint is not published"
    assert writing.is_dir()
    finish(run_dir)
    assert not writing.exists()
    equal(run_dir, whole)


@pytest.mark.parametrize("layout", ["parallel.tp=2", "parallel.pp=2"])
def test_resumed_in_another_layout(whole: Path, tmp_path: Path, layout: str) -> None:
    run_dir = tmp_path / "run"
    process = start(run_dir)
    wait_for(lambda: len(rows(run_dir)) >= 6, process)
    process.send_signal(signal.SIGTERM)
    process.wait()
    assert process.returncode == 143
    end = read_starts(run_dir)[-1]
    assert (end["end"], end["crash"]) == (143, False) and end["step"] >= 4
    finish(run_dir, "parallel.ep=1", layout)
    for found, wanted in zip(rows(run_dir), rows(whole), strict=True):
        key = "loss" if "loss" in wanted else "eval_loss"
        assert found[key] == pytest.approx(wanted[key], rel=1e-5)


def test_another_recipe_is_refused(whole: Path) -> None:
    process = start(whole, "optim.lr=1e-5")
    _, err = process.communicate(timeout=120)
    assert process.returncode == 2
    assert "optim.lr" in err and len(err.splitlines()) == 1
