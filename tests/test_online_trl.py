"""Methods that learn from rollouts against TRL (recorded by tools/bench/trl_online_fixtures.py) and
against formulas that TRL has not: advantages, loss and gradient, however the batch is cut.
"""

import json
import math
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter
from torch import Tensor

from moetrain.config.method import MethodConfig
from moetrain.engine.snapshot import mixed
from moetrain.loops.batch_values import with_targets
from moetrain.methods import METHODS
from moetrain.methods.base import Out
from moetrain.ops.packed import Packed, concat, pack_one, pad_to
from moetrain.ops.quantile import quantile

DOUBLE = torch.float64
RECORDED = json.loads((Path(__file__).parent / "fixtures" / "trl_online.json").read_text())
BATCH: dict[str, Any] = RECORDED["batch"]
NUM, GROUP = len(BATCH["reward"]), RECORDED["group"]
TOKENS = ("old_logp", "logp", "rollout_logp", "ref_logp", "entropy")
CUTS = ([6], [1, 5], [2, 3, 1], [1] * 6)


def answer(i: int) -> Packed:
    """Answer `i` behind a prompt, with its numbers."""
    prompt = 1 + i % 3

    def row(values: list[float]) -> Tensor:
        return torch.tensor([0.0] * prompt + values, dtype=DOUBLE)

    t = prompt + len(BATCH["logp"][i])
    return pack_one(
        torch.zeros(t),
        torch.zeros(t),
        row([1.0] * (t - prompt)).float(),
        extras={
            "role": torch.tensor([1]),
            "place": torch.tensor([float(i)]),
            "share": torch.tensor([1.0], dtype=DOUBLE),
        },
        per_token={name: row(BATCH[name][i]) for name in TOKENS},
    )


def parts(settings: dict[str, Any], cuts: list[int]) -> tuple[Any, list[Packed]]:
    """The method's section, and the packs of a step of so many answers each."""
    cfg: Any = TypeAdapter(MethodConfig).validate_python(settings)
    cfg = cfg.within(16)
    online = METHODS[cfg.name].online
    assert online is not None
    rewards = torch.tensor(BATCH["reward"], dtype=DOUBLE)
    group = torch.arange(NUM) // GROUP
    advantages = online.advantages(rewards, group, cfg)
    packs: list[Packed] = []
    order = iter(range(NUM))
    for size in cuts:
        pack = concat([answer(next(order)) for _ in range(size)])
        place = pack.extras["place"].long()
        pack.extras.update(advantage=advantages[place], reward=rewards[place])
        pack = pad_to(pack, pack.num_tokens + 3)
        pack.per_token["old_entropy"] = pack.per_token["entropy"].clone()
        packs.append(pack)
    return cfg, with_targets(packs, online, cfg, rewards, group, None)


def learned(settings: dict[str, Any], cuts: list[int]) -> dict[str, Any]:
    """{loss, advantages of the answers' tokens, gradients of log-probs and entropies of them}."""
    cfg, packs = parts(settings, cuts)
    method = METHODS[cfg.name]
    counts: dict[str, float] = {}
    sums: dict[str, Any] = {}
    for pack in packs:
        for name in ("logp", "entropy"):
            pack.per_token[name].requires_grad_()
        out = Out(pack.per_token["logp"], pack.per_token["entropy"])
        for name, term in method.loss(out, pack, cfg, {})[0].items():
            sums[name] = sums.get(name, 0) + term
        for name, count in method.count(pack, cfg).items():
            counts[name] = counts.get(name, 0.0) + float(count)
    assert sums.keys() == counts.keys()
    loss = torch.stack([sums[name] / counts[name] for name in sums]).sum()
    loss.backward()

    def found(of: Any) -> list[float]:
        return [x for pack in packs for x in of(pack)[pack.loss_mask > 0].tolist()]

    def grad(name: str) -> list[float]:
        return found(lambda p: torch.zeros(p.num_tokens) if p.per_token[name].grad is None
                     else p.per_token[name].grad)  # fmt: skip

    return {
        "loss": loss.item(),
        "advantages": found(lambda pack: pack.per_token["advantage"]),
        "of_logp": grad("logp"),
        "of_entropy": grad("entropy"),
    }


def name_of(case: dict[str, Any]) -> str:
    return ", ".join(str(v) for v in case["method"].values())


def flat(of_answers: list[list[float]]) -> list[float]:
    return [x for row in of_answers for x in row]


def check(settings: dict[str, Any], wanted: dict[str, Any]) -> None:
    for cuts in CUTS:
        found = learned(settings, cuts)
        for name, value in wanted.items():
            assert found[name] == pytest.approx(value, rel=1e-6, abs=1e-7), (name, cuts)


@pytest.mark.parametrize("case", RECORDED["cases"], ids=name_of)
def test_loss_and_gradient_are_trls(case: dict[str, Any]) -> None:
    lengths = [len(row) for row in BATCH["logp"]]
    each = [[a] * n for a, n in zip(case["advantages"], lengths, strict=True)]
    nothing = [[0.0] * n for n in lengths]
    wanted = {"loss": case["loss"], "advantages": flat(each), "of_logp": flat(case["of_logp"])}
    check(case["method"], wanted | {"of_entropy": flat(case["of_entropy"] or nothing)})


