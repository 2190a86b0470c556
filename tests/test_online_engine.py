"""Methods that learn from rollouts, through the engine: gradients against transformers and
autograd, the same at every layout and however the batch is cut.
"""

import random
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter
from test_parity import as_on_disk
from torch import Tensor

from moetrain.config.method import MethodConfig
from moetrain.data.groups import GradedAnswer, Group, pack_groups
from moetrain.data.samples import Kept, Prompt, Sample
from moetrain.data.trajectories import Trajectory, Word
from moetrain.loops.demonstrations import with_fields_of
from moetrain.methods import METHODS
from moetrain.ops.packed import Packed, concat, from_tokens, pack_one
from moetrain.testing import ranks
from moetrain.testing.gloo import Workers
from moetrain.testing.rollouts import sample_of

pytestmark = pytest.mark.gloo
Tiny = Callable[..., tuple[str, Any]]

SETTINGS: dict[str, dict[str, Any]] = {
    "grpo": {
        "name": "grpo",
        "clip_low": 0.1,
        "clip_high": 0.1,
        "mismatch_cap": 1.3,
        "entropy_coef": 0.4,
    },
    "dapo": {"name": "dapo", "mismatch": "mask", "mismatch_cap": 1.5},
    "gspo": {"name": "gspo", "clip_low": 0.05, "clip_high": 0.05, "mismatch": "none"},
    "dr_grpo": {"name": "dr_grpo", "length": 5, "mismatch": "sequence", "mismatch_cap": 1.2},
    "chord": {"name": "chord", "mismatch_cap": 1.3, "packs": 2},
    "gkd": {"name": "gkd", "top_k": 3, "interpolation": 0.4, "entropy_coef": 0.4},
}
SHARE = 0.4  # mu of chord
TEMPERATURES = {"dapo": 0.6, "gspo": 1.3, "chord": 0.7}  # of the answers; the others' is 1
CUT = ("gspo", "chord")  # their answers were drawn from a few tokens at each place
PENALTIES = {"dr_grpo": 1.4, "chord": 1.2}  # for repetition, of the answers
LAYOUTS: dict[str, tuple[int, dict[str, int]]] = {
    "one": (1, {}),
    "tp2": (2, {"tp": 2}),
    "pp2": (2, {"pp": 2}),
    "ep2": (2, {"ep": 2}),
    "cp2": (2, {"cp": 2}),
}


def section_of(method: dict[str, Any]) -> dict[str, Any]:
    """What a recipe needs for a method."""
    shown = ["none"] if method["name"] == "chord" else []
    data = {"demonstrations": shown}
    section = {"method": method, "rollout": {}, "rewards": ["length"], "data": data}
    return section | ({"teacher": {"path": "t"}} if method["name"] == "gkd" else {})


@cache
def groups(model: Any) -> list[Group]:
    """Five prompts of many lengths with three answers each; the sampler's log-probs are near the
    model's own.
    """
    rng = random.Random(9)
    made: list[Group] = []
    for p, size in enumerate((1, 4, 9, 3, 12)):
        prompt = tuple(rng.randrange(1, 200) for _ in range(size))
        answers: list[GradedAnswer] = []
        for index in range(3):
            tokens = tuple(rng.randrange(1, 200) for _ in range(rng.randrange(1, 8)))
            with torch.no_grad():
                own = scored(model, prompt, tokens, 1.0).tolist()
            logprobs = tuple(x + rng.uniform(-0.6, 0.6) for x in own)
            sample = Sample(f"p{p}", index, tokens, logprobs, "", "stop", 0)
            answers.append(GradedAnswer(Trajectory.of(sample), rng.uniform(-1, 1)))
        made.append(Group(Prompt(f"p{p}", prompt, {}), tuple(answers)))
    return made


def kept_of(answer: tuple[int, ...]) -> list[list[int]]:
    """What could be drawn at each place: the token, and a few others of the 200."""
    return [[token, *{(7 * token + k) % 200 for k in range(n % 4)} - {token}]
            for n, token in enumerate(answer, 1)]  # fmt: skip


def word_of(answer: tuple[int, ...]) -> Word:
    """What a teacher could say at each place: three tokens, the answer's own among some."""
    ids = [[(token + 31 * n % 93 + step) % 200 for step in (0, 40, 80)]
           for n, token in enumerate(answer)]  # fmt: skip
    top = [[-0.5 - 0.1 * (n % 3), -2.0, -3.0 - n % 2] for n in range(len(answer))]
    return Word(
        np.zeros(len(answer), np.float32), np.array(ids, np.int32), np.array(top, np.float32)
    )


