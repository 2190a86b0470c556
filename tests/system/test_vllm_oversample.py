"""Answers that real vLLM is told to stop, and that go on behind their tokens."""

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from test_vllm import SPEAKER, Served, moetrain, served, steps, train, wait_for

from moetrain.data.assets import resolve
from moetrain.rollout.client import Client
from moetrain.rollout.fleet import Fleet
from moetrain.rollout.servers import Given
from moetrain.testing.going_on import CONFIG, check_going_on, model_of
from moetrain.testing.rollouts import batch_of

__all__ = ["served"]


def test_answers_go_on_with_other_weights(served: Served, tmp_path: Path) -> None:
    client = Client(served.address, served.token_file.read_text().strip(), 60.0)
    server = Given(client, 300.0)
    server.begin()
    tokenizer = resolve("builtin:stdlib-tokenizer")
    fleet = Fleet([server], tmp_path / "weights", CONFIG, tokenizer, 300.0, None)
    check_going_on(fleet, tmp_path, num_stops=5, most=480)


@pytest.mark.parametrize("turns", [1, 3])
def test_a_run_whose_steps_share_answers_is_killed_and_goes_on(
    served: Served, tmp_path: Path, turns: int
) -> None:
    """Weights that stand still draw what they would have drawn at one go: every log-prob is the
    trainer's, with the routes of the last draw; nothing is learned twice, nothing is lost.
    """
    model, run_dir = tmp_path / "model", tmp_path / "run"
    model_of(0, model)
    shutil.copytree(resolve("builtin:stdlib-tokenizer"), model, dirs_exist_ok=True)
    config: Any = CONFIG | {"eos_token_id": [2, *range(300, 310)]}
    (model / "config.json").write_text(json.dumps(config))
    words = (f"model.path={model}", "train.steps=5", "optim.lr=1e-12", "data.eval=[]")
    words += ("rollout.oversample=1.5", "rollout.partial=true")
    if turns > 1:
        (tmp_path / "speaker.py").write_text(SPEAKER)
        words += (f"rollout.environment={tmp_path}/speaker.py:Speaker", "rollout.max_tokens=130")
    else:
        words += ("rollout.max_tokens=400",)
    words += ("rollout.routing_replay=true", *served.words)
    process = moetrain("train", f"run_dir={run_dir}", *words)
    partial = run_dir / "rollouts" / "00000003.partial.jsonl"
    wait_for(lambda: partial.is_file() and partial.stat().st_size > 0, process)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    train(run_dir, *words, nproc=1)
    found = steps(run_dir)
    assert [row["step"] for row in found] == [1, 2, 3, 4, 5]
    assert [row.get("groups/held") for row in found] == [2, 2, 2, 2, None]
    assert all(row["mismatch/abs"] <= 1e-4 for row in found)
    assert any(0 < row["staleness/share"] < 1 for row in found)
    assert turns == 1 or max(row["turns/most"] for row in found) == turns
    made = [one.trajectory for row in found for one in batch_of(run_dir, row["step"]).answers]
    keys = {(one.prompt_id, one.index) for one in made}
    assert len(made) == len(keys) == 5 * 4 * 4
    assert any(len(set(one.branches[0].by_token)) > 1 for one in made)
