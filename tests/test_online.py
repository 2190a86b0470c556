"""Methods that learn from rollouts, against formulas written once more, answer by answer."""

import math
import random
import statistics
import time
from dataclasses import replace
from itertools import batched
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from moetrain.config.method import MethodConfig
from moetrain.config.online import GrpoMethod
from moetrain.loops.batch_values import whitened
from moetrain.methods import METHODS, chord
from moetrain.methods import online as parts
from moetrain.methods.advantages import advantages
from moetrain.methods.base import Out
from moetrain.ops.packed import Packed, concat, pack_one, pad_to

DOUBLE = torch.float64
GRPO = GrpoMethod()


class Answer:
    """Numbers of one sampled answer, a list a token."""

    def __init__(self, rng: random.Random, num: int):
        def near(values: list[float], by: float) -> list[float]:
            return [min(-1e-3, value + rng.uniform(-by, by)) for value in values]

        self.old = [-rng.uniform(0.1, 3) for _ in range(num)]
        self.logp = near(self.old, 0.5)
        self.rollout = near(self.old, 0.9)
        self.ref = near(self.old, 0.7)
        self.advantage = rng.uniform(-2, 2)
        self.reward = rng.uniform(-1, 1)
        self.value = [rng.uniform(-1, 1) for _ in range(num)]
        self.old_value = [v + rng.uniform(-0.4, 0.4) for v in self.value]

    def packed(self, prompt: int) -> Packed:
        """Behind `prompt` tokens that are not scored."""

        def row(values: list[float]) -> torch.Tensor:
            return torch.tensor([0.0] * prompt + values, dtype=DOUBLE)

        num = prompt + len(self.old)
        mask = torch.tensor([0.0] * prompt + [1.0] * len(self.old))
        return pack_one(
            torch.zeros(num),
            torch.zeros(num),
            mask,
            extras={
                "role": torch.tensor([1]),
                "advantage": torch.tensor([self.advantage], dtype=DOUBLE),
                "reward": torch.tensor([self.reward], dtype=DOUBLE),
            },
            per_token={
                "logp": row(self.logp),
                "old_logp": row(self.old),
                "rollout_logp": row(self.rollout),
                "ref_logp": row(self.ref),
                "value": row(self.value),
                "old_value": row(self.old_value),
            },
        )


def answers() -> list[Answer]:
    rng = random.Random(4)
    return [Answer(rng, num) for num in (3, 7, 1, 5, 12, 2)]


def computed(settings: dict[str, Any], found: list[Answer], cuts: list[int]) -> float:
    """The loss as the engine makes it, from packs of `cuts` answers each."""
    cfg: Any = TypeAdapter(MethodConfig).validate_python(settings)
    method = METHODS[cfg.name]
    assert method.online is not None
    terms: dict[str, float] = {}
    counts: dict[str, float] = {}
    start = 0
    for size in cuts:
        own = [a.packed(prompt=i % 3) for i, a in enumerate(found[start : start + size])]
        start += size
        pack = concat(own)
        pack = pad_to(pack, pack.num_tokens + 4)
        targets = method.online.targets(pack, cfg)
        pack.per_token.update(targets)
        out = Out(logp=pack.per_token["logp"], value=pack.per_token["value"])
        made, _ = method.loss(out, pack, cfg, {})
        for name, count in method.count(pack, cfg).items():
            terms[name] = terms.get(name, 0.0) + float(made[name])
            counts[name] = counts.get(name, 0.0) + float(count)
    assert start == len(found)
    return sum(terms[name] / counts[name] for name in terms)


# The formulas once more, token by token


def weight_of(a: Answer, i: int, cfg: Any) -> float:
    w = math.exp(a.old[i] - a.rollout[i])
    if cfg.mismatch == "tis":
        return min(w, cfg.mismatch_cap)
    if cfg.mismatch == "mask":
        return w if 1 / cfg.mismatch_cap <= w <= cfg.mismatch_cap else 0.0
    if cfg.mismatch == "sequence":
        whole = math.exp(sum(a.old) - sum(a.rollout))
        return min(whole, cfg.mismatch_cap)
    return 1.0