def with_word(group: Group) -> Group:
    """The group as servers have scored it."""
    answers: list[GradedAnswer] = []
    for one in group.answers:
        (branch,) = one.trajectory.branches
        branch = replace(branch, word=word_of(sample_of(one.trajectory).tokens))
        answers.append(replace(one, trajectory=replace(one.trajectory, branches=(branch,))))
    return replace(group, answers=tuple(answers))


def far_from_teacher(every: Tensor, word: Word, interpolation: float) -> Tensor:
    """[m] GKD's divergence of distributions [m, v] from a word, the other tokens as one."""
    ours = every.exp().gather(1, torch.from_numpy(word.ids.astype(np.int64)))
    q = torch.cat([ours, 1 - ours.sum(1, keepdim=True)], dim=1)
    p = torch.from_numpy(word.top).exp()
    p = torch.cat([p, 1 - p.sum(1, keepdim=True)], dim=1)
    m = interpolation * p + (1 - interpolation) * q
    return (interpolation * p * (p / m).log() + (1 - interpolation) * q * (q / m).log()).sum(1)


def cut(group: Group) -> Group:
    answers = (
        replace(a, trajectory=Trajectory.of(replace(one, kept=Kept.of(kept_of(one.tokens)))))
        for a in group.answers
        for one in [sample_of(a.trajectory)]
    )
    return replace(group, answers=tuple(answers))


def scored(
    model: Any, prompt: tuple[int, ...], answer: tuple[int, ...], temperature: float, of: str = ""
) -> Tensor:
    """[m] log-probs of an answer's tokens, by transformers; `of`: as a method's are drawn."""
    every = distributions(model, prompt, answer, temperature, of)
    return every.gather(1, torch.tensor(answer)[:, None])[:, 0]


def distributions(
    model: Any, prompt: tuple[int, ...], answer: tuple[int, ...], temperature: float, of: str = ""
) -> Tensor:
    """[m, v] log-probs of all tokens where an answer's stand."""
    ids = torch.tensor([[*prompt, *answer]])
    logits = model(ids).logits[0, :-1].float()
    if of in PENALTIES:
        seen = torch.zeros_like(logits, dtype=torch.bool)
        for place in range(len(logits)):
            seen[place, ids[0, : place + 1]] = True
        factor = torch.where(logits > 0, 1 / PENALTIES[of], PENALTIES[of])
        logits = torch.where(seen, logits * factor, logits)
    logits = logits / temperature
    if of in CUT:
        left_out = torch.zeros_like(logits, dtype=torch.bool)
        for place, kept in enumerate(kept_of(answer), len(prompt) - 1):
            left_out[place] = True
            left_out[place, kept] = False
        logits = logits.masked_fill(left_out, -torch.inf)
    return torch.log_softmax(logits, -1)[len(prompt) - 1 :]


def old_of(sample: Sample) -> list[float]:
    """Log-probs before the update, between the sampler's and the model's: ratios are not 1."""
    rng = random.Random(str(sample.tokens))
    return [x + rng.uniform(-0.2, 0.2) for x in sample.logprobs]


def packs_of(found: list[Group], method: str, *, seq_len: int, min_packs: int) -> list[Packed]:
    cfg: Any = TypeAdapter(MethodConfig).validate_python(SETTINGS[method])
    online = METHODS[method].online
    assert online is not None
    rewards = torch.tensor([a.reward for g in found for a in g.answers])
    numbers = torch.tensor([i for i, g in enumerate(found) for _ in g.answers])
    values = {"advantage": online.advantages(rewards, numbers, cfg), "reward": rewards}
    values["temperature"] = torch.full_like(rewards, TEMPERATURES.get(method, 1.0))
    if method in PENALTIES:
        values["repetition_penalty"] = torch.full_like(rewards, PENALTIES[method])
    found = [cut(group) for group in found] if method in CUT else found
    found = [with_word(group) for group in found] if method == "gkd" else found
    if online.shares is not None:
        values["share"] = torch.full_like(rewards, 1 - SHARE)
    packs = pack_groups(found, values, seq_len=seq_len, min_packs=min_packs)
    samples = [sample_of(a.trajectory) for g in found for a in g.answers]
    for pack in packs:
        old = torch.zeros(pack.num_tokens)
        for n in range(pack.num_sequences):
            item = int(pack.extras["item"][n])
            if item >= 0:
                start, end = pack.cu_seqlens[n : n + 2].tolist()
                old[start:end] = torch.tensor(old_of(samples[item]))
        pack.per_token["old_logp"] = old
        pack.per_token.update(online.targets(pack, cfg))
    if online.shares is not None:
        packs += [with_fields_of(concat(own), packs[0], SHARE) for own in dealt_shown(min_packs)]
    return packs


