"""Every offline loss equals TRL's on the same log-probs (recorded by tools/bench/trl_fixtures.py),
whatever order the answers stand in. Losses that TRL has not are held against their formulas.
"""

import json
import math
import random
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from moetrain.config.method import SECTIONS, MethodConfig, PairLoss
from moetrain.methods import METHODS
from moetrain.methods.base import Out
from moetrain.methods.pair_losses import (
    PAIR_LOSSES,
    discopop_loss,
    hinge_loss,
    robust_loss,
    sigmoid_loss,
)
from moetrain.ops.packed import Packed, concat, pack_one, pad_to

RECORDED = json.loads((Path(__file__).parent / "fixtures" / "trl.json").read_text())
CASES: list[dict[str, Any]] = RECORDED["cases"]


def name_of(case: dict[str, Any]) -> str:
    return ", ".join(str(v) for v in case["method"].values())


def answer(
    logp: list[float],
    mask: list[int],
    role: int,
    ref: float,
    margin: float,
    squares: list[float],
) -> Packed:
    """One answer; its log-probs ride along as values per token."""
    t = len(logp)
    zeros = torch.zeros(t)
    extras = {
        "role": torch.tensor([role]),
        "ref_logp": torch.tensor([ref], dtype=torch.float64),
        "margin": torch.tensor([margin], dtype=torch.float64),
    }
    own = {
        "logp": torch.tensor(logp, dtype=torch.float64),
        "log_squares": torch.tensor(squares, dtype=torch.float64),
    }
    return pack_one(zeros, zeros, torch.tensor(mask), extras=extras, per_token=own)


def packed(case: dict[str, Any]) -> Packed:
    """The case's answers in one pack, pairs side by side, with a tail."""
    if "scores" in case:
        logp = [[0.0, score] for score in case["scores"]]
        mask = [[0, 0]] * len(logp)
        reference = [0.0] * len(logp)
    else:
        logp, mask = case["logp"], case["mask"]
        reference = case["reference"] or [0.0] * len(logp)
    half = len(logp) // 2
    margins = case.get("margin") or [0.0] * half
    squares = case.get("log_squares") or [[0.0] * len(row) for row in logp]
    parts: list[Packed] = []
    for i in range(half):
        for role, row in ((1, i), (2, half + i)):
            parts.append(
                answer(logp[row], mask[row], role, reference[row], margins[i], squares[row])
            )
    pack = concat(parts)
    return pad_to(pack, pack.num_tokens + 5)


def computed(case: dict[str, Any], packs: list[Packed]) -> tuple[float, dict[str, float]]:
    """(loss, metrics) as the engine makes them: sums over packs, divided once."""
    cfg: Any = TypeAdapter(MethodConfig).validate_python(case["method"])
    method = METHODS[cfg.name]
    terms: dict[str, float] = {}
    counts: dict[str, float] = {}
    sums: dict[str, list[float]] = {}
    for pack in packs:
        values: Tensor = pack.per_token["logp"]
        squares = pack.per_token["log_squares"]
        out = Out(logp=values * pack.loss_mask, value=values, log_squares=squares)
        known = {"kl": case.get("kl", 0.0)} | case.get("known", {})
        found, metrics = method.loss(out, pack, cfg, known)
        for name, count in method.count(pack, cfg).items():
            terms[name] = terms.get(name, 0.0) + float(found[name])
            counts[name] = counts.get(name, 0.0) + float(count)
        for name, (total, num) in metrics.items():
            own = sums.setdefault(name, [0.0, 0.0])
            own[0] += float(total)
            own[1] += float(num)
    loss = sum(terms[name] / counts[name] for name in terms)
    return loss, {name: total / max(num, 1e-12) for name, (total, num) in sums.items()}


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_the_loss_is_trls(case: dict[str, Any]) -> None:
    loss, metrics = computed(case, [packed(case)])
    assert loss == pytest.approx(case["loss"], rel=1e-6, abs=1e-6)
    for name, value in case.get("metrics", {}).items():
        assert metrics[name] == pytest.approx(value, rel=1e-6, abs=1e-6), name


def test_every_offline_method_is_held_against_something() -> None:
    """TRL's loss, or one of the tests below."""
    assert [(name, method.name) for name, method in METHODS.items() if name != method.name] == []
    assert METHODS.keys() == SECTIONS.keys()
    held = {case["method"]["name"] for case in CASES}
    held |= {"pretrain", "cpt", "chord_sft", "distill"}  # the last by test_distill.py
    assert held == {name for name, section in SECTIONS.items() if not section.samples}


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_what_a_method_is_judged_by_and_about_is_measured(case: dict[str, Any]) -> None:
    _, metrics = computed(case, [packed(case)])
    cfg: Any = TypeAdapter(MethodConfig).validate_python(case["method"])
    assert set(cfg.judged_by) <= {"eval_loss", *(f"eval_{name}" for name in metrics)}
    assert set(cfg.about) <= {"loss", *metrics} and "loss" in cfg.about


