"""Answers that rollout.max_tokens cut, lengths that follow from it, and batches that are small."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from pydantic import TypeAdapter

from moetrain.config.load import recipe_from
from moetrain.config.method import MethodConfig
from moetrain.data.groups import GradedAnswer, Group, pack_groups
from moetrain.data.samples import Prompt, Sample
from moetrain.data.trajectories import Trajectory
from moetrain.errors import ConfigError, DataError
from moetrain.loops.learn import _without_cut, summary
from moetrain.loops.outline import Outline, outline_of
from moetrain.loops.store import Batch
from moetrain.methods import METHODS
from moetrain.ops.packed import Packed, concat
from moetrain.testing import ranks
from moetrain.testing.gloo import Workers

RECIPE = Path(__file__).parents[1] / "examples" / "grpo_tiny.yaml"


def group(*finishes: Literal["stop", "length"]) -> Group:
    """A prompt of three tokens, and an answer of four for each of `finishes`."""
    prompt = Prompt("p", (5, 6, 7), {})
    answers = [
        GradedAnswer(
            Trajectory.of(
                Sample("p", i, (10 + i, 20, 21, 22), (-1.0, -0.5, -2.0, -0.1), "", how, 0)
            ),
            3.0 + i,
        )
        for i, how in enumerate(finishes)
    ]
    return Group(prompt, tuple(answers))


def given(step: int, *groups: Group) -> Outline:
    """A batch as the first rank has it."""
    batch = Batch(step, groups, 9)
    return replace(outline_of(batch), batch=batch)


def prepared(how: str, found: Group, **more: Any) -> tuple[Packed, Any]:
    """(a pack with its advantages and returns, the method's section)."""
    cfg: Any = TypeAdapter(MethodConfig).validate_python({"name": "ppo", "truncated": how, **more})
    online = METHODS["ppo"].online
    assert online is not None and online.shape is not None
    rewards = torch.tensor([answer.reward for answer in found.answers])
    cut = torch.tensor([answer.trajectory.is_cut for answer in found.answers])
    rewards = online.shape(rewards, torch.full_like(rewards, 4.0), cut, cfg)
    packs = pack_groups(
        [found], {"reward": rewards}, seq_len=99, min_packs=1, beyond=how == "bootstrap"
    )
    pack = concat(packs)
    pack.per_token["old_logp"] = pack.per_token["rollout_logp"]
    pack.per_token["old_value"] = torch.arange(pack.num_tokens) / 10
    pack.per_token.update(online.targets(pack, cfg))
    return pack, cfg


def test_a_cut_answer_takes_its_value_from_what_would_have_followed() -> None:
    found = group("stop", "length")
    pack, cfg = prepared("bootstrap", found, gamma=0.9, lam=0.8)
    sizes = pack.cu_seqlens.diff().tolist()
    assert sizes == [
        2,
        4,
        5,
    ]  # the prompt; an answer that ended; one that was cut, and what follows
    assert pack.tokens[6:].tolist() == [7, 11, 20, 21, 22]
    assert pack.labels[6:].tolist() == [11, 20, 21, 22, 0]
    assert pack.loss_mask[6:].tolist() == [1, 1, 1, 1, 0]
    values = pack.per_token["old_value"].tolist()
    for start, reward, beyond in ((2, 3.0, 0.0), (6, 0.0, values[10])):
        own = values[start : start + 4]
        after = [*own[1:], beyond]
        delta = [cfg.gamma * after[i] - own[i] for i in range(4)]
        delta[3] += reward
        wanted = [sum(0.72 ** (j - i) * delta[j] for j in range(i, 4)) for i in range(4)]
        got = pack.per_token["advantage"][start : start + 4].tolist()
        assert got == pytest.approx(wanted, rel=1e-5)
        back = pack.per_token["return"][start : start + 4].tolist()
        assert back == pytest.approx([a + v for a, v in zip(wanted, own, strict=True)], rel=1e-5)
    assert pack.per_token["advantage"][10] == 0 and pack.per_token["return"][10] == 0


def test_otherwise_it_ends_with_its_grade() -> None:
    pack, _ = prepared("reward", group("stop", "length"))
    assert pack.cu_seqlens.diff().tolist() == [2, 4, 4]
    last = pack.per_token["return"][[5, 9]]
    assert last.tolist() == pytest.approx([3.0, 4.0])


def test_or_is_left_out() -> None:
    batch = given(3, group("length", "stop"), group("length", "length"), group("stop"))
    values = {"reward": torch.arange(5.0)}
    groups, kept = _without_cut(batch, values)
    assert [[a.trajectory.index for a in own.answers] for own in groups] == [[1], [0]]
    assert kept["reward"].tolist() == [1.0, 4.0]
    with pytest.raises(DataError, match=r"Step 4: rollout.max_tokens cut every answer"):
        _without_cut(given(4, group("length")), {"reward": torch.zeros(1)})


def test_fewer_answers_than_packs() -> None:
    packs = pack_groups([group("stop")], {"reward": torch.ones(1)}, seq_len=99, min_packs=3)
    assert [pack.num_tokens for pack in packs] == [6, 1, 1]
    assert [float(pack.loss_mask.sum()) for pack in packs] == [4, 0, 0]
    assert not any(pack.valid.any() for pack in packs[1:])
    concat(packs)


@pytest.mark.gloo
@pytest.mark.parametrize("how", ["bootstrap", "mask"])
def test_a_run_with_cut_answers(workers: Workers, tmp_path: Path, how: str) -> None:
    settings = (
        f"run_dir={tmp_path} train.steps=2 data.eval=[] data.seq_len=256 checkpoint.every=null"
        " observe.tensorboard=false rollout.prompts_per_step=4 rollout.group_size=8"
    ).split()
    # A model that knows nothing ends one answer in 2,048 tokens a token: it is told to by chance.
    own = [f"method={{name: ppo, truncated: {how}, beta: 0.05}}", "rollout.max_tokens=128"]
    assert workers.run(1, ranks.trained, str(RECIPE), [*settings, *own]) == [0]
    rows = [json.loads(line) for line in (tmp_path / "ledger.jsonl").read_text().splitlines()]
    assert len(rows) == 2
    for row in rows:
        assert 0 < row["length/truncated"] < 1 and row["push/logprob_gap"] < 1e-3


# What a recipe takes from its rollouts


def recipe_with(method: Any, **more: Any) -> Any:
    content = {
        "run_dir": "none",
        "model": {"path": "none"},
        "method": method,
        "data": {"train": "none", "demonstrations": ["x"] if method == "chord" else []},
        "train": {"steps": 1},
        "rollout": {},
        "rewards": ["accuracy"],
    }
    return recipe_from(content | more)


def test_lengths_follow_the_rollouts() -> None:
    rollout = {"max_tokens": 2000}
    assert recipe_with("dr_grpo", rollout=rollout).method.length == 2000
    assert recipe_with({"name": "dr_grpo", "length": 9}, rollout=rollout).method.length == 9
    dapo = recipe_with("dapo", rollout=rollout).method
    assert (dapo.max_length, dapo.soft_length) == (2000, 400)
    dapo = recipe_with({"name": "dapo", "max_length": 1000}, rollout=rollout).method
    assert (dapo.max_length, dapo.soft_length) == (1000, 200)
    online = METHODS["dapo"].online
    assert online is not None and online.shape is not None
    lengths = torch.tensor([800.0, 900.0, 2000.0])
    flat = torch.zeros(3)
    assert online.shape(flat, lengths, flat, dapo).tolist() == pytest.approx([0, -0.5, -1])
    off = recipe_with({"name": "dapo", "soft_length": 0}, rollout=rollout).method
    assert online.shape(flat, lengths, flat, off).tolist() == [0, 0, 0]
    again = recipe_from(recipe_with("dapo", rollout=rollout).model_dump(mode="json"))
    assert again.method == recipe_with("dapo", rollout=rollout).method


@pytest.mark.parametrize("method", ["grpo", "dr_grpo", "dapo", "gspo", "chord", "rloo", "cispo"])
def test_a_group_of_one_teaches_nothing(method: str) -> None:
    with pytest.raises(ConfigError, match=r"group_size=1: .* one alone teaches nothing"):
        recipe_with(method, rollout={"group_size": 1})
    for other in ("ppo", "reinforce_pp"):
        assert recipe_with(other, rollout={"group_size": 1}).rollout.group_size == 1


def test_an_answer_alone_has_no_group_to_lack_signal() -> None:
    """All of them have then, and every run was warned of it."""
    alone, pair = group("stop"), group("stop", "stop")
    assert "groups/no_signal" not in summary(given(1, alone, alone), 0)
    assert summary(given(1, alone, pair), 0)["groups/no_signal"] == 0


@pytest.mark.parametrize("method", ["grpo", "ppo"])
def test_steps_without_a_group_and_rewards_without_a_weight(method: str) -> None:
    """A schedule would count optimizer steps that do not come; every answer would be worth 0."""
    few = {"rollout": {"prompts_per_step": 4}}
    assert recipe_with({"name": method, "inner_steps": 4}, **few)
    with pytest.raises(ConfigError, match=r"inner_steps=5 is more than rollout.prompts_per_step=4"):
        recipe_with({"name": method, "inner_steps": 5}, **few)
    nothing = {"name": "accuracy", "weight": 0}
    assert recipe_with(method, rewards=[nothing, "format"])
    with pytest.raises(ConfigError, match="every weight is 0"):
        recipe_with(method, rewards=[nothing])


@pytest.mark.parametrize(
    ("method", "says"),
    [
        ({"name": "grpo", "kl_budget": 3}, "kl_budget does nothing without method.beta"),
        ({"name": "grpo", "kl_estimator": "k2"}, "kl_estimator does nothing without method.beta"),
        ({"name": "gspo", "use_bias_correction_kl": False}, "does nothing without method.beta"),
        ({"name": "ppo", "mismatch": "none", "mismatch_cap": 3}, "without method.mismatch"),
        ({"name": "grpo", "mismatch": "none", "mismatch_floor": 0.5}, "without method.mismatch"),
        ({"name": "grpo", "ref_model_sync_steps": 5}, "does nothing without method.beta"),
        ({"name": "grpo", "beta": 1, "ref_model_mixup_alpha": 0.5}, "ref_model_sync_steps"),
        ({"name": "grpo", "kl_in_reward": True}, "kl_in_reward does nothing without method.beta"),
        ({"name": "rloo", "kl_estimator": "k2"}, "does nothing without method.kl_in_reward=false"),
        ({"name": "grpo", "delta": 1.1}, "below 1 \\+ method.clip_high=1.2"),
        ({"name": "reinforce_pp", "scale_rewards": "group"}, "scaled over the batch"),
        ({"name": "reinforce_pp_baseline", "scale_rewards": "none"}, "is grpo then"),
        ({"name": "cispo", "clip_low": 0.5, "clip_high": -0.6}, "is not above"),
        ({"name": "dapo", "max_length": 100, "soft_length": 200}, "more than method.max_length"),
        ({"name": "dapo", "max_length": 9999}, "rollout.max_tokens=512 lets none be so long"),
    ],
)
def test_what_does_nothing_is_refused(method: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        recipe_with(method)


# Rounds of sampling


@pytest.mark.gloo
def test_groups_of_equal_rewards_are_sampled_anew(workers: Workers, tmp_path: Path) -> None:
    """Where there are no others the step takes them after method.max_rounds."""
    own = tmp_path / "same.py"
    own.write_text("def same(completions, **_): return [1.0] * len(completions)")
    settings = (
        f"run_dir={tmp_path / 'run'} data.eval=[] data.seq_len=256 rewards=[{own}:same]"
        " train.steps=1 checkpoint.every=null observe.tensorboard=false"
        " rollout.prompts_per_step=2 rollout.group_size=2 rollout.max_tokens=8"
    ).split()
    settings.append("method={name: gspo, dynamic_sampling: true, max_rounds: 3}")
    assert workers.run(1, ranks.trained, str(RECIPE), settings) == [0]
    path = tmp_path / "run" / "rollouts" / "00000001.jsonl"
    head, *groups = map(json.loads, path.read_text().splitlines())
    assert (head["cursor"], head["counts"]["dropped/no_signal"], len(groups)) == (6, 6, 2)
    with pytest.raises(ConfigError, match="nobody knows how many steps"):
        recipe_with({"name": "grpo", "dynamic_sampling": True}, train={"epochs": 1})
    with pytest.raises(ConfigError, match="learns from groups of equal rewards"):
        recipe_with({"name": "reinforce_pp", "dynamic_sampling": True})
    with pytest.raises(ConfigError, match=r"max_length does nothing without method\.soft_length"):
        recipe_with({"name": "grpo", "max_length": 5})


# Epochs


@pytest.mark.gloo
@pytest.mark.parametrize(("world", "inner", "epochs"), [(1, 2, 1), (2, 1, 1), (1, 1, 1.4)])
def test_an_epoch_answers_each_prompt_once(
    workers: Workers, tmp_path: Path, world: int, inner: int, epochs: float
) -> None:
    """Five prompts, two a step: the last batch is smaller, with fewer answers than ranks' packs or
    optimizer steps.
    """
    data = tmp_path / "prompts.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"Say {i}."}) + "\n" for i in range(5)))
    settings = (
        f"run_dir={tmp_path / 'run'} data.train={data} data.eval=[] data.seq_len=256"
        f" train.steps=null train.epochs={epochs} checkpoint.every=null observe.tensorboard=false"
        f" rollout.prompts_per_step=2 rollout.group_size=2 rollout.max_tokens=8"
        f" method.inner_steps={inner} method.beta=0.1"
    ).split()
    assert workers.run(world, ranks.trained, str(RECIPE), settings) == [0] * world
    asked: Counter[str] = Counter()
    for path in sorted((tmp_path / "run" / "rollouts").glob("*.jsonl")):
        _, *groups = map(json.loads, path.read_text().splitlines())
        asked.update(row["prompt"]["id"] for row in groups)
    assert sum(asked.values()) == int(5 * epochs) and set(asked.values()) == {1}
    with pytest.raises(ConfigError, match="nobody knows how many steps"):
        recipe_with("dapo", train={"epochs": 1})
    recipe_with({"name": "dapo", "dynamic_sampling": False}, train={"epochs": 1})
