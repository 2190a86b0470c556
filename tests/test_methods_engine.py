"""Every method through the engine: gradients against transformers and autograd at four layouts, and
the same whatever the micro-batches, ranks, packs and shared prompts.
"""

import random
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from test_parity import as_on_disk
from torch import Tensor

from moetrain.config.method import SECTIONS
from moetrain.ops.packed import Packed, concat, pack_one
from moetrain.testing import ranks
from moetrain.testing.gloo import Workers

pytestmark = pytest.mark.gloo
Tiny = Callable[..., tuple[str, Any]]
Models = Callable[[str, dict[str, int]], tuple[str, Any]]
NUM_GROUPS = 8


class Answer:
    """One answer to one prompt."""

    def __init__(self, tokens: list[int], first: int, role: int, ref: float, margin: float):
        self.tokens, self.first, self.role, self.ref, self.margin = tokens, first, role, ref, margin

    def packed(self, start: int) -> Packed:
        """From position `start` on; scored from the last token of the prompt on."""
        ids = torch.tensor(self.tokens)
        labels = torch.cat([ids[1:], ids.new_zeros(1)])
        mask = (torch.arange(len(self.tokens)) >= self.first).float()
        mask[-1] = 0
        extras = {
            "role": torch.tensor([self.role]),
            "ref_logp": torch.tensor([self.ref]),
            "margin": torch.tensor([self.margin]),
        }
        pack = pack_one(ids[start:], labels[start:], mask[start:], id="a", extras=extras)
        return replace(pack, position_ids=pack.position_ids + start)


# Token 0 is left out: transformers takes it for padding, which has no gradient there.
def groups(labelled: bool) -> list[tuple[int, list[Answer]]]:
    """(length of the prompt, its two answers): chosen and rejected, or labelled and mismatched."""
    rng = random.Random(11)
    made: list[tuple[int, list[Answer]]] = []
    for i in range(NUM_GROUPS):
        size = rng.choice([1, 4, 9, 12])
        prompt = [rng.randrange(1, 200) for _ in range(size)]
        roles = (1 + i % 2, 3) if labelled else (1, 2)
        answers: list[Answer] = []
        for role in roles:
            body = [rng.randrange(1, 200) for _ in range(rng.randrange(2, 8))]
            ref = -5.4 * len(body) + rng.uniform(-2, 2)
            answers.append(Answer(prompt + body, size - 1, role, ref, rng.uniform(0, 1)))
        made.append((size, answers))
    return made


def packed(found: list[tuple[int, list[Answer]]], *, shared: bool) -> list[Packed]:
    """A pack a group."""
    packs: list[Packed] = []
    for size, answers in found:
        start = size - 1 if shared else 0
        parts = [answer.packed(start) for answer in answers]
        if start:
            ids = torch.tensor(answers[0].tokens[:start])
            extras = {name: torch.zeros_like(value) for name, value in parts[0].extras.items()}
            parts.insert(0, pack_one(ids, ids, torch.zeros(start), extras=extras))
            pack = concat(parts)
            packs.append(replace(pack, prefix=torch.tensor([-1, 0, 0], dtype=torch.int32)))
        else:
            packs.append(concat(parts))
    return packs


# The formulas once more, from per-answer numbers: sums of log-probs, lengths, the reference's; and
# sums in which what is longer than the other answer counts less, and WPO's weights.

Numbers = tuple[Tensor, ...]


def several(w: Numbers, l: Numbers, cfg: dict[str, Any]) -> Tensor:  # noqa: E741
    """MPO's losses with all that bears on them: 0.8 sigmoid (smoothed) + 0.2 bco_pair + sft."""
    r, s = cfg["beta"] * (w[3] - w[2]), cfg["beta"] * (l[3] - l[2])
    e = cfg["label_smoothing"]
    smoothed = (1 - e) * torch.log(torch.sigmoid(r - s)) + e * torch.log(torch.sigmoid(s - r))
    classified = torch.log(torch.sigmoid(r)) + torch.log(torch.sigmoid(-s))
    pairs = -w[4] * l[4] * (0.8 * smoothed + 0.2 * classified)
    return pairs.mean() - w[0].sum() / w[1].sum()


def squared(w: Numbers, l: Numbers, cfg: dict[str, float]) -> Tensor:  # noqa: E741
    h = (w[0] - w[2]) / w[1] - (l[0] - l[2]) / l[1]
    return ((h - 0.5 / cfg["beta"]) ** 2).mean()


def hinge(w: Numbers, l: Numbers, cfg: dict[str, float]) -> Tensor:  # noqa: E741
    h = (w[0] - w[2]) - (l[0] - l[2])
    return torch.clamp(1 - cfg["beta"] * h, min=0).mean()


def debiased(w: Numbers, l: Numbers, cfg: dict[str, float]) -> Tensor:  # noqa: E741
    p, e = torch.sigmoid(cfg["beta"] * ((w[0] - w[2]) - (l[0] - l[2]))), cfg["label_smoothing"]
    return (e * torch.log(1 - p) - (1 - e) * torch.log(p)).mean() / (1 - 2 * e)