def test_every_loss_of_pairs_is_held_against_trl() -> None:
    """By itself; and all of it is in TRL's list but for what sorts a batch."""
    alone = {tuple(case["method"].get("loss_type", ())) for case in CASES}
    assert {(name,) for name in PAIR_LOSSES} <= alone
    assert {*PAIR_LOSSES, "sft"} == {*get_args(PairLoss)}


def test_the_mean_reward_of_the_steps_before_is_taken_off() -> None:
    """BCO's shift: 0 at first, then the mean over steps of what both answers got."""
    case = next(c for c in CASES if c["method"].get("loss_type") == ["bco_pair"])
    settings = {"name": "dpo", "beta": 0.3, "loss_type": "bco_pair"}
    cfg: Any = TypeAdapter(MethodConfig).validate_python(settings)
    ratio = [sum(a) - b for a, b in zip(case["logp"], case["reference"], strict=True)]
    half = len(ratio) // 2
    known: dict[str, float] = {}
    before: list[float] = []
    for step in range(3):
        own = case | {"method": settings, "known": known}
        own["reference"] = [r - step for r in case["reference"]]
        rewards = [0.3 * (r + step) for r in ratio]
        shift = sum(before) / len(before) if before else 0.0
        terms = [math.log1p(math.exp(shift - r)) for r in rewards[:half]]
        terms += [math.log1p(math.exp(r - shift)) for r in rewards[half:]]
        loss, metrics = computed(own, [packed(own)])
        assert loss == pytest.approx(sum(terms) / half, rel=1e-6)
        assert loss == pytest.approx(case["loss"], rel=1e-6) or step > 0
        known = METHODS["dpo"].carried(known, metrics, cfg)
        before.append(sum(rewards) / len(rewards))
    assert (
        METHODS["dpo"].carried(known, metrics, cfg.model_copy(update={"loss_type": ["ipo"]})) == {}
    )


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"loss_type": "aot"}, "sorts the log-ratios of a batch"),
        ({"loss_type": ["ipo", "ipo"]}, "twice"),
        ({"loss_type": ["ipo", "hinge"], "loss_weights": [1.0]}, "one for each"),
        ({"loss_type": "sft"}, "method sft"),
        ({"loss_type": ["ipo", "sft"], "rpo_alpha": 0.1}, "leave rpo_alpha out"),
        ({"loss_type": "ipo", "label_smoothing": 0.1}, "exo_pair, robust, sigmoid"),
        ({"loss_type": "exo_pair"}, "0.001"),
        ({"loss_type": "ipo", "discopop_tau": 0.1}, "without loss_type discopop"),
        ({"reward_shift": "none"}, "without loss_type bco_pair"),
    ],
)
def test_losses_that_do_not_fit_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        TypeAdapter(MethodConfig).validate_python({"name": "dpo", **settings})


def test_a_blend_of_far_pairs_is_a_number() -> None:
    """DiscoPOP's exponential and its share are inf and 0 by themselves (TRL 1.16: nan)."""
    h = torch.tensor([-4000.0, -900.0, 0.0, 900.0], requires_grad=True)
    found = discopop_loss(h, 0.1, 0.05)
    found.sum().backward()
    assert h.grad is not None and h.grad.isfinite().all()
    assert found.tolist() == pytest.approx([400.0, 90.0, (math.log(2) + 1) / 2, 0.0], abs=1e-6)


@pytest.mark.parametrize("name", ["dpo", "ipo", "hinge", "robust"])
@pytest.mark.parametrize("by", [-1.5, 0.0, 1.5])
def test_the_kl_of_pairs_is_never_negative(name: str, by: float) -> None:
    """Also where the policy likes both answers better than the reference does (it was -90 there,
    and no budget was ever passed).
    """
    case = next(c for c in CASES if c["method"]["name"] == name)
    lengths = [sum(mask) for mask in case["mask"]]
    ours = [sum(x for x, m in zip(a, b, strict=True) if m) for a, b in _rows(case)]
    moved = case | {"reference": [a - by * n for a, n in zip(ours, lengths, strict=True)]}
    _, metrics = computed(moved, [packed(moved)])
    wanted = sum(by**2 * n / 2 for n in lengths) / len(lengths)
    assert metrics["kl"] == pytest.approx(wanted, rel=1e-6, abs=1e-9)
    _, metrics = computed(case, [packed(case)])
    ratios = [a - b for a, b in zip(ours, case["reference"], strict=True)]
    wanted = sum(r**2 / n / 2 for r, n in zip(ratios, lengths, strict=True)) / len(lengths)
    assert metrics["kl"] == pytest.approx(wanted, rel=1e-6)


def _rows(case: dict[str, Any]) -> list[tuple[list[float], list[int]]]:
    return list(zip(case["logp"], case["mask"], strict=True))


