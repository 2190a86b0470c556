"""Runs whose steps take the answers that end first: what they say, replay and survive."""

import os
import shutil
import signal
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from test_rl import rows, wait_for
from transformers import AutoConfig, AutoModelForCausalLM

from moetrain.answers.choose import _files
from moetrain.config.builtin import MODELS
from moetrain.data.assets import resolve
from moetrain.testing import command
from moetrain.testing.rollouts import batch_of

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "examples" / "grpo_tiny.yaml"
SETTINGS = (
    "train.steps=4 data.eval=[] checkpoint.every=2 observe.tensorboard=false optim.warmup=0"
    " rollout.prompts_per_step=3 rollout.group_size=2 rollout.max_tokens=40"
    " rollout.routing_replay=true"
).split()
GOES_ON = ("rollout.oversample=1.5", "rollout.partial=true", "rollout.max_staleness=2")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random, and one token in ten ends an answer."""
    folder = tmp_path_factory.mktemp("model") / "hf"
    shutil.copytree(resolve("builtin:stdlib-tokenizer"), folder)
    config = dict(MODELS["qwen3-moe-tiny"]) | {"eos_token_id": [2, *range(300, 500)]}
    torch.manual_seed(0)
    made: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(**cast(Any, config)))
    made.save_pretrained(folder)
    return folder


def start(run_dir: Path, model: Path, *more: str) -> command.Started:
    words = ("train", RECIPE, *SETTINGS, f"model.path={model}", f"run_dir={run_dir}")
    return command.start(*words, *more, cwd=ROOT)


def train(run_dir: Path, model: Path, *more: str) -> None:
    process = start(run_dir, model, *more)
    _, err = process.communicate(timeout=240)
    assert process.returncode == 0, err


@pytest.fixture(scope="module")
def whole(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    train(run_dir, model, *GOES_ON)
    return run_dir


def test_what_goes_on_is_learned_from_with_the_weights_that_drew_it(whole: Path) -> None:
    steps = [row for row in rows(whole) if "loss" in row]
    assert [row.get("groups/held") for row in steps] == [2, 2, 2, None]  # the last waits for all
    assert steps[0]["staleness/share"] == 0 < max(row["staleness/share"] for row in steps) < 1
    found, several = set[tuple[str, int]](), list[int]()
    for row in steps:
        batch = batch_of(whole, row["step"])
        made = [answer.trajectory for answer in batch.answers]
        assert len(made) == 6 and not found & {(one.prompt_id, one.index) for one in made}
        found |= {(one.prompt_id, one.index) for one in made}
        versions = [v for one in made for v in one.branches[0].by_token.tolist()]
        older = sum(v < row["step"] - 1 for v in versions) / len(versions)
        assert row["staleness/share"] == pytest.approx(older, abs=1e-4)
        assert row["staleness"] == row["step"] - 1 - min(versions) <= 2
        if not older:  # with routes of several weights, of those that drew last
            assert row["mismatch/abs"] < 1e-3
        several += [len(set(one.branches[0].by_token)) for one in made]
    assert len(found) == 24 and max(several) > 1


def test_killed_between_steps_that_share_answers(whole: Path, model: Path, tmp_path: Path) -> None:
    """While answers go on that an earlier step began: all is as it would have been."""
    process = start(tmp_path / "run", model, *GOES_ON)
    part = tmp_path / "run" / "rollouts" / "00000003.partial.jsonl"
    wait_for(lambda: part.exists() and part.stat().st_size > 0, process)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    # Nothing of steps that are not whole is taken for a step's answers.
    held = tmp_path / "run" / "rollouts" / "00000003.held.jsonl"
    assert held.exists() and held not in _files(held.parent)
    train(tmp_path / "run", model, *GOES_ON)
    assert not held.exists() and rows(tmp_path / "run") == rows(whole)


def test_a_replay_has_the_same_losses(whole: Path, model: Path, tmp_path: Path) -> None:
    train(tmp_path / "run", model, f"rollout.replay={whole / 'rollouts'}")
    assert rows(tmp_path / "run") == rows(whole)


def test_what_is_late_is_counted(model: Path, tmp_path: Path) -> None:
    train(tmp_path / "run", model, GOES_ON[0], "train.steps=2")
    for row in rows(tmp_path / "run"):
        assert row["faults/dropped/late"] == 4 and row["faults/dropped/late_tokens"] > 0
        assert row["staleness/share"] == 0 and "groups/held" not in row