def odds(w: Numbers, l: Numbers, cfg: dict[str, float]) -> Tensor:  # noqa: E741
    p, q = torch.exp(w[0] / w[1]), torch.exp(l[0] / l[1])
    ratio = (p / (1 - p)) / (q / (1 - q))
    return (
        -w[0].sum() / w[1].sum() - cfg["beta"] * torch.log(torch.sigmoid(torch.log(ratio))).mean()
    )


def simple(w: Numbers, l: Numbers, cfg: dict[str, float]) -> Tensor:  # noqa: E741
    h = cfg["beta"] * (w[0] / w[1] - l[0] / l[1]) - cfg["gamma"]
    return -torch.log(torch.sigmoid(h)).mean()


MPO = {
    "beta": 0.3, "loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0],
    "label_smoothing": 0.1, "ld_alpha": 0.4, "use_weighting": True,
}  # fmt: skip
PAIRS: dict[str, tuple[Callable[..., Tensor], dict[str, Any]]] = {
    "dpo": (several, MPO),
    "ipo": (squared, {"beta": 0.4}),
    "hinge": (hinge, {"beta": 0.3}),
    "robust": (debiased, {"beta": 0.3, "label_smoothing": 0.2}),
    "orpo": (odds, {"beta": 0.5}),
    "simpo": (simple, {"beta": 2.0, "gamma": 0.7}),
}
TOKENS: dict[str, Callable[[Tensor], Tensor]] = {
    "sft": lambda p: torch.ones_like(p),
    "dft": lambda p: p,
    "chord_sft": lambda p: p * (1 - p),
}
KTO = {"beta": 0.3, "desirable_weight": 1.2, "undesirable_weight": 0.7}
UNPAIRED = KTO | {"name": "kto", "loss_type": "apo_zero_unpaired"}
REWARD = {"center_rewards": 0.05}
METHODS = [*PAIRS, *TOKENS, "kto", "reward"]
ALIKE = {"pretrain", "cpt"}  # their loss is sft's
LABELLED = ("kto", "unpaired")


def section(method: str) -> dict[str, Any]:
    settings = {"kto": KTO, "reward": REWARD, "unpaired": UNPAIRED}
    settings |= {name: cfg for name, (_, cfg) in PAIRS.items()}
    return {"method": {"name": method, **settings.get(method, {})}}


def scored(model: Any, answer: Answer) -> tuple[Tensor, Tensor]:
    """[m] log-probs of an answer's scored tokens, and log sum p^2 of the distributions they were
    drawn from, by transformers on the whole sequence.
    """
    ids = torch.tensor([answer.tokens])
    logp = torch.log_softmax(model(ids).logits[0, :-1].float(), -1)[answer.first :]
    own = logp.gather(1, ids[0, 1 + answer.first :, None])[:, 0]
    return own, logp.exp().square().sum(1).log()


def numbers_of(model: Any, own: list[Answer], others: list[Answer]) -> Numbers:
    """Of the answers of one role, beside those of the other."""
    rows: list[Numbers] = []
    for a, b in zip(own, others, strict=True):
        logp, squares = scored(model, a)
        shared = min(len(logp), len(b.tokens) - 1 - b.first)
        tail = MPO["ld_alpha"] * logp[shared:].sum()
        weight = (logp - squares).detach().mean().exp()
        num = torch.tensor(float(len(logp)))
        rows.append((logp.sum(), num, torch.tensor(a.ref), logp[:shared].sum() + tail, weight))
    return tuple(torch.stack(column) for column in zip(*rows, strict=True))


def reference(method: str, model: Any) -> tuple[float, dict[str, Tensor]]:
    """(loss, gradients) by transformers and autograd."""
    model.zero_grad()
    made = groups(labelled=method in LABELLED)
    everyone = [answer for _, answers in made for answer in answers]
    if method == "reward":
        score = {id(a): model(torch.tensor([a.tokens])).logits[0, 0] for a in everyone}
        parts = [
            -torch.log(torch.sigmoid(score[id(good)] - score[id(bad)] - good.margin))
            + REWARD["center_rewards"] * (score[id(good)] + score[id(bad)]) ** 2
            for _, (good, bad) in made
        ]
        loss = torch.stack(parts).mean()
    elif method in TOKENS:
        logp = torch.cat([scored(model, answer)[0] for answer in everyone])
        loss = -(TOKENS[method](logp.detach().exp()) * logp).mean()
    else:
        roles = {answer.role for answer in everyone}
        of = {role: [answer for answer in everyone if answer.role == role] for role in roles}
        pairs = {1: 2, 2: 1} if len(roles) == 2 else {}
        numbers = {role: numbers_of(model, of[role], of[pairs.get(role, role)]) for role in roles}
        if method in LABELLED:
            z = (numbers[3][0] - numbers[3][2]).mean().clamp(min=0).detach()
            z = z if method == "kto" else 0.0
            good = 1 - torch.sigmoid(KTO["beta"] * (numbers[1][0] - numbers[1][2] - z))
            bad = 1 - torch.sigmoid(KTO["beta"] * (z - (numbers[2][0] - numbers[2][2])))
            losses = [KTO["desirable_weight"] * good, KTO["undesirable_weight"] * bad]
            loss = torch.cat(losses).mean()
        else:
            formula, cfg = PAIRS[method]
            loss = formula(numbers[1], numbers[2], cfg)
    loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return loss.item(), as_on_disk(model, grads)