@pytest.mark.parametrize("name", ["pretrain", "cpt"])
def test_pretraining_has_the_loss_of_sft(name: str) -> None:
    case = next(c for c in CASES if c["method"]["name"] == "sft")
    found = computed(case | {"method": {"name": name}}, [packed(case)])
    assert found == computed(case, [packed(case)])


def test_chords_weighting_is_its_formula() -> None:
    case = next(c for c in CASES if c["method"]["name"] == "sft")
    logp = torch.tensor(case["logp"], dtype=torch.float64)[torch.tensor(case["mask"]) > 0]
    p = logp.exp()
    wanted = float(-(p * (1 - p) * logp).mean())
    loss, _ = computed(case | {"method": {"name": "chord_sft"}}, [packed(case)])
    assert loss == pytest.approx(wanted, rel=1e-6)


def test_weights_of_tokens_carry_no_gradient() -> None:
    for name, weight in (("dft", lambda p: p), ("chord_sft", lambda p: p * (1 - p))):
        logp = torch.tensor([-0.3, -2.0, -0.01], requires_grad=True)
        pack = pack_one(torch.zeros(3), torch.zeros(3), torch.ones(3))
        terms, _ = METHODS[name].loss(Out(logp=logp), pack, None, {})
        terms["loss"].backward()
        assert logp.grad is not None
        assert torch.allclose(logp.grad, -weight(logp.detach().exp()))


def test_odds_of_a_sure_answer_are_numbers() -> None:
    """P = 1 and next to it, in fp32: the odds stand still where they would be infinite."""
    from moetrain.methods.orpo import log_odds_ratio

    sure = torch.tensor([0.0, -1e-9, -1e-5, -0.5], requires_grad=True)
    unsure = torch.full((4,), -2.0)
    found = log_odds_ratio(sure, unsure)
    found.sum().backward()
    assert sure.grad is not None and sure.grad.isfinite().all() and (sure.grad > 0).all()
    p, q = sure.detach().double().exp(), unsure.double().exp()
    wanted = (p / (1 - p)).log() - (q / (1 - q)).log()
    torch.testing.assert_close(found.detach().double()[2:], wanted[2:], rtol=1e-6, atol=0)
    torch.testing.assert_close(sure.grad.double()[2:], 1 / (1 - p[2:]), rtol=1e-3, atol=0)
    assert (found[:2] > 14).all() and found.isfinite().all()


PAIRED = [c for c in CASES if c["method"]["name"] not in ("sft", "dft")]


@pytest.mark.parametrize("case", PAIRED, ids=name_of)
def test_where_a_batch_is_cut_changes_nothing(case: dict[str, Any]) -> None:
    whole, metrics = computed(case, [packed(case)])
    names = ("logp", "mask", "reference", "scores", "log_squares")
    fields = [name for name in names if case.get(name)]
    num = len(case[fields[0]]) // 2
    pairs = list(range(num))
    random.Random(3).shuffle(pairs)
    parts: list[Packed] = []
    for chosen in (pairs[:1], pairs[1:4], pairs[4:]):
        rows = chosen + [num + i for i in chosen]
        own = {name: [case[name][row] for row in rows] for name in fields}
        if case.get("margin"):
            own["margin"] = [case["margin"][i] for i in chosen]
        parts.append(packed(case | own))
    loss, found = computed(case, parts)
    assert loss == pytest.approx(whole, rel=1e-9)
    assert found == pytest.approx(metrics, rel=1e-9, abs=1e-9)


@given(st.floats(-30, 30), st.floats(0.01, 2), st.floats(0, 0.49))
def test_a_wider_margin_never_costs_more(h: float, beta: float, smoothing: float) -> None:
    near, far = (torch.tensor([x], dtype=torch.float64) for x in (h, h + 1.0))
    assert sigmoid_loss(far, beta) <= sigmoid_loss(near, beta)
    assert hinge_loss(far, beta) <= hinge_loss(near, beta)
    # With smoothing the loss has its minimum where the odds are those of a right label.
    best = torch.tensor([math.log((1 - smoothing) / max(smoothing, 1e-12)) / beta])
    assert sigmoid_loss(best, beta, smoothing) <= sigmoid_loss(near, beta, smoothing) + 1e-6


@given(st.floats(-30, 30), st.floats(0.01, 2), st.floats(0, 0.45))
def test_robust_is_dpo_on_the_right_labels(h: float, beta: float, share: float) -> None:
    """In the mean over flips, which are that pair with the answers changed over."""
    right, flipped = (torch.tensor([x], dtype=torch.float64) for x in (h, -h))
    found = [robust_loss(x, beta, share) for x in (right, flipped)]
    mean = (1 - share) * found[0] + share * found[1]
    torch.testing.assert_close(mean, sigmoid_loss(right, beta), rtol=1e-9, atol=1e-9)
