"""Numbers that PPO's batches move: rewards by the moments of all so far, a KL's weight steered to a
target (Ziegler et al. 2019), against formulas over lists; and a run that goes on with them.
"""

import json
import random
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from moetrain.config.method import MethodConfig
from moetrain.loops.batch_values import mean_kl
from moetrain.methods import METHODS
from moetrain.methods.base import Running
from moetrain.ops.packed import concat, pack_one
from moetrain.testing import ranks
from moetrain.testing.gloo import Workers

RECIPE = Path(__file__).parents[1] / "examples" / "grpo_tiny.yaml"


def ppo(**settings: Any) -> Any:
    return TypeAdapter(MethodConfig).validate_python({"name": "ppo", **settings})


def running() -> Running:
    online = METHODS["ppo"].online
    assert online is not None and online.running is not None
    return online.running


@pytest.mark.parametrize("kind", ["scale", "standardise"])
@pytest.mark.parametrize("truncated", ["reward", "bootstrap"])
def test_rewards_by_the_moments_of_all_so_far(kind: str, truncated: str) -> None:
    """Of this batch too; then cut, then the penalty of answers without an end. An answer whose
    grade is not taken is in no moment.
    """
    penalty = 0.25 if truncated == "reward" else 0.0
    cfg = ppo(reward_norm=kind, reward_clip=1.5, truncated=truncated, missing_eos_penalty=penalty)
    online, rng = METHODS["ppo"].online, random.Random(3)
    assert online is not None and online.shape is not None
    carried: dict[str, float] = {}
    taken: list[float] = []
    for size in (1, 5, 3, 8):
        rewards = torch.tensor([rng.gauss(4, 3) for _ in range(size)], dtype=torch.float64)
        cut = torch.tensor([rng.random() < 0.4 for _ in range(size)])
        scaled, carried = running().rescale(rewards, cut, carried, cfg)
        found = online.shape(scaled, torch.ones(size), cut, cfg)
        carried = json.loads(json.dumps(carried))  # as a checkpoint has it
        graded = [r for r, c in zip(rewards.tolist(), cut.tolist(), strict=True)
                  if truncated == "reward" or not c]  # fmt: skip
        taken += graded
        mean = statistics.fmean(taken) if taken and kind == "standardise" else 0.0
        spread = statistics.stdev(taken) if len(taken) > 1 else 1.0
        for reward, is_cut, got in zip(rewards.tolist(), cut, found.tolist(), strict=True):
            wanted = min(max((reward - mean) / spread, -1.5), 1.5)
            if is_cut:
                wanted = wanted - penalty if truncated == "reward" else 0.0
            assert got == pytest.approx(wanted, rel=1e-6, abs=1e-9)


def test_equal_rewards_stay_finite() -> None:
    for kind, wanted in (("scale", 2.0), ("standardise", 0.0)):
        found, _ = running().rescale(torch.full((3,), 2.0), torch.zeros(3).bool(), {},
                                     ppo(reward_norm=kind))  # fmt: skip
        assert found.tolist() == [wanted] * 3


def test_the_weight_of_the_kl_goes_to_its_target() -> None:
    cfg = ppo(beta=0.1, kl_target=6.0, kl_horizon=1000)
    carried: dict[str, float] = {}
    wanted = 0.1
    for kl, num in ((0.0, 64), (6.3, 64), (100.0, 32), (5.0, 64)):
        assert running().adapted(cfg, carried).beta == pytest.approx(wanted, rel=1e-12)
        carried = running().steer(carried, kl, num, cfg)
        wanted *= 1 + max(-0.2, min(0.2, kl / 6.0 - 1)) * num / 1000
    assert running().adapted(cfg, carried).beta == pytest.approx(wanted, rel=1e-12)
    plain = ppo(beta=0.1)
    assert running().adapted(plain, running().steer({}, 9.0, 64, plain)).beta == 0.1


def test_the_kl_is_of_answers_however_they_are_packed() -> None:
    rng = random.Random(1)
    packs, total = [], 0.0
    for size in (3, 1, 6):
        old, ref = ([0.0, *(-rng.random() for _ in range(size))] for _ in range(2))
        total += sum(a - b for a, b in zip(old, ref, strict=True))
        mask = torch.tensor([0.0] + [1.0] * size)
        per_token = {"old_logp": torch.tensor(old), "ref_logp": torch.tensor(ref)}
        extras = {"role": torch.tensor([1])}
        packs.append(pack_one(mask, mask, mask, extras=extras, per_token=per_token))
    for cut in (packs, [concat(packs)], [concat(packs[:2]), packs[2]]):
        kl, num = mean_kl(cut, None)
        assert (kl, num) == (pytest.approx(total / 3, rel=1e-6), 3)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"kl_target": 3.0}, "without method.beta"),
        ({"beta": 0.1, "kl_horizon": 3}, "without method.kl_target"),
        ({"missing_eos_penalty": 1.0, "truncated": "mask"}, "truncated=mask"),
        ({"missing_eos_penalty": 1.0, "truncated": "bootstrap"}, "truncated=bootstrap"),
    ],
)
def test_what_does_nothing_is_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        ppo(**settings)


@pytest.mark.gloo
def test_a_run_goes_on_with_what_moved(workers: Workers, tmp_path: Path) -> None:
    """A step and, from its checkpoint, a second are the two of a run without a stop."""
    method = "method={name: ppo, beta: 0.05, kl_target: 0.5, kl_horizon: 16, reward_clip: 3.0"
    common = [
        f"{method}, reward_norm: standardise, missing_eos_penalty: 0.1}}", "data.eval=[]",
        "data.seq_len=256", "checkpoint.every=null", "observe.tensorboard=false",
        "rollout.prompts_per_step=2", "rollout.group_size=2", "rollout.max_tokens=8",
        "optim.schedule=constant",
    ]  # fmt: skip

    def rows(name: str, steps: int) -> list[dict[str, Any]]:
        own = [*common, f"run_dir={tmp_path / name}", f"train.steps={steps}"]
        assert workers.run(1, ranks.trained, str(RECIPE), own) == [0]
        found = map(json.loads, (tmp_path / name / "ledger.jsonl").read_text().splitlines())
        names = ("loss", "value/loss", "grad_norm", "running/beta", "running/reward_mean")
        return [{key: row[key] for key in names} for row in found]

    whole = rows("whole", 2)
    rows("parted", 1)
    assert rows("parted", 2) == whole
    # The policy is its own reference at first: the KL is 0, and below its target.
    assert whole[0]["running/beta"] == pytest.approx(0.05 * (1 - 0.2 * 4 / 16), rel=1e-6)
    assert whole[1]["running/beta"] < whole[0]["running/beta"]