def surrogate(ratio: float, advantage: float, cfg: Any) -> float:
    bounded = min(max(ratio, 1 - cfg.clip_low), 1 + cfg.clip_high)
    return -min(ratio * advantage, bounded * advantage)


def kl_of(a: Answer, i: int, cfg: Any) -> float:
    log_ratio = a.logp[i] - a.ref[i]
    value = log_ratio**2 / 2
    if cfg.kl_estimator == "k3":
        value = math.exp(-log_ratio) - 1 + log_ratio
    if cfg.use_bias_correction_kl:
        value *= weight_of(a, i, cfg) * math.exp(a.logp[i] - a.old[i])
    return value


def tokens_of(a: Answer, cfg: Any) -> list[float]:
    return [
        weight_of(a, i, cfg) * surrogate(math.exp(a.logp[i] - a.old[i]), a.advantage, cfg)
        + (cfg.beta and cfg.beta * kl_of(a, i, cfg))
        for i in range(len(a.old))
    ]


def by_hand(settings: dict[str, Any], found: list[Answer]) -> float:
    cfg: Any = TypeAdapter(MethodConfig).validate_python(settings)
    num_tokens = sum(len(a.old) for a in found)
    if cfg.name == "grpo":
        return sum(sum(tokens_of(a, cfg)) / len(a.old) for a in found) / len(found)
    if cfg.name == "dr_grpo":
        return sum(sum(tokens_of(a, cfg)) for a in found) / (len(found) * cfg.length)
    if cfg.name == "dapo":
        return sum(sum(tokens_of(a, cfg)) for a in found) / num_tokens
    if cfg.name == "gspo":
        total = 0.0
        for a in found:
            size = len(a.old)
            ratio = math.exp((sum(a.logp) - sum(a.old)) / size)
            weight = sum(weight_of(a, i, cfg) for i in range(size)) / size
            total += weight * surrogate(ratio, a.advantage, cfg)
            total += cfg.beta and cfg.beta * sum(kl_of(a, i, cfg) for i in range(size)) / size
        return total / len(found)
    policy = value = 0.0
    for a in found:
        advantage, returns = estimated(a, cfg)
        for i in range(len(a.old)):
            ratio = math.exp(a.logp[i] - a.old[i])
            policy += weight_of(a, i, cfg) * surrogate(ratio, advantage[i], cfg)
            moved = min(max(a.value[i] - a.old_value[i], -cfg.value_clip), cfg.value_clip)
            near = a.old_value[i] + moved
            value += max((a.value[i] - returns[i]) ** 2, (near - returns[i]) ** 2) / 2
    return policy / num_tokens + cfg.value_weight * value / num_tokens


def estimated(a: Answer, cfg: Any) -> tuple[list[float], list[float]]:
    """GAE as its sum (arXiv 1506.02438, eq. 16), with the KL taken off each token's reward."""
    num = len(a.old)
    rewards = [0.0] * num
    rewards[-1] = a.reward
    for i in range(num):
        rewards[i] -= cfg.beta * (a.old[i] - a.ref[i])
    after = [*a.old_value[1:], 0.0]
    delta = [rewards[i] + cfg.gamma * after[i] - a.old_value[i] for i in range(num)]
    advantage = [
        math.fsum((cfg.gamma * cfg.lam) ** (j - i) * delta[j] for j in range(i, num))
        for i in range(num)
    ]
    return advantage, [x + v for x, v in zip(advantage, a.old_value, strict=True)]


