"""What a method does in expectation, by enumeration: every word, or pair of words, that a small
policy can say, weighted by how likely it is said.
"""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from torch import Tensor

from moetrain.config.method import SECTIONS, MethodConfig
from moetrain.errors import ConfigError
from moetrain.methods import METHODS
from moetrain.methods import online as parts
from moetrain.methods.base import Out
from moetrain.ops.packed import Packed, concat, pack_one
from moetrain.testing.ranks import recipe_for

DOUBLE = torch.float64
WORDS, LENGTH = 6, 2
SAYINGS = list(itertools.product(range(WORDS), repeat=LENGTH))
WIDE = {"clip_low": 0.999, "clip_high": 1e9, "mismatch_cap": 1e9}  # nothing is cut


class Policy:
    """A table of logits [1 + WORDS, WORDS]: of the first word, then of one after each."""

    def __init__(self, seed: int, spread: float = 0.7):
        g = torch.Generator().manual_seed(seed)
        self.logits = spread * torch.randn(1 + WORDS, WORDS, generator=g, dtype=DOUBLE)

    def table(self) -> Tensor:
        return torch.log_softmax(self.logits, -1)

    def logp(self, saying: tuple[int, ...], table: Tensor | None = None) -> Tensor:
        """[LENGTH] of the words of a saying."""
        own = self.table() if table is None else table
        rows = (0, *(1 + word for word in saying[:-1]))
        return torch.stack([own[row, word] for row, word in zip(rows, saying, strict=True)])

    def moved(self, by: float, seed: int) -> "Policy":
        other = Policy(seed, by)
        other.logits += self.logits
        return other


NOW, REFERENCE = Policy(0), Policy(1)
MOVED = NOW.moved(0.5, 2)  # the policy that sampled, where NOW is some steps on
SERVED = MOVED.moved(0.3, 3)  # and how the rollout engine computes it


def config(settings: dict[str, Any]) -> Any:
    """Of a method that has no clip, without WIDE's."""
    known = SECTIONS[settings["name"]].model_fields
    own = {key: value for key, value in settings.items() if key in known or key not in WIDE}
    return TypeAdapter(MethodConfig).validate_python(own)


def expected(
    cfg: Any, old: Policy, sampler: Policy, rewards: dict[tuple[int, ...], float]
) -> Tensor:
    """[1 + WORDS, WORDS]: the expected gradient of the method's loss with respect to NOW's logits,
    of an answer drawn by `sampler`, summed over its tokens. All answers stand in one pack: a token
    weighs on no other answer's loss.
    """
    method = METHODS[cfg.name]
    assert method.online is not None
    pack = concat([answer(saying, old, sampler, rewards.get(saying, 0.0)) for saying in SAYINGS])
    pack.per_token.update(method.online.targets(pack, cfg))
    logp = torch.cat([NOW.logp(saying) for saying in SAYINGS]).requires_grad_()
    terms, _ = method.loss(Out(logp=logp, value=torch.zeros_like(logp)), pack, cfg, {})
    terms["loss"].backward()
    assert logp.grad is not None
    # Some take the mean over an answer's tokens, others their sum; rloo has one ratio for all.
    scale = LENGTH if cfg.name in ("grpo", "gspo", "chord", "sapo") else 1
    drawn = torch.stack([sampler.logp(saying).sum().exp() for saying in SAYINGS])
    weights = logp.grad.view(-1, LENGTH) * drawn[:, None] * scale
    return gradient(
        lambda now: sum((w * NOW.logp(s, now)).sum() for s, w in zip(SAYINGS, weights, strict=True))
    )


def answer(saying: tuple[int, ...], old: Policy, sampler: Policy, reward: float) -> Packed:
    given = torch.tensor([reward], dtype=DOUBLE)
    ones = torch.ones(LENGTH)
    return pack_one(
        0 * ones,
        0 * ones,
        ones,
        extras={
            "role": torch.tensor([1]),
            "advantage": given,
            "reward": given,
            "share": torch.ones(1, dtype=DOUBLE),
        },
        per_token={
            "old_logp": old.logp(saying),
            "rollout_logp": sampler.logp(saying),
            "ref_logp": REFERENCE.logp(saying),
            "old_value": torch.zeros(LENGTH, dtype=DOUBLE),
        },
    )


def gradient(of: Any) -> Tensor:
    """Of a function of NOW's log-probs [1 + WORDS, WORDS]."""
    logits = NOW.logits.clone().requires_grad_()
    of(torch.log_softmax(logits, -1)).backward()
    assert logits.grad is not None
    return logits.grad


def reached(policy: Policy) -> Tensor:
    """[1 + WORDS, 1]: how likely each row of the table is come to."""
    first = policy.table()[0].exp()
    return torch.cat([first.new_ones(1), first])[:, None]


def kl(at: Policy) -> Tensor:
    """Gradient of the summed KL(now || reference) a token, after beginnings that `at` says."""
    own = reached(at)
    return gradient(lambda now: (own * now.exp() * (now - REFERENCE.table())).sum())