@pytest.fixture(scope="module")
def models(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Models:
    """(method, layout) -> (folder, transformers model): with a scalar head for `reward`."""
    from transformers import AutoModelForSequenceClassification

    headed: dict[str, tuple[str, Any]] = {}

    def find(method: str, parallel: dict[str, int]) -> tuple[str, Any]:
        folder, model = tiny("qwen3_moe", parallel)
        if method != "reward":
            return folder, model
        if folder not in headed:
            torch.manual_seed(1)
            path = tmp_path_factory.mktemp("reward")
            made = AutoModelForSequenceClassification.from_pretrained(
                folder, num_labels=1, dtype=torch.float32, pad_token_id=0
            )
            made.score.weight.data.normal_(0, 0.3)
            made.save_pretrained(path)
            headed[folder] = (str(path), made)
        return headed[folder]

    return find


LAYOUTS: dict[str, tuple[int, dict[str, int]]] = {
    "one": (1, {}),
    "tp2": (2, {"tp": 2}),
    "pp2": (2, {"pp": 2}),
    "ep2": (2, {"ep": 2}),
}


def test_no_offline_method_is_left_out() -> None:
    known = {*METHODS, "distill"} | ALIKE  # that in test_teacher.py, and gkd in test_online_engine
    assert known == {name for name, own in SECTIONS.items() if not own.samples}


@pytest.mark.parametrize(("method", "layout"), [*product(METHODS, LAYOUTS), ("unpaired", "one")])
def test_gradients_equal_transformers(
    workers: Workers, models: Models, method: str, layout: str
) -> None:
    world, parallel = LAYOUTS[layout]
    folder, model = models(method, parallel)
    loss, wanted = reference(method, model)
    packs = packed(groups(labelled=method in LABELLED), shared=True)
    packs = [concat(packs[i::4]) for i in range(4)]
    found = workers.run(world, ranks.gradients_of_packs, folder, parallel, packs, section(method))[
        0
    ]
    assert found[0] == pytest.approx(loss, rel=1e-5)
    assert found[2].keys() == wanted.keys()
    for name, grad in found[2].items():
        error = (grad - wanted[name]).norm() / wanted[name].norm().clamp(min=1e-12)
        assert error <= 1e-4, (name, error)


@pytest.mark.parametrize("method", METHODS)
def test_how_a_batch_is_cut_changes_nothing(
    workers: Workers, models: Models, method: str, tmp_path: Path
) -> None:
    folder, _ = models(method, {})
    found = groups(labelled=method in LABELLED)
    shared, whole = packed(found, shared=True), packed(found, shared=False)
    balanced = {"router": {"aux_loss": 0.01, "z_loss": 0.001}}

    def run(world: int, packs: list[Packed], **sections: Any) -> Any:
        sections = section(method) | sections
        return workers.run(world, ranks.gradients_of_packs, folder, {}, packs, sections)[0]

    # Router losses are taken over sequences, so they are in where sequences stay the same.
    one_pack = run(1, [concat(shared)], **balanced)
    cuts = {
        "2 micro-batches": run(1, [concat(shared[i::2]) for i in range(2)], **balanced),
        "4 micro-batches": run(1, [concat(shared[i::4]) for i in range(4)], **balanced),
        "2 ranks": run(2, [concat(shared[i::2]) for i in range(2)], **balanced),
        "2 ranks, 4 packs": run(2, [concat(shared[i::4]) for i in range(4)], **balanced),
        "joined again": run(
            1, [concat(shared[i::4]) for i in range(4)], train={"micro_batch": 2}, **balanced
        ),
    }
    plain = run(1, [concat(shared)])
    cuts_of_plain = {"whole prompts": run(1, [concat(whole[i::2]) for i in range(2)])}
    for wanted, others in ((one_pack, cuts), (plain, cuts_of_plain)):
        for cut, (loss, metrics, grads) in others.items():
            assert loss == pytest.approx(wanted[0], rel=1e-5), cut
            for name, value in metrics.items():
                assert value == pytest.approx(wanted[1][name], rel=1e-4, abs=1e-5), (cut, name)
            for name, grad in grads.items():
                error = (grad - wanted[2][name]).norm() / wanted[2][name].norm().clamp(min=1e-9)
                assert error <= 1e-5, (cut, name, error)
