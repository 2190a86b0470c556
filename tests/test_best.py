"""Which checkpoint is the best one: by a figure that the run measures, the right way round."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
from data_helpers import tokenizer_folder

from moetrain.config.load import recipe_from
from moetrain.data.run_tokenizer import model_vocab, tokenizer_of
from moetrain.engine.checkpoint_folder import Checkpoints
from moetrain.errors import ConfigError
from moetrain.testing import ranks
from moetrain.testing.gloo import Workers

EXAMPLES = Path(__file__).parents[1] / "examples"
ANSWERS = ["accuracy", {"name": "length", "weight": -0.1, "options": {"target": 9}}]


def recipe_with(method: str, best: str, **more: Any) -> Any:
    content: dict[str, Any] = {
        "run_dir": "none",
        "model": {"path": "none"},
        "method": method,
        "data": {"train": "none", "eval": "none"},
        "train": {"steps": 1},
        "checkpoint": {"best": best},
    }
    if method in ("grpo", "ppo"):
        content |= {"rollout": {}, "rewards": ANSWERS}
    return recipe_from(content | more)


@pytest.mark.parametrize(
    ("method", "best", "more"),
    [
        ("sft", "eval_loss", False),
        ("dft", "eval_token_prob", True),
        ("dpo", "eval_rewards/accuracies", True),
        ("kto", "eval_rewards/accuracies", True),
        ("reward", "eval_rewards/margins", True),
        ("simpo", "eval_logps/chosen", True),
        ("grpo", "eval_reward/mean", True),
        ("ppo", "eval_reward/accuracy", True),
        ("ppo", "eval_reward/length", False),  # its weight is negative
    ],
)
def test_a_figure_knows_which_way_it_points(method: str, best: str, more: bool) -> None:
    assert recipe_with(method, best).best_is_more is more


@pytest.mark.parametrize(
    ("method", "best", "more", "says"),
    [
        ("sft", "eval_accuracy", {}, "judged by eval_loss"),
        ("dpo", "eval_reward/mean", {}, "eval_rewards/margins"),
        ("dpo", "eval_rewards/accuracy", {}, "Did you mean 'eval_rewards/accuracies'"),
        ("dpo", "eval_entropy", {}, "judged by"),  # neither more nor less of it is better
        ("reward", "eval_logps/chosen", {}, "judged by"),
        ("grpo", "eval_loss", {}, "judged by eval_reward/mean, eval_reward/accuracy"),
        ("sft", "loss", {}, "judged by eval_loss"),
        ("sft", "eval_loss", {"data": {"train": "none"}}, "needs held-out data"),
        ("grpo", "eval_reward/mean", {"rollout": {"replay": "there"}}, "needs held-out data"),
    ],
)
def test_one_that_is_never_measured_is_refused(
    method: str, best: str, more: dict[str, Any], says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        recipe_with(method, best, **more)


@pytest.mark.parametrize(("more", "best"), [(False, 3), (True, 2)])
def test_the_best_of_several(tmp_path: Path, more: bool, best: int) -> None:
    """Whatever another metric said before, and what is no number is never the best."""
    kept = Checkpoints(tmp_path, keep=1, best="eval_x", more=more)
    names = [kept.folder / f"step_{i:08d}" for i in range(6)]
    for name in names:
        name.mkdir(parents=True)
    other = {"name": names[5].name, "metric": "eval_y", "value": 1e9 if more else -1e9}
    (kept.folder / "best.json").write_text(json.dumps(other))
    for name, value in zip(names, (math.nan, 1.0, 2.5, 0.5, math.nan), strict=False):
        kept._remember(name, value)
    assert kept.best() == names[best]
    # As model.path it has the model's config and tokenizer.
    shutil.copytree(tokenizer_folder(), names[best], dirs_exist_ok=True)
    (names[best] / "moetrain.json").write_text(json.dumps({"hf": {"vocab_size": 400}}))
    given = recipe_with("sft", "eval_loss", model={"path": str(kept.folder / "best")})
    assert tokenizer_of(given) == names[best] and model_vocab(given) == 400


def held_out(run_dir: Path, figure: str) -> dict[int, float]:
    rows = map(json.loads, (run_dir / "ledger.jsonl").read_text().splitlines())
    return {row["step"]: row[figure] for row in rows if figure in row and row["step"] > 0}


RUNS = {
    "dpo": ("dpo_tiny", "eval_rewards/accuracies", "data.seq_len=128 train.eval_packs=2"),
    "grpo": (
        "grpo_tiny",
        "eval_reward/mean",
        "rollout.prompts_per_step=2 rollout.group_size=4 rollout.eval_prompts=4 data.seq_len=256",
    ),
}


@pytest.mark.gloo
@pytest.mark.parametrize("kind", RUNS)
def test_a_run_keeps_its_best_checkpoint(workers: Workers, tmp_path: Path, kind: str) -> None:
    example, figure, settings = RUNS[kind]
    own = f"run_dir={tmp_path} train.steps=5 checkpoint.every=1 checkpoint.keep=1"
    own += f" checkpoint.best={figure} train.eval_every=2 observe.tensorboard=false optim.lr=3e-3"
    given = [*own.split(), *settings.split()]
    assert workers.run(1, ranks.trained, str(EXAMPLES / f"{example}.yaml"), given) == [0]
    found = held_out(tmp_path, figure)
    assert list(found) == [1, 2, 3, 4, 5] and len(set(found.values())) > 1
    best = max(found, key=lambda step: (found[step], -step))
    said = json.loads((tmp_path / "checkpoints" / "best.json").read_text())
    assert said == {"name": f"step_{best:08d}", "metric": figure, "value": found[best]}
    kept = sorted(path.name for path in (tmp_path / "checkpoints").glob("step_*"))
    assert kept == sorted({f"step_{best:08d}", "step_00000005"})