SETTINGS: list[dict[str, Any]] = [
    {"name": "grpo", "mismatch": "none"},
    {"name": "grpo", "mismatch": "tis", "beta": 0.1},
    {"name": "grpo", "mismatch": "mask", "mismatch_cap": 1.5, "beta": 0.1, "kl_estimator": "k2"},
    {"name": "grpo", "mismatch": "tis", "beta": 0.1, "use_bias_correction_kl": False},
    {"name": "gspo", "beta": 0.1, "use_bias_correction_kl": False, "kl_estimator": "k2"},
    {"name": "dr_grpo", "mismatch": "sequence", "length": 9, "beta": 0.2, "kl_estimator": "k2"},
    {"name": "dr_grpo", "mismatch": "none", "length": 7},
    {"name": "grpo", "mismatch": "sequence", "mismatch_cap": 1.1},
    {"name": "dapo", "mismatch": "tis", "mismatch_cap": 1.2},
    {"name": "dapo", "mismatch": "mask", "mismatch_cap": 1.3, "beta": 0.1, "kl_estimator": "k2"},
    {"name": "gspo", "mismatch": "none", "clip_low": 0.01, "clip_high": 0.02, "beta": 0.1},
    {"name": "gspo", "mismatch": "tis"},
    {"name": "gspo", "mismatch": "mask", "mismatch_cap": 1.3, "beta": 0.2, "kl_estimator": "k2"},
    {"name": "gspo", "mismatch": "sequence", "mismatch_cap": 1.5},
    {"name": "dapo", "mismatch": "sequence", "beta": 0.1},
    {"name": "dr_grpo", "mismatch": "mask", "mismatch_cap": 1.3, "length": 11},
    {"name": "dr_grpo", "mismatch": "tis", "mismatch_cap": 1.2, "length": 5, "beta": 0.3},
    {"name": "ppo", "mismatch": "sequence", "gamma": 1.0, "lam": 1.0, "beta": 0.1},
    {"name": "ppo", "mismatch": "none", "gamma": 0.95, "lam": 0.0, "clip_high": 0.4},
    {"name": "ppo", "mismatch": "none", "gamma": 0.9, "lam": 0.8, "beta": 0.3},
    {"name": "ppo", "mismatch": "tis", "value_clip": 0.05},
    {"name": "ppo", "mismatch": "mask", "mismatch_cap": 1.4},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: ", ".join(map(str, s.values())))
def test_the_loss_is_its_formula_wherever_it_is_cut(settings: dict[str, Any]) -> None:
    wanted = by_hand(settings, answers())
    for cuts in ([6], [1, 5], [2, 3, 1], [1] * 6):
        assert computed(settings, answers(), cuts) == pytest.approx(wanted, rel=1e-6, abs=1e-9)


def test_advantages_are_those_of_a_group() -> None:
    rewards = torch.tensor([1.0, 0.0, 0.5, 2.0, 2.0, 7.0])
    group = torch.tensor([0, 0, 0, 1, 1, 2])
    centred = parts.centred(rewards, group, None)
    assert centred.tolist() == pytest.approx([0.5, -0.5, 0.0, 0.0, 0.0, 0.0])
    wanted = torch.tensor([0.5, -0.5, 0.0]) / (rewards[:3].std() + 1e-4)
    assert advantages(rewards, group, GRPO)[:3].tolist() == pytest.approx(wanted.tolist())
    assert parts.without_signal(rewards, group, None).tolist() == [False] * 3 + [True] * 3


@given(st.lists(st.floats(-5, 5), min_size=2, max_size=12), st.integers(1, 4))
def test_advantages_of_a_group_sum_to_nothing(values: list[float], num_groups: int) -> None:
    rewards = torch.tensor(values, dtype=DOUBLE)
    group = torch.arange(len(values)) % num_groups
    found = parts.centred(rewards, group, None)
    for g in range(int(group.max()) + 1):
        assert float(found[group == g].sum()) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("reward", [0.1, 1 / 3, 100.0, 1e6, -7.7e-5])
@pytest.mark.parametrize("num", [2, 7, 8, 33])
def test_equal_rewards_teach_nothing_at_all(reward: float, num: int) -> None:
    """What rounding leaves of them, divided by its own deviation, was 0.07 for rewards of 100."""
    rewards = torch.tensor([reward] * num + [reward, reward + 1e-3])
    group = torch.tensor([0] * num + [1, 1])
    for estimator in ("grpo", "rloo"):
        for scale in ("group", "batch", "none"):
            cfg = GRPO.model_copy(update={"advantage_estimator": estimator, "scale_rewards": scale})
            assert advantages(rewards, group, cfg)[:num].tolist() == [0.0] * num
    flat = parts.without_signal(rewards, group, None).tolist()
    assert flat == [True] * num + [reward == 1e6] * 2  # there fp32 has no such step