def shown() -> list[tuple[int, tuple[int, ...]]]:
    """(tokens of the prompt, all tokens) of two demonstrations."""
    rng = random.Random(5)
    return [(num, tuple(rng.randrange(1, 200) for _ in range(num + 6))) for num in (3, 8)]


def dealt_shown(num_packs: int) -> list[list[Packed]]:
    """The demonstrations in one pack, or in a pack each."""
    made: list[Packed] = []
    for num, tokens in shown():
        own = from_tokens(tokens)
        mask = own.loss_mask.clone()
        mask[: num - 1] = 0
        made.append(pack_one(own.tokens, own.labels, mask))
    return [made] if num_packs == 1 else [[one] for one in made]


def reference(model: Any, found: list[Group], method: str) -> tuple[float, dict[str, Tensor]]:
    """(loss, gradients) by transformers and autograd, answer by answer, without packs."""
    cfg: Any = TypeAdapter(MethodConfig).validate_python(SETTINGS[method])
    online = METHODS[method].online
    assert online is not None
    rewards = torch.tensor([a.reward for g in found for a in g.answers])
    numbers = torch.tensor([i for i, g in enumerate(found) for _ in g.answers])
    advantages = iter(online.advantages(rewards, numbers, cfg).tolist())
    model.zero_grad()
    means: list[Tensor] = []
    sums: list[Tensor] = []
    entropies: list[Tensor] = []
    num_tokens = 0
    for group in found:
        for answer in group.answers:
            sample, advantage = sample_of(answer.trajectory), next(advantages)
            temperature = TEMPERATURES.get(method, 1.0)
            every = distributions(model, group.prompt.tokens, sample.tokens, temperature, method)
            logp = every.gather(1, torch.tensor(sample.tokens)[:, None])[:, 0]
            if cfg.entropy_coef:
                entropies.append(-(every.exp() * every).sum())
            if method == "gkd":
                word = word_of(sample.tokens)
                sums.append(far_from_teacher(every, word, cfg.interpolation).sum())
                num_tokens += len(sample.tokens)
                continue
            old, rollout = torch.tensor(old_of(sample)), torch.tensor(sample.logprobs)
            weight = (old - rollout).exp()
            if cfg.mismatch == "tis":
                weight = weight.clamp(max=cfg.mismatch_cap)
            elif cfg.mismatch == "sequence":
                weight = weight.prod().clamp(max=cfg.mismatch_cap).expand(len(old))
            elif cfg.mismatch == "mask":
                inside = (weight >= 1 / cfg.mismatch_cap) & (weight <= cfg.mismatch_cap)
                weight = weight * inside
            else:
                weight = torch.ones_like(weight)
            ratio = (logp - old).exp()
            if method == "gspo":
                ratio = (logp - old).mean().exp().expand(len(old))
            bounded = ratio.clamp(1 - cfg.clip_low, 1 + cfg.clip_high)
            losses = -weight * torch.minimum(ratio * advantage, bounded * advantage)
            means.append(losses.mean())
            sums.append(losses.sum())
            num_tokens += len(old)
    if method not in ("dapo", "gkd"):
        loss = torch.stack(means).mean()
    else:
        loss = torch.stack(sums).sum() / num_tokens
    if method == "dr_grpo":
        loss = torch.stack(sums).sum() / (len(sums) * cfg.length)
    elif method == "chord":
        own = [scored(model, tokens[:num], tokens[num:], 1.0) for num, tokens in shown()]
        p = torch.cat(own).detach().exp()
        taught = -(p * (1 - p) * torch.cat(own)).sum() / p.numel()
        loss = (1 - SHARE) * loss + SHARE * taught
    if entropies:
        loss = loss - cfg.entropy_coef * torch.stack(entropies).sum() / num_tokens
    loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return loss.item(), as_on_disk(model, grads)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("method", SETTINGS)
def test_gradients_equal_transformers(
    workers: Workers, tiny: Tiny, method: str, layout: str
) -> None:
    world, parallel = LAYOUTS[layout]
    folder, model = tiny("qwen3_moe", parallel)
    found = groups(model)
    loss, wanted = reference(model, found, method)
    packs = packs_of(found, method, seq_len=60, min_packs=2)
    assert len(packs) > 1
    section = section_of(SETTINGS[method])
    answer = workers.run(world, ranks.gradients_of_packs, folder, parallel, packs, section)[0]
    assert answer[0] == pytest.approx(loss, rel=1e-4, abs=1e-6)
    for name, grad in answer[2].items():
        error = (grad - wanted[name]).norm() / wanted[name].norm().clamp(min=1e-9)
        assert error <= 1e-4, (name, error)