# REINFORCE++ (arXiv 2501.03262), which TRL has not


def reinforce(beta: float, *, baseline: bool, scaled: bool) -> dict[str, Any]:
    """Its advantages and its loss, written token by token; the KL, where there is a baseline, is
    k2 in the loss and has the weight of the ratio, which is no part of its gradient.
    """
    rewards: list[float] = BATCH["reward"]
    raw: list[list[float]] = []
    for i in range(NUM):
        k1 = [a - b for a, b in zip(BATCH["old_logp"][i], BATCH["ref_logp"][i], strict=True)]
        group = rewards[i // GROUP * GROUP : i // GROUP * GROUP + GROUP]
        reward = rewards[i] - (sum(group) / GROUP if baseline else 0.0)
        off = 0.0 if baseline else beta
        raw.append([reward - off * math.fsum(k1[t:]) for t in range(len(k1))])
    tokens = flat(raw)
    mean, deviation = statistics.mean(tokens), statistics.stdev(tokens)
    advantages = [[(x - mean) / deviation for x in row] if scaled else row for row in raw]
    total = 0.0
    for i in range(NUM):
        for t, advantage in enumerate(advantages[i]):
            old, now = BATCH["old_logp"][i][t], BATCH["logp"][i][t]
            ratio = math.exp(now - old)
            bounded = min(max(ratio, 0.8), 1.2)
            weight = min(math.exp(old - BATCH["rollout_logp"][i][t]), 2.0)
            total -= weight * min(ratio * advantage, bounded * advantage)
            if baseline:
                total += beta * weight * ratio * (now - BATCH["ref_logp"][i][t]) ** 2 / 2
    return {"loss": total / len(tokens), "advantages": flat(advantages)}


@pytest.mark.parametrize("beta", [0.0, 0.3])
@pytest.mark.parametrize(
    ("name", "scale"),
    [("reinforce_pp", "batch"), ("reinforce_pp", "none"), ("reinforce_pp_baseline", "batch")],
)
def test_reinforce_plus_plus_is_its_formula(name: str, scale: str, beta: float) -> None:
    wanted = reinforce(beta, baseline="baseline" in name, scaled=scale == "batch")
    check({"name": name, "scale_rewards": scale, "beta": beta}, wanted)


def test_delta_is_verls_dual_clip() -> None:
    """verl's compute_policy_loss with clip_ratio_c: -A c bounds the loss where A < 0."""
    low, high, c = 0.1, 0.15, 1.3
    group = [BATCH["reward"][:GROUP], BATCH["reward"][GROUP:]]
    losses: list[float] = []
    cut = 0
    for i in range(NUM):
        own = BATCH["reward"][i] - sum(group[i // GROUP]) / GROUP
        advantage = own / (statistics.stdev(group[i // GROUP]) + 1e-4)
        answer: list[float] = []
        for now, old in zip(BATCH["logp"][i], BATCH["old_logp"][i], strict=True):
            ratio = math.exp(now - old)
            loss = max(-advantage * ratio, -advantage * min(max(ratio, 1 - low), 1 + high))
            cut += advantage < 0 and loss > -advantage * c
            answer.append(min(loss, -advantage * c) if advantage < 0 else loss)
        losses.append(sum(answer) / len(answer))
    settings = {"name": "grpo", "mismatch": "none", "clip_low": low, "clip_high": high, "delta": c}
    check(settings, {"loss": sum(losses) / NUM})
    assert cut > 0


@settings(deadline=None, max_examples=40)
@given(st.lists(st.floats(0, 12, width=32), min_size=1, max_size=40), st.floats(0, 1))
def test_a_quantile_is_torchs(values: list[float], q: float) -> None:
    given_values = torch.tensor(values, dtype=torch.float32)
    found = quantile(given_values, q, lambda own: own)
    assert found == pytest.approx(float(torch.quantile(given_values.double(), q)), rel=1e-6)
    # Of two ranks that have the same values: of each there are two.
    twice = quantile(given_values, q, lambda own: 2 * own)
    wanted = torch.quantile(given_values.repeat(2).double(), q)
    assert twice == pytest.approx(float(wanted), rel=1e-6)
    assert quantile(given_values[:0], q, lambda own: own) == 0


@pytest.mark.parametrize("alpha", [0.6, 1.0])
def test_a_reference_moves_as_trls_does(alpha: float) -> None:
    """SyncRefModelCallback._sync_target_model of TRL 1.16, on its two tensors."""
    before, now = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0)).unbind()
    wanted = before.clone().mul_(1.0 - alpha).add_(now, alpha=alpha)
    found = mixed({"w": before.clone()}, {"w": now}, alpha)["w"]
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
    half = mixed({"w": before.bfloat16()}, {"w": now.bfloat16()}, alpha)["w"]
    assert half.dtype == torch.bfloat16