def test_a_small_difference_is_a_signal() -> None:
    """Between rewards whose deviation is under any bound that one might set."""
    rewards, group = torch.tensor([1e-7, 3e-7, 2e-7]), torch.zeros(3, dtype=torch.int64)
    assert parts.without_signal(rewards, group, None).tolist() == [False] * 3
    assert parts.centred(rewards, group, None).tolist() == pytest.approx([-1e-7, 1e-7, 0], abs=1e-9)


@given(
    st.lists(st.integers(1, 90), min_size=1, max_size=12),
    st.sampled_from([0.0, 0.5, 0.99, 1.0]),
    st.sampled_from([0.0, 0.9, 1.0]),
    st.integers(0, 99),
)
def test_gae_is_its_sum_over_each_episode(
    lengths: list[int], gamma: float, lam: float, seed: int
) -> None:
    """arXiv 1506.02438, eq. 16, written out: an answer at a time, every other one cut."""
    g = torch.Generator().manual_seed(seed)
    size = sum(lengths)
    rewards, values, beyond = torch.randn(3, size, generator=g, dtype=DOUBLE).unbind()
    ends = torch.zeros(size, dtype=torch.bool)
    ends[torch.tensor(lengths).cumsum(0) - 1] = True
    cut = torch.where((ends.cumsum(0) % 2 == 1) & ends, beyond, 0.0)
    advantages, returns = parts.gae(rewards, values, ends, gamma, lam, cut)
    start = 0
    for length in lengths:
        own = slice(start, start + length)
        after = torch.cat([values[own][1:], cut[own][-1:]])
        delta = (rewards[own] + gamma * after - values[own]).tolist()
        wanted = [
            math.fsum((gamma * lam) ** (j - i) * delta[j] for j in range(i, length))
            for i in range(length)
        ]
        assert advantages[own].tolist() == pytest.approx(wanted, rel=1e-9, abs=1e-9)
        start += length
    assert torch.equal(returns, advantages + values)


@pytest.mark.parametrize("longest", [8, 3_000, 10_000_000])
def test_gae_of_ten_million_tokens_is_quick(longest: int) -> None:
    """In processor seconds, since others may work here, too; a loop over tokens took 300."""
    size = 10_000_000
    g = torch.Generator().manual_seed(1)
    rewards, values = torch.randn(2, size, generator=g).unbind()
    ends = torch.rand(size, generator=g) < 2 / longest
    ends[-1] = True
    took: list[float] = []
    for _ in range(3):
        before = time.process_time()
        advantages, _ = parts.gae(rewards, values, ends, 1.0, 0.95)
        took.append(time.process_time() - before)
    assert min(took) < 2
    running = 0.0
    for i in range(size - 1, size - 3000, -1):
        running = float(rewards[i] - values[i]) + (
            0.0 if ends[i] else float(values[i + 1]) + 0.95 * running
        )
        assert float(advantages[i]) == pytest.approx(running, rel=1e-5, abs=1e-5)


def test_advantages_are_whitened_over_all_tokens_of_all_packs() -> None:
    cfg: Any = TypeAdapter(MethodConfig).validate_python({"name": "ppo"})
    packs = [answer.packed(3) for answer in answers()]
    known = [pack.per_token | parts.broadcast_advantage(pack, cfg) for pack in packs]
    packs = [replace(pack, per_token=own) for pack, own in zip(packs, known, strict=True)]
    tokens = [a.advantage for a in answers() for _ in a.old]
    mean, deviation = statistics.mean(tokens), statistics.stdev(tokens)
    for pack, answer in zip(whitened(packs, None), answers(), strict=True):
        wanted = [0.0] * 3 + [(answer.advantage - mean) / deviation] * len(answer.old)
        assert pack.per_token["advantage"].tolist() == pytest.approx(wanted, abs=1e-6)