def forward_kl(at: Policy) -> Tensor:
    """The same of KL(reference || now)."""
    own, ref = reached(at), REFERENCE.table()
    return gradient(lambda now: (own * ref.exp() * (ref - now)).sum())


def kl_of_whole_answers() -> Tensor:
    """Gradient of KL(now || reference) over sayings: the second word's part in the first's, too."""
    return gradient(
        lambda now: sum(
            NOW.logp(s, now).sum().exp() * (NOW.logp(s, now) - REFERENCE.logp(s)).sum()
            for s in SAYINGS
        )
    )


def cosine(a: Tensor, b: Tensor) -> float:
    return float(torch.cosine_similarity(a.flatten(), b.flatten(), 0))


IN_THE_LOSS = ("grpo", "dr_grpo", "dapo", "gspo", "chord", "cispo", "sapo")
WHERE = {"on policy": (NOW, NOW), "moved": (MOVED, MOVED), "served otherwise": (MOVED, SERVED)}


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("estimator", ["k2", "k3"])
@pytest.mark.parametrize("name", IN_THE_LOSS)
def test_a_kl_in_the_loss_has_the_kls_gradient(name: str, estimator: str, where: str) -> None:
    """However far the policy has moved since it sampled: TRL's use_bias_correction_kl."""
    old, sampler = WHERE[where]
    cfg = config({"name": name, "beta": 1.0, "kl_estimator": estimator, **WIDE})
    found = expected(cfg, old, sampler, {})
    if where == "served otherwise":  # weights are a token's: the beginnings stay the sampler's
        old = sampler
    torch.testing.assert_close(found, kl(old), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", IN_THE_LOSS)
def test_what_it_is_without_the_correction(name: str) -> None:
    plain = {"name": name, "beta": 1.0, "use_bias_correction_kl": False, **WIDE}
    k2, k3 = (config(plain | {"kl_estimator": own}) for own in ("k2", "k3"))
    torch.testing.assert_close(expected(k2, NOW, NOW, {}), kl(NOW), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(expected(k3, NOW, NOW, {}), forward_kl(NOW), rtol=1e-9, atol=1e-12)
    for cfg in (k2, k3):
        assert not torch.allclose(expected(cfg, MOVED, MOVED, {}), kl(MOVED), rtol=0.05)


def test_k1_in_the_loss_does_nothing_and_is_refused() -> None:
    table = NOW.table()[0]
    given = table.clone().requires_grad_()
    own = parts.divergence(torch.log_softmax(given, -1), REFERENCE.table()[0], "k1")
    (table.exp() * own).sum().backward()
    assert given.grad is not None and given.grad.abs().max() < 1e-12
    for name in IN_THE_LOSS:
        with pytest.raises(ConfigError, match="k1 in the loss does nothing"):
            recipe_with({"name": name, "beta": 0.1, "kl_estimator": "k1"})


def test_a_kl_in_the_reward_is_k1_and_has_the_kls_gradient() -> None:
    ppo = {"name": "ppo", "lam": 1.0, "whiten": False}
    for own in (ppo, {"name": "reinforce_pp", "scale_rewards": "none"}):
        found = expected(config(own | {"beta": 1.0} | WIDE), NOW, NOW, {})
        torch.testing.assert_close(found, kl_of_whole_answers(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("estimator", "points"), [("k2", -0.5), ("k3", -0.7)])
def test_other_estimators_in_the_reward_lead_elsewhere_and_are_refused(
    estimator: str, points: float
) -> None:
    """A word that the reference says often and the policy seldom: the KL wants more of it, k2 and
    k3 punish it.
    """
    now = torch.log_softmax(torch.tensor([1.4, 1.0, 1.1, 1.3, 1.2, 0.0], dtype=DOUBLE), 0)
    ref = torch.log_softmax(torch.tensor([0.2, 0.0, 0.3, -0.1, 0.0, 2.5], dtype=DOUBLE), 0)

    def pointing(kind: str) -> Tensor:
        given = now.clone().requires_grad_()
        weight = now.exp() * parts.divergence(now, ref, kind)
        (weight * torch.log_softmax(given, 0)).sum().backward()
        assert given.grad is not None
        return given.grad

    given = now.clone().requires_grad_()
    table = torch.log_softmax(given, 0)
    (table.exp() * (table - ref)).sum().backward()
    assert given.grad is not None and cosine(pointing("k1"), given.grad) > 1 - 1e-9
    assert cosine(pointing(estimator), given.grad) < points
    with pytest.raises(ConfigError, match=f"{estimator} in the reward leads elsewhere"):
        recipe_with({"name": "ppo", "beta": 0.1, "kl_estimator": estimator})


def recipe_with(method: dict[str, Any]) -> Any:
    extra = {"demonstrations": ["none"]} if method["name"] == "chord" else {}
    return recipe_for("none", {}, method=method, rollout={}, rewards=["length"], data=extra)


# Rewards: the gradient of what the policy earns


REWARDS = {saying: float((7 * a + 3 * b * b) % 5) - 2 for saying in SAYINGS for a, b in [saying]}


def earned() -> Tensor:
    """Gradient of minus the expected reward of an answer of NOW."""
    return gradient(lambda now: -sum(NOW.logp(s, now).sum().exp() * REWARDS[s] for s in SAYINGS))


@pytest.mark.parametrize("name", [*IN_THE_LOSS, "ppo", "rloo", "reinforce_pp"])
def test_the_surrogate_has_the_rewards_gradient(name: str) -> None:
    more = {"lam": 1.0, "whiten": False} if name == "ppo" else {}
    cfg = config({"name": name, "beta": 0.0, **WIDE, **more})
    torch.testing.assert_close(expected(cfg, NOW, NOW, REWARDS), earned(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "dapo", "chord", "cispo", "sapo", "ppo"])
def test_sequence_weights_make_the_samplers_answers_the_policys(name: str) -> None:
    """Answers drawn by another than the trainer's policy: weighted whole, the expectation is that
    of the policy's own; by the token, of its own tokens behind the sampler's beginnings.
    """
    more = {"lam": 1.0, "whiten": False} if name == "ppo" else {}
    whole = config({"name": name, "mismatch": "sequence", **WIDE, **more})
    torch.testing.assert_close(expected(whole, NOW, SERVED, REWARDS), earned(), rtol=1e-9, atol=0)
    by_token = config({"name": name, "mismatch": "tis", **WIDE, **more})
    wanted = gradient(
        lambda now: (
            -sum(
                (now[row, word] - NOW.table()[row, word]).exp()
                * (NOW.table()[row, word] - SERVED.table()[row, word]).exp()
                * SERVED.logp(s).sum().exp()
                * REWARDS[s]
                for s in SAYINGS
                for row, word in ((0, s[0]), (1 + s[0], s[1]))
            )
        )
    )
    torch.testing.assert_close(expected(by_token, NOW, SERVED, REWARDS), wanted)
    plain = config({"name": name, "mismatch": "none", **{k: WIDE[k] for k in CLIPS}, **more})
    assert not torch.allclose(expected(plain, NOW, SERVED, REWARDS), earned(), rtol=0.05)


CLIPS = ("clip_low", "clip_high")


@pytest.mark.parametrize(("kind", "cap"), [("tis", 1.1), ("mask", 1.1)])
def test_what_is_cut_is_cut_where_it_says(kind: str, cap: float) -> None:
    cfg = config({"name": "dapo", **WIDE, "mismatch": kind, "mismatch_cap": cap})
    weight = (NOW.table() - SERVED.table()).exp()
    inside = (weight <= cap) & (weight >= 1 / cap)
    assert 0 < int(inside.sum()) < inside.numel()
    kept = weight.clamp(max=cap) if kind == "tis" else weight * inside
    wanted = gradient(
        lambda now: (
            -sum(
                kept[row, word]
                * (now[row, word] - NOW.table()[row, word]).exp()
                * SERVED.logp(s).sum().exp()
                * REWARDS[s]
                for s in SAYINGS
                for row, word in ((0, s[0]), (1 + s[0], s[1]))
            )
        )
    )
    torch.testing.assert_close(expected(cfg, NOW, SERVED, REWARDS), wanted)


# Answers drawn from a part of the distribution


def test_tokens_that_were_left_out_are_left_out_of_what_is_learned() -> None:
    """Renormalised over the three words of each row that could be drawn, answers have the gradient
    of what such answers earn. With the mass of those words as a number beside the log-prob of the
    whole distribution the ratios are the same, and the gradient is another: it draws the policy
    towards what was kept, whatever it earned.
    """
    out = NOW.logits < NOW.logits.topk(3, -1).values[:, -1:]

    def cut(table: Tensor) -> Tensor:
        return torch.log_softmax(table.masked_fill(out, -torch.inf), -1)

    drawn = {s: float(NOW.logp(s, cut(NOW.table())).sum().exp()) for s in SAYINGS}
    drawn = {s: share for s, share in drawn.items() if share}
    assert len(drawn) == 9 and sum(drawn.values()) == pytest.approx(1)

    def learned(of: Callable[[Tensor], Tensor], rewards: dict[tuple[int, ...], float]) -> Tensor:
        return gradient(
            lambda now: sum(p * NOW.logp(s, of(now)).sum() * rewards[s] for s, p in drawn.items())
        )

    earned = gradient(
        lambda now: sum(NOW.logp(s, cut(now)).sum().exp() * REWARDS[s] for s in drawn)
    )
    torch.testing.assert_close(learned(cut, REWARDS), earned, rtol=1e-9, atol=1e-12)
    assert (learned(lambda now: now, REWARDS) - earned).norm() > 0.1 * earned.norm()
    same = dict.fromkeys(SAYINGS, 1.0)
    assert learned(cut, same).abs().max() < 1e-12
    assert learned(lambda now: now, same).abs().max() > 0.1
