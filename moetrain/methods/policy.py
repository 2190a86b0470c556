"""Methods with a policy gradient and no value head, made of parts that go together: what a token
or an answer adds to the loss (a surrogate), and how that is averaged over a batch.

l_t = w_t s(r_t, A_t) + beta KL_t, with r_t = pi / pi_old of what is one action, A_t the advantage,
and w_t for what sampler and trainer disagree on.

Legend: n answers of a batch, t tokens of a pack.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moetrain.config.online_base import GroupMethod
from moetrain.methods import advantages
from moetrain.methods.base import Known, Method, Metrics, Online, Out, Terms
from moetrain.methods.online import (
    Tokens,
    answer_mask,
    broadcast_advantage,
    clipped,
    count_entropy,
    divergence,
    entropy_bonus,
    gae,
    learned,
    lengths,
    loss_kl,
    off_policy_mask,
    online_metrics,
    spread,
    tokens_of,
    with_overlong,
    without_signal,
)
from moetrain.ops.packed import ANSWER, Packed

NEEDS = frozenset({"logp", "entropy"})
Surrogate = Callable[[Tokens, Tensor, Any], Tensor]
"""(tokens, their log-probs [t], cfg) -> losses [t]."""


@dataclass(frozen=True)
class Mean:
    """How tokens are averaged: sum_t share_t l_t / number."""

    share: Callable[[Packed, Tensor], Tensor]  # (batch, mask [t]) -> [t]
    number: Callable[[Packed, Any], Tensor]  # (batch, cfg) -> scalar


def num_answers(batch: Packed) -> Tensor:
    """fp32 scalar."""
    return (batch.extras["role"] == ANSWER).sum().float()


def clip(tokens: Tokens, logp: Tensor, cfg: Any) -> Tensor:
    """PPO's."""
    return clipped(tokens.ratio, tokens.advantage, cfg)


BY_ANSWER = Mean(
    lambda batch, mask: spread(batch, 1 / lengths(batch, mask)),
    lambda batch, cfg: num_answers(batch),
)
BY_TOKEN = Mean(lambda batch, mask: mask, lambda batch, cfg: answer_mask(batch).sum())


def losses(
    out: Out, batch: Packed, cfg: GroupMethod, tokens: Tokens, surrogate: Surrogate
) -> Tensor:
    """[t], zero outside answers."""
    values = tokens.weight * surrogate(tokens, out.logp, cfg) * learned(batch, tokens.mask)
    if cfg.off_policy_mask_threshold is not None:
        values = values * off_policy_mask(out, batch, cfg.off_policy_mask_threshold, tokens)
    if cfg.beta and not cfg.kl_in_reward:
        values = values + cfg.beta * loss_kl(out, batch, cfg, tokens)
    return values


def terms_of(
    out: Out,
    batch: Packed,
    cfg: GroupMethod,
    surrogate: Surrogate,
    mean: Mean,
    share: Tensor | float = 1.0,
) -> tuple[Terms, Metrics]:
    """The terms of a loss, each answer's part of them weighed by its `share` [t], and metrics."""
    tokens = tokens_of(out, batch, cfg, cfg.importance_sampling_level)
    total = losses(out, batch, cfg, tokens, surrogate) * mean.share(batch, tokens.mask) * share
    terms = {"loss": total.sum()} | entropy_bonus(out, batch, cfg, tokens, share)
    return terms, online_metrics(out, batch, cfg, tokens)


def counts_of(batch: Packed, cfg: GroupMethod, mean: Mean) -> Terms:
    """What these are divided by."""
    return {"loss": mean.number(batch, cfg)} | count_entropy(batch, cfg)


def targets(batch: Packed, cfg: GroupMethod) -> dict[str, Tensor]:
    """An answer's tokens have its advantage; with a KL in the reward of each, also what follows."""
    values = broadcast_advantage(batch, cfg)
    if cfg.beta and cfg.kl_in_reward and cfg.by_token:
        mask = answer_mask(batch)
        k1 = divergence(batch.per_token["old_logp"], batch.per_token["ref_logp"], "k1")
        whole = batch.sequence_ids
        ends = torch.cat([whole[1:] != whole[:-1], whole.new_ones(1).bool()])
        left, _ = gae(-cfg.beta * k1 * mask, torch.zeros_like(k1), ends, 1.0, 1.0)
        values["advantage"] = values["advantage"] + left * mask
    return values


def penalised(cfg: GroupMethod) -> bool:
    """Whether the KL of a whole answer is taken off its reward."""
    return bool(cfg.beta) and cfg.kl_in_reward and not cfg.by_token


def drops(rewards: Tensor, group: Tensor, cfg: GroupMethod) -> Tensor:
    """Groups of equal rewards, with dynamic sampling."""
    return without_signal(rewards, group, cfg) & cfg.dynamic_sampling


def online(**more: Any) -> Online:
    """How answers become advantages, in all of these methods."""
    return Online(
        advantages.advantages,
        shape=with_overlong,
        drops=drops,
        targets=targets,
        whiten=advantages.whiten,
        truncated=lambda cfg: cfg.truncated,
        penalised=penalised,
        **more,
    )


def policy_gradient(
    name: str, mean: Mean, surrogate: Surrogate = clip, online: Online | None = None
) -> Method:
    """The method that these parts make."""

    def loss(out: Out, batch: Packed, cfg: Any, known: Known) -> tuple[Terms, Metrics]:
        return terms_of(out, batch, cfg, surrogate, mean)

    def count(batch: Packed, cfg: Any) -> Terms:
        return counts_of(batch, cfg, mean)

    return Method(name, loss, count, NEEDS, online=online or ONLINE)


ONLINE = online()
