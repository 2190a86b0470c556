"""Every method that learns from rollouts at temperatures other than 1, at 0.6 with what Qwen3's
card advises beside it and a repetition penalty: what is learned from is scored as it was drawn, the
proof of a push and demonstrations as the model has it.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from moetrain.testing import ranks
from moetrain.testing.gloo import Workers

pytestmark = pytest.mark.gloo
ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "examples" / "grpo_tiny.yaml"
SETTINGS = (
    "train.steps=2 data.eval=[] data.seq_len=256 checkpoint.every=null observe.tensorboard=false"
    " data.take=[8] rollout.prompts_per_step=2 rollout.group_size=4 rollout.max_tokens=8"
).split()
METHODS = {
    "grpo": "{name: grpo, beta: 0.05}",
    "dr_grpo": "dr_grpo",
    "dapo": "dapo",
    "gspo": "gspo",
    "ppo": "{name: ppo, beta: 0.05}",
    "chord": "{name: chord, packs: 1}",
}
ADVISED = ["rollout.top_p=0.95", "rollout.top_k=20", "rollout.repetition_penalty=1.1"]
DEMONSTRATIONS = "data.demonstrations=builtin:checkable-sft"


def steps(run_dir: Path) -> list[dict[str, Any]]:
    rows = map(json.loads, (run_dir / "ledger.jsonl").read_text().splitlines())
    return [row for row in rows if "loss" in row]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_at_every_temperature(workers: Workers, tmp_path: Path, method: str) -> None:
    runs: dict[float, list[dict[str, Any]]] = {}
    for temperature in (0.6, 1.0, 1.3):
        run_dir = tmp_path / str(temperature)
        own = [f"method={METHODS[method]}", f"rollout.temperature={temperature}"]
        own += ADVISED if temperature == 0.6 else []
        own += [f"run_dir={run_dir}", *([DEMONSTRATIONS] if method == "chord" else [])]
        assert workers.run(1, ranks.trained, str(RECIPE), [*SETTINGS, *own]) == [0]
        runs[temperature] = steps(run_dir)
        assert [row["step"] for row in runs[temperature]] == [1, 2]
        for row in runs[temperature]:
            assert row["push/logprob_gap"] <= 1e-3 and row["push/reloads"] == 0
            assert row["mismatch/abs"] <= 1e-4  # sampler and trainer mean the same distribution
            assert row["ratio"] == pytest.approx(1, abs=1e-4)
    if method == "grpo":
        own = [f"method={METHODS[method]}", "rollout.temperature=0.6", *ADVISED]
        own += [f"run_dir={tmp_path / 'again'}", f"rollout.replay={tmp_path / '0.6' / 'rollouts'}"]
        assert workers.run(1, ranks.trained, str(RECIPE), [*SETTINGS, *own]) == [0]
        losses = [
            [row["loss"] for row in found] for found in (steps(tmp_path / "again"), runs[0.6])
        ]
        assert losses[0] == losses[1]
    first = {temperature: rows[0] for temperature, rows in runs.items()}
    assert first[0.6]["entropy"] < first[1.0]["entropy"] < first[1.3]["entropy"]
    if method == "chord":
        taught = [row["demonstrations/token_prob"] for row in first.values()]
        assert taught == pytest.approx([taught[0]] * 3, rel=1e-5)
