"""Distillation: divergences against TRL's, gradients in expectation, a teacher at every layout, and
what is kept of it.
"""

import itertools
import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter
from torch import Tensor

from moetrain.config.method import MethodConfig
from moetrain.methods import METHODS
from moetrain.methods.base import Out
from moetrain.methods.divergence import generalised_jsd, kl, with_rest
from moetrain.ops.packed import Packed, concat, pack_one, pad_to

DOUBLE = torch.float64
RECORDED: dict[str, Any] = json.loads(
    (Path(__file__).parent / "fixtures" / "trl_distill.json").read_text()
)
STUDENT, TEACHER = (torch.tensor(RECORDED[n], dtype=DOUBLE) for n in ("student", "teacher"))
WORDS = STUDENT.size(1)


def name_of(case: dict[str, Any]) -> str:
    return f"beta {case['beta']}, k {case['k']}"


def pack_of(top: Tensor, ids: Tensor, **per_token: Tensor) -> Packed:
    """An answer at whose places a teacher has said that, with a tail of padding."""
    t = len(ids)
    pack = pack_one(
        torch.zeros(t),
        torch.zeros(t),
        torch.ones(t),
        extras={"role": torch.tensor([1]), "advantage": torch.zeros(1, dtype=DOUBLE)},
        per_token={"teacher_ids": ids, "teacher_top": top, **per_token},
    )
    return pad_to(pack, t + 3)


@pytest.mark.parametrize("case", RECORDED["cases"], ids=name_of)
@pytest.mark.parametrize("name", ["distill", "gkd"])
def test_loss_and_gradient_are_trls(case: dict[str, Any], name: str) -> None:
    cfg: Any = TypeAdapter(MethodConfig).validate_python(
        {"name": name, "top_k": case["k"], "interpolation": case["beta"]}
    )
    logits = STUDENT.clone().requires_grad_()
    top, ids = TEACHER.log_softmax(-1).topk(case["k"], -1)
    zeros = torch.zeros(len(ids), dtype=DOUBLE)
    pack = pack_of(top, ids, old_logp=zeros, rollout_logp=zeros, advantage=zeros)
    given = torch.cat([logits.log_softmax(-1).gather(-1, ids), torch.zeros(3, case["k"])])
    out = Out(logp=torch.zeros(len(given), dtype=DOUBLE), at_teacher=given)
    terms, metrics = METHODS[name].loss(out, pack, cfg, {})
    assert float(METHODS[name].count(pack, cfg)["loss"]) == len(ids)
    terms["loss"].backward()
    assert logits.grad is not None
    assert terms["loss"].item() == pytest.approx(case["loss"], abs=1e-6)
    torch.testing.assert_close(
        logits.grad, torch.tensor(case["gradient"], dtype=DOUBLE), atol=1e-6, rtol=1e-6
    )
    total, num = metrics["teacher/covered"]
    assert float(total / num) == pytest.approx(float(top.exp().sum(-1).mean()), abs=1e-6)


rows = st.lists(st.floats(-6, 6), min_size=5, max_size=5)


@settings(max_examples=60, deadline=None)
@given(rows, rows, st.floats(0, 1), st.integers(1, 5))
def test_a_divergence_is_none_only_between_equals_and_never_more_than_of_all_words(
    ours: list[float], theirs: list[float], interpolation: float, k: int
) -> None:
    student, teacher = (torch.tensor([row], dtype=DOUBLE).log_softmax(-1) for row in (ours, theirs))
    top, ids = teacher.topk(k, -1)
    part = generalised_jsd(with_rest(student.gather(-1, ids)), with_rest(top), interpolation)
    whole = generalised_jsd(student, teacher, interpolation)
    assert -1e-9 <= float(part) <= float(whole) + 2e-6  # REST is left to no word
    same = with_rest(top)
    assert float(generalised_jsd(same, same, interpolation)) == pytest.approx(0, abs=1e-12)


# In expectation, over all that a policy of two words can say

SAYINGS = list(itertools.product(range(WORDS), repeat=2))


def log_probs(tables: Tensor, saying: tuple[int, ...]) -> Tensor:
    """[2] from [1 + WORDS, WORDS]: the first word, then one after each."""
    first, second = saying
    return torch.stack([tables[0, first], tables[1 + first, second]])


