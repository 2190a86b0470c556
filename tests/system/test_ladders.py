"""The ladders in examples: every stage for a step, each from what the one before left."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from moetrain.testing import command

ROOT = Path(__file__).parents[2]
WORDS = "train.steps=1 train.micro_batch=1 observe.tensorboard=false".split()
SAMPLING = "rollout.prompts_per_step=2 rollout.group_size=2 rollout.eval_prompts=2"
LADDERS = {
    "r1": ["1_cold_start", "2_grpo", "3_sft", "4_grpo_all"],
    "instructgpt": ["1_sft", "2_reward", "3_ppo"],
}


LONG = pytest.mark.skipif(
    "LONG" not in os.environ,
    reason="a minute or two that CI spares: its stages have tests of their own; LONG=1 make system",
)


@pytest.mark.parametrize("ladder", ["r1", pytest.param("instructgpt", marks=LONG)])
def test_every_stage_runs(ladder: str, tmp_path: Path) -> None:
    """With a reward that an untrained model earns half of the time, so that there is something to
    choose from.
    """
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    (tmp_path / "even.py").write_text(
        "def even(completions, **columns):\n"
        "    return [float(len(c) % 2 == 0) for c in completions]\n"
    )
    prompts = [{"prompt": f"Say {i} and then {i + 1}.", "answer": "no"} for i in range(40)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(p) + "\n" for p in prompts))
    bench = (ROOT / "examples" / "evals" / "checkable.yaml").read_text()
    small = bench.replace("samples: 8", "samples: 2\nlimit: 2").replace("[1, 8]", "[1, 2]")
    (tmp_path / "bench.yaml").write_text(small)
    environment = os.environ | {
        "RANKS": "--nproc 1",
        "PROMPTS": "prompts.jsonl",
        "SAMPLING": SAMPLING,
        "REWARD": "./even.py:even",
        "BENCH": "bench.yaml",
        "CHOICE": "--cut",  # after one step no answer ends by itself
    }
    script = ["sh", f"examples/{ladder}/run.sh", *WORDS]
    with command.for_scripts(tmp_path / "bin") as moetrain:
        environment |= {"MOETRAIN": str(moetrain)}
        done = subprocess.run(
            script, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
    assert done.returncode == 0, done.stdout + done.stderr
    runs = tmp_path / "runs" / ladder
    for stage in LADDERS[ladder]:
        rows = [json.loads(r) for r in (runs / stage / "ledger.jsonl").read_text().splitlines()]
        assert any(row["step"] == 1 and "loss" in row for row in rows), stage
        assert (runs / stage / "hf" / "model.safetensors").is_file()
    table = (runs / "report.csv").read_text().splitlines()
    assert "checkable pass@1" in table[0] and len(table) >= 1 + len(LADDERS[ladder])