def test_long_answers_are_shaped_down() -> None:
    lengths = torch.tensor([10.0, 80.0, 90.0, 100.0, 200.0])
    assert parts.overlong(lengths, 100, 20).tolist() == pytest.approx([0, 0, -0.5, -1, -1])


GRADED = [name for name, own in METHODS.items() if own.online and name != "gkd"]


@pytest.mark.parametrize("name", GRADED)
def test_every_method_with_rewards_has_them(name: str) -> None:
    """The penalty of long answers, groups of equal rewards sampled anew, cut answers left out."""
    given: dict[str, Any] = {"name": name, "max_length": 100, "soft_length": 20}
    given |= {"reward_weight": 1.0} if name == "on_policy_distill" else {}
    given |= {"truncated": "mask"} | ({} if name == "ppo" else {"dynamic_sampling": True})
    cfg: Any = TypeAdapter(MethodConfig).validate_python(given)
    cfg = cfg.within(200)
    online = METHODS[name].online
    assert online is not None and online.shape is not None and online.truncated(cfg) == "mask"
    rewards, group = torch.tensor([1.0, 1.0, 1.0, 0.5]), torch.tensor([0, 0, 1, 1])
    lengths, cut = torch.tensor([10.0, 90.0, 150.0, 95.0]), torch.zeros(4).bool()
    assert online.shape(rewards, lengths, cut, cfg).tolist() == [1.0, 0.5, 0.0, -0.25]
    if name == "ppo":
        assert cfg.rounds == 1
        return
    assert online.drops is not None and cfg.rounds == 8
    assert online.drops(rewards, group, cfg).tolist() == [True, True, False, False]
    plain = cfg.model_copy(update={"dynamic_sampling": False})
    assert not online.drops(rewards, group, plain).any() and plain.rounds == 1


@given(st.floats(-4, -0.01), st.floats(-4, -0.01))
def test_k2_and_k3_are_never_negative(logp: float, ref: float) -> None:
    a, b = torch.tensor([logp], dtype=DOUBLE), torch.tensor([ref], dtype=DOUBLE)
    assert parts.divergence(a, b, "k2") >= 0 and parts.divergence(a, b, "k3") >= -1e-12
    assert parts.divergence(a, b, "k1") == a - b


def shown(num: int, prompt: int, seed: int) -> Packed:
    """A demonstration of `num` tokens behind a prompt, which nobody sampled."""
    rng = random.Random(seed)
    logp = [0.0] * prompt + [-rng.uniform(0.01, 3) for _ in range(num)]
    own = Answer(rng, num).packed(prompt)
    per_token = {name: torch.zeros_like(value) for name, value in own.per_token.items()}
    per_token["logp"] = torch.tensor(logp, dtype=DOUBLE)
    extras = {name: torch.zeros_like(value) for name, value in own.extras.items()}
    return replace(own, per_token=per_token, extras=extras | {"role": torch.tensor([2])})


def test_what_the_ledger_says_is_its_formula() -> None:
    cfg: Any = TypeAdapter(MethodConfig).validate_python(
        {"name": "grpo", "beta": 0.1, "mismatch_cap": 1.4}
    )
    found = answers()
    pack = concat([a.packed(2) for a in found])
    method = METHODS["grpo"]
    assert method.online is not None
    pack.per_token.update(method.online.targets(pack, cfg))
    _, metrics = method.loss(Out(logp=pack.per_token["logp"]), pack, cfg, {})
    got = {name: float(total) / float(num) for name, (total, num) in metrics.items()}
    tokens = [(a, i) for a in found for i in range(len(a.old))]

    def mean(of: Any) -> float:
        return sum(of(a, i) for a, i in tokens) / len(tokens)

    def k3(log_ratio: float) -> float:
        return math.exp(-log_ratio) - 1 + log_ratio

    def ratio(a: Answer, i: int) -> float:
        return math.exp(a.logp[i] - a.old[i])

    wanted = {
        "kl": sum(k3(a.logp[i] - a.ref[i]) for a, i in tokens) / len(found),
        "mismatch/kl": mean(lambda a, i: k3(a.rollout[i] - a.old[i])),
        "mismatch/abs": mean(lambda a, i: abs(a.rollout[i] - a.old[i])),
        "mismatch/weight": mean(lambda a, i: min(math.exp(a.old[i] - a.rollout[i]), 1.4)),
        "clip/low": mean(lambda a, i: ratio(a, i) < 0.8 and a.advantage < 0),
        "clip/high": mean(lambda a, i: ratio(a, i) > 1.2 and a.advantage > 0),
        "ratio": mean(ratio),
    }
    assert got == pytest.approx(wanted, rel=1e-6) and min(wanted.values()) > 0