def of_kl(student: Tensor, teacher: Tensor, *, of_answers: bool) -> Tensor:
    """The gradient of KL(student || teacher): of whole answers, or at each place with how it is
    come to held fixed.
    """
    logits = student.clone().requires_grad_()
    now, other = logits.log_softmax(-1), teacher.log_softmax(-1)
    reached = torch.cat([torch.ones(1, dtype=DOUBLE), now[0].exp()])
    if not of_answers:
        reached = reached.detach()
    (reached * kl(now, other)).sum().backward()
    assert logits.grad is not None
    return logits.grad


@pytest.mark.parametrize("discount", [0.0, 1.0])
def test_the_expected_gradient_is_that_of_the_reverse_kl(discount: float) -> None:
    g = torch.Generator().manual_seed(3)
    student, teacher = torch.randn(2, 1 + WORDS, WORDS, generator=g, dtype=DOUBLE)
    cfg: Any = TypeAdapter(MethodConfig).validate_python(
        {"name": "on_policy_distill", "discount": discount}
    )
    method = METHODS["on_policy_distill"]
    assert method.online is not None
    logits = student.clone().requires_grad_()
    total: Any = 0
    for saying in SAYINGS:
        now = log_probs(logits.log_softmax(-1), saying)
        old = now.detach()
        pack = pack_of(
            torch.zeros(2, 1),
            torch.zeros(2, 1),
            old_logp=old,
            rollout_logp=old,
            teacher_logp=log_probs(teacher.log_softmax(-1), saying),
        )
        pack.per_token.update(method.online.targets(pack, cfg))
        logp = torch.cat([now, now.new_zeros(3)])
        terms, metrics = method.loss(Out(logp=logp, entropy=logp), pack, cfg, {})
        away, num = metrics["kl/teacher"]
        assert float(num) == 2
        assert float(away) == pytest.approx(float((old - pack.per_token["teacher_logp"][:2]).sum()))
        total = total + old.sum().exp() * terms["loss"]
    total.backward()
    assert logits.grad is not None
    want = of_kl(student, teacher, of_answers=discount == 1)
    torch.testing.assert_close(logits.grad, want, atol=1e-10, rtol=1e-8)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=5), st.floats(0, 1), st.integers(0, 99))
def test_what_follows_counts_by_the_discount_and_never_across_answers(
    lengths: list[int], discount: float, seed: int
) -> None:
    """MiniLLM's reward to go, by a loop."""
    rng = random.Random(seed)
    cfg: Any = TypeAdapter(MethodConfig).validate_python(
        {"name": "on_policy_distill", "discount": discount, "reward_weight": 0.5}
    )
    online = METHODS["on_policy_distill"].online
    assert online is not None
    wanted: list[float] = []
    packs: list[Packed] = []
    for length in lengths:
        words = [rng.uniform(-2, 2) for _ in range(length)]
        reward = rng.uniform(-1, 1)
        for place in range(length):
            rest = words[place:]
            wanted.append(reward + sum(discount**i * word for i, word in enumerate(rest)))
        pack = pack_of(
            torch.zeros(length, 1),
            torch.zeros(length, 1),
            old_logp=torch.zeros(length, dtype=DOUBLE),
            teacher_logp=torch.tensor(words, dtype=DOUBLE),
        )
        pack.extras["advantage"][0] = reward
        packs.append(pack)
    pack = concat(packs)
    found = online.targets(pack, cfg)["advantage"]
    assert found[pack.loss_mask > 0].tolist() == pytest.approx(wanted, abs=1e-9)
    assert not found[pack.loss_mask == 0].any()


def test_rewards_count_as_much_as_they_are_weighed() -> None:
    rewards, group = torch.tensor([0.0, 1.0, 1.0, 1.0]), torch.tensor([0, 0, 1, 1])
    online = METHODS["on_policy_distill"].online
    assert online is not None
    for weight in (0.0, 0.5):
        cfg: Any = TypeAdapter(MethodConfig).validate_python(
            {"name": "on_policy_distill", "reward_weight": weight}
        )
        assert online.advantages(rewards, group, cfg).tolist() == [-weight / 2, weight / 2, 0, 0]
    assert math.isclose(sum(rewards.tolist()), 3)