@pytest.mark.parametrize("method", [*SETTINGS, "ppo"])
def test_how_a_batch_is_cut_changes_nothing(workers: Workers, tiny: Tiny, method: str) -> None:
    settings = SETTINGS.get(method, {"name": "ppo"})
    section = section_of(settings)

    def run(model: Any, world: int, seq_len: int, min_packs: int, parallel: dict[str, int]) -> Any:
        packs = (ppo_packs if method == "ppo" else packs_of)(
            groups(model[1]), method, seq_len=seq_len, min_packs=min_packs
        )
        return workers.run(world, ranks.gradients_of_packs, model[0], parallel, packs, section)[0]

    uncut: dict[str, Any] = {}
    for world, seq_len, min_packs, parallel in (
        (1, 60, 2, {}),
        (1, 30, 4, {}),
        (1, 30, 15, {}),  # every answer in a pack of its own
        (2, 30, 18, {}),  # and blank packs beside them
        (2, 60, 2, {}),
        (2, 60, 2, {"tp": 2}),
        (2, 60, 2, {"pp": 2}),
    ):
        model = tiny("qwen3_moe", parallel)
        if model[0] not in uncut:
            uncut[model[0]] = run(model, 1, 1000, 1, {})
        whole = uncut[model[0]]
        loss, metrics, grads = run(model, world, seq_len, min_packs, parallel)
        assert loss == pytest.approx(whole[0], rel=1e-4, abs=1e-6)
        for name, value in metrics.items():
            assert value == pytest.approx(whole[1][name], rel=1e-3, abs=1e-5), name
        for name, grad in grads.items():
            error = (grad - whole[2][name]).norm() / whole[2][name].norm().clamp(min=1e-9)
            assert error <= 1e-4, (name, error)


def ppo_packs(found: list[Group], method: str, *, seq_len: int, min_packs: int) -> list[Packed]:
    """With values before the update that depend on the answer alone."""
    cfg: Any = TypeAdapter(MethodConfig).validate_python({"name": "ppo"})
    online = METHODS["ppo"].online
    assert online is not None
    rewards = torch.tensor([a.reward for g in found for a in g.answers])
    samples = [sample_of(a.trajectory) for g in found for a in g.answers]
    packs = pack_groups(found, {"reward": rewards}, seq_len=seq_len, min_packs=min_packs)
    for pack in packs:
        old, value = torch.zeros(pack.num_tokens), torch.zeros(pack.num_tokens)
        for n in range(pack.num_sequences):
            item = int(pack.extras["item"][n])
            if item >= 0:
                start, end = pack.cu_seqlens[n : n + 2].tolist()
                old[start:end] = torch.tensor(old_of(samples[item]))
                value[start:end] = 0.3 * torch.tensor(samples[item].logprobs)
        pack.per_token.update({"old_logp": old, "old_value": value})
        pack.per_token.update(online.targets(pack, cfg))
    return packs


@pytest.mark.parametrize("method", ["grpo", "dr_grpo", "dapo", "gspo"])
def test_cut_answers_are_left_out_after_they_have_counted(
    workers: Workers, tiny: Tiny, method: str
) -> None:
    """Of one group rewarded 1, 0, 0.5 the last answer was cut: the others' advantages are what
    they were, and it is not learned from.
    """
    folder, _ = tiny("qwen3_moe", {})
    ends: list[tuple[float, Any]] = [(1.0, "stop"), (0.0, "stop"), (0.5, "length")]
    answers = [
        GradedAnswer(
            Trajectory.of(Sample("p", i, (7,) * (i + 2), (-1.0,) * (i + 2), "", finish, 0)), reward
        )
        for i, (reward, finish) in enumerate(ends)
    ]
    group = Group(Prompt("p", (3, 4), {}), tuple(answers))
    found: dict[str, dict[int, float]] = {}
    for how in ("reward", "mask"):
        section = {"name": method, "truncated": how}
        section |= {"soft_length": 0} if method == "dapo" else {}
        sections = section_of(section) | {"rollout": {"max_tokens": 8}}
        found[how] = workers.run(1, ranks.lessons, folder, {}, [group], sections)[0]
    assert found["reward"].keys() == {2, 3, 4}
    assert found["mask"] == {size: found["reward"][size] for size in (2, 3)}
    assert found["mask"][2] == pytest.approx(0.5 if method == "dr_grpo" else 0.5 / (0.5 + 1e-4))
