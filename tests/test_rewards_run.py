"""Rewards in a run from the command line: the emoji-and-length job, and a reward model that was
trained here.
"""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from moetrain.config.rewards import RewardConfig
from moetrain.rewards import Grader
from moetrain.testing import command

ROOT = Path(__file__).parents[1]


def train(recipe: str, run_dir: Path, *more: str) -> list[dict[str, Any]]:
    """The rows of the run's ledger."""
    words = (f"run_dir={run_dir}", "observe.tensorboard=false", *more)
    own = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = command.run("train", f"examples/{recipe}", *words, cwd=ROOT, env=own, timeout=400)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in (run_dir / "ledger.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_the_emoji_and_length_job_trains(tmp_path: Path) -> None:
    """examples/rewards/emoji.py, 20 lines: more answers have one emoji, and they get shorter."""
    train("emoji/1_sft.yaml", tmp_path / "sft")
    start = f"model.path={tmp_path}/sft/hf"
    rows = train("emoji/2_grpo.yaml", tmp_path / "grpo", start, "train.steps=10")
    steps = [row for row in rows if "reward/emoji" in row]
    first, last = (
        {name: sum(row[name] for row in part) / 2 for name in ("reward/emoji", "length/mean")}
        for part in (steps[:2], steps[-2:])
    )
    assert last["reward/emoji"] > first["reward/emoji"] + 0.2
    assert last["length/mean"] < first["length/mean"]


@pytest.mark.slow
def test_a_reward_model_that_was_trained_here_grades(tmp_path: Path) -> None:
    """As transformers does: the exported folder, and the tokens of training."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    run_dir = tmp_path / "reward"
    train("reward_tiny.yaml", run_dir, "train.steps=4", "checkpoint.export_hf=true")
    folder = run_dir / "hf"
    asked = [{"role": "user", "content": "What is 3 plus 4?"}]
    texts = ["7", "12", "seven, I think"]
    config = RewardConfig(name="reward_model", options={"path": str(folder)})
    grader = Grader([config], num_workers=1, deadline_s=5)
    found = grader.grade(texts, {"prompt": [asked] * 3})
    grader.close()
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    plain: Any = AutoModelForSequenceClassification.from_pretrained(folder)
    for text, one in zip(texts, found, strict=True):
        messages = [*asked, {"role": "assistant", "content": text}]
        shown = tokenizer.apply_chat_template(messages, tokenize=False).rstrip()
        ids = tokenizer(shown, add_special_tokens=False, return_tensors="pt").input_ids
        plain.config.pad_token_id = int(ids[0, 0])
        with torch.no_grad():
            assert one.reward == pytest.approx(float(plain(ids).logits), abs=1e-5)