@pytest.mark.parametrize("mismatch", ["tis", "mask", "sequence", "none"])
@pytest.mark.parametrize("phi", [True, False])
def test_chord_is_grpo_and_weighted_fine_tuning(phi: bool, mismatch: str) -> None:
    settings = {"name": "chord", "mismatch": mismatch, "beta": 0.1, "phi": phi}
    cfg: Any = TypeAdapter(MethodConfig).validate_python(settings)
    weight = 0.3
    found = answers()
    demos = [shown(num, i % 3, i) for i, num in enumerate((4, 9, 1))]

    grpo = sum(sum(tokens_of(a, cfg)) / len(a.old) for a in found) / len(found)
    tokens = [x for d in demos for x in d.per_token["logp"][d.loss_mask > 0].tolist()]
    p = [math.exp(x) for x in tokens]
    scale = [q * (1 - q) if phi else 1.0 for q in p]
    sft = -sum(w * x for w, x in zip(scale, tokens, strict=True)) / len(tokens)
    wanted = (1 - weight) * grpo + weight * sft

    units = [with_share(a.packed(i % 3), 1 - weight) for i, a in enumerate(found)]
    units += [with_share(d, weight) for d in demos]
    for order in (range(9), [8, 0, 1, 7, 2, 3, 6, 4, 5]):
        for size in (9, 4, 1):
            packs = [concat([units[i] for i in own]) for own in batched(order, size)]
            assert total(cfg, packs) == pytest.approx(wanted, rel=1e-6)


def with_share(pack: Packed, share: float) -> Packed:
    extras = pack.extras | {"share": torch.tensor([share], dtype=DOUBLE)}
    return replace(pack, extras=extras)


def total(cfg: Any, packs: list[Packed]) -> float:
    """The loss of a batch of these packs."""
    method = METHODS[cfg.name]
    assert method.online is not None
    terms: dict[str, float] = {}
    counts: dict[str, float] = {}
    for pack in packs:
        pack = pad_to(pack, pack.num_tokens + 4)
        pack.per_token.update(method.online.targets(pack, cfg))
        made, _ = method.loss(Out(logp=pack.per_token["logp"]), pack, cfg, {})
        for name, count in method.count(pack, cfg).items():
            terms[name] = terms.get(name, 0.0) + float(made[name])
            counts[name] = counts.get(name, 0.0) + float(count)
    return sum(terms[name] / counts[name] for name in terms)


def test_mu_rises_and_falls_along_a_cosine() -> None:
    cfg: Any = TypeAdapter(MethodConfig).validate_python(
        {"name": "chord", "mu_peak": 0.9, "mu_valley": 0.1, "mu_warmup": 4, "mu_decay": 10}
    )
    found = [chord.mu(step, cfg) for step in range(1, 31)]
    assert found[:5] == pytest.approx([0, 0.225, 0.45, 0.675, 0.9])
    assert found[9] == pytest.approx(0.5) and found[14:] == pytest.approx([0.1] * 16)
    assert found[4:15] == sorted(found[4:15], reverse=True)
    for step in (1, 7, 40):
        assert sum(chord.shares(step, cfg)) == pytest.approx(1)
