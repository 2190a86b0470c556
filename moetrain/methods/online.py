"""What methods that learn from rollouts are made of: advantages, ratios, clipping, KL, corrections.

Legend: n answers of a batch, t tokens of a pack, q sequences of a pack. All pure, fp32.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from moetrain.config.online_base import ClippedMethod, GroupMethod, Level, OnlineMethod
from moetrain.methods.base import Metrics, Out, Terms
from moetrain.ops.packed import ANSWER, Packed
from moetrain.ops.scan import decayed_sums
from moetrain.ops.segment import segment_sum

# Advantages, from the rewards [n] of all answers and the group [n] of each


def _over_groups(values: Tensor, group: Tensor) -> Tensor:
    """[n] in fp64: the sum of `values` over each answer's group."""
    sums = values.new_zeros(int(group.max()) + 1, dtype=torch.float64)
    return sums.index_add(0, group, values.double())[group]


def group_size(rewards: Tensor, group: Tensor) -> Tensor:
    """[n] fp64, the answers in each one's group."""
    return _over_groups(torch.ones_like(rewards), group)


def group_mean(rewards: Tensor, group: Tensor) -> Tensor:
    """[n] fp64, the mean reward of each answer's group."""
    return _over_groups(rewards, group) / group_size(rewards, group)


def group_std(rewards: Tensor, group: Tensor) -> Tensor:
    """[n] fp64, the deviation (with n - 1) of each answer's group; 0 for an answer alone."""
    squares = (rewards - group_mean(rewards, group)).square()
    return (_over_groups(squares, group) / (group_size(rewards, group) - 1).clamp(min=1)).sqrt()


def without_signal(rewards: Tensor, group: Tensor, cfg: object) -> Tensor:
    """[n] bool: all rewards of its group are equal (DAPO, arXiv 2503.14476, eq. 11)."""
    ends = rewards.new_zeros(2, int(group.max()) + 1)
    for row, reduce in zip(ends, ("amax", "amin"), strict=True):
        row.scatter_reduce_(0, group, rewards, reduce, include_self=False)
    return (ends[0] == ends[1])[group]


def centred(rewards: Tensor, group: Tensor, cfg: object) -> Tensor:
    """r - mean of its group (Dr. GRPO, arXiv 2503.20783, section 3.1); exactly 0 without signal,
    where what rounding leaves would be divided by a deviation of nothing else.
    """
    centred_rewards = rewards - group_mean(rewards, group)
    return centred_rewards.masked_fill(without_signal(rewards, group, cfg), 0.0).to(rewards.dtype)


def overlong(lengths: Tensor, max_length: int, soft_length: int) -> Tensor:
    """[n] from 0 to -1 over the last `soft_length` tokens before `max_length` (DAPO, eq. 13)."""
    return -((lengths - (max_length - soft_length)) / soft_length).clamp(0, 1)


def with_overlong(rewards: Tensor, lengths: Tensor, cut: Tensor, cfg: OnlineMethod) -> Tensor:
    """Rewards [n] with the penalty of long answers, where the recipe has one."""
    if not cfg.soft_length:
        return rewards
    assert cfg.max_length is not None, "a recipe says where the penalty is"
    return rewards + overlong(lengths, cfg.max_length, cfg.soft_length)


# Over the tokens of a pack


@dataclass(frozen=True)
class Tokens:
    """A pack's sampled answers: values per token [t], zero outside them."""

    mask: Tensor
    own_ratio: Tensor  # pi / pi_old of the token
    ratio: Tensor  # of what the method takes as one action: a token, or its answer
    advantage: Tensor
    weight: Tensor  # for what sampler and trainer disagree on, no gradient

    @property
    def num(self) -> Tensor:
        return self.mask.sum()


def answer_mask(batch: Packed) -> Tensor:
    """[t] fp32: the scored tokens of sampled answers."""
    return batch.loss_mask * spread(batch, (batch.extras["role"] == ANSWER).float())


def spread(batch: Packed, values: Tensor) -> Tensor:
    """[q] -> [t]."""
    return values[batch.sequence_ids.to(values.device)]


def lengths(batch: Packed, mask: Tensor) -> Tensor:
    """[q] tokens of each sequence under the mask, at least 1."""
    return segment_sum(mask, batch.cu_seqlens).clamp(min=1)


def tokens_of(out: Out, batch: Packed, cfg: OnlineMethod, level: Level = "token") -> Tokens:
    """Ratios to the policy before the batch's first update (PPO, arXiv 1707.06347, eq. 6)."""
    mask = answer_mask(batch)
    gap = (out.logp - batch.per_token["old_logp"]) * mask
    ratio = torch.exp(gap)
    return Tokens(
        mask=mask,
        own_ratio=ratio,
        ratio=ratio if level == "token" else whole_ratio(gap, batch, mask, level),
        advantage=batch.per_token["advantage"] * mask,
        weight=correction(batch, cfg, mask),
    )


def whole_ratio(gap: Tensor, batch: Packed, mask: Tensor, level: Level) -> Tensor:
    """[t] exp of the mean (GSPO, arXiv 2507.18071, eq. 7) or the sum (RLOO, arXiv 2402.14740) of an
    answer's log-ratios, on each of its tokens. A sum stops where a float would: 0 times infinity is
    no number.
    """
    total = segment_sum(gap, batch.cu_seqlens)
    total = total / lengths(batch, mask) if level == "sequence" else total.clamp(max=60)
    return spread(batch, total.exp()) * mask


def broadcast_advantage(batch: Packed, cfg: object) -> dict[str, Tensor]:
    """`targets` of methods whose answers have one advantage."""
    mask = answer_mask(batch)
    return {"advantage": spread(batch, batch.extras["advantage"]) * mask}


def clipped(ratio: Tensor, advantage: Tensor, cfg: ClippedMethod) -> Tensor:
    """-min(r A, clip(r, 1 - low, 1 + high) A) (PPO, eq. 7; two bounds: DAPO, eq. 10), with r of
    what is discouraged at most delta (dual clip, arXiv 1912.09729, eq. 5).
    """
    bounded = ratio.clamp(1 - cfg.clip_low, 1 + cfg.clip_high)
    if cfg.delta is not None:
        ratio = ratio.clamp(max=cfg.delta)
    return -torch.minimum(ratio * advantage, bounded * advantage)


def divergence(logp: Tensor, ref_logp: Tensor, estimator: str) -> Tensor:
    """KL(pi || ref) a token where tokens are pi's own: k1 = log(pi / ref), k2 = k1^2 / 2,
    k3 = ref / pi - 1 + k1 (Schulman 2020; GRPO, eq. 4, is k3).
    """
    k1 = logp - ref_logp
    if estimator == "k1":
        return k1
    return 0.5 * k1.square() if estimator == "k2" else torch.expm1(-k1) + k1


def loss_kl(out: Out, batch: Packed, cfg: GroupMethod, tokens: Tokens) -> Tensor:
    """[t] the KL to the reference as a term of the loss; zero outside answers.

    With the bias corrected (DeepSeek-V3.2, arXiv 2512.02556; TRL 1.16's default) its expected
    gradient is that of KL(pi || ref), however far pi is from the policy that sampled: w r k3, whose
    gradient is w r k1 grad log pi, or k2 with w r held fixed, whose gradient is the same. Without,
    k3 has that of KL(ref || pi), and k2 the right one on the first step alone.
    """
    reference = batch.per_token["ref_logp"]
    if not cfg.use_bias_correction_kl:
        return divergence(out.logp, reference, cfg.kl_estimator) * tokens.mask
    if cfg.kl_estimator == "k2":
        held = (tokens.weight * tokens.own_ratio).detach()
        return held * divergence(out.logp, reference, "k2") * tokens.mask
    # r (ref / pi - 1 + k1) with ref / pi multiplied out, which may be larger than a float.
    away = torch.expm1((reference - batch.per_token["old_logp"]) * tokens.mask)
    ratio = tokens.own_ratio
    return tokens.weight * (away - (ratio - 1) + ratio * (out.logp - reference)) * tokens.mask


def correction(batch: Packed, cfg: OnlineMethod, mask: Tensor) -> Tensor:
    """[t] weights pi_old / pi_sampler, cut as `cfg.mismatch` says: the sampler's numerics, and
    weights that are some steps old, make another distribution than the trainer's.

    tis: w brought between floor and cap (arXiv 2508.09989's truncated importance sampling, with
    cap alone); mask: w where it is between them, else 0 (IcePop). sequence, sequence_mask: the
    same with the product of w over the answer.
    """
    if cfg.mismatch == "none":
        return mask
    gap = (batch.per_token["old_logp"] - batch.per_token["rollout_logp"]) * mask
    if cfg.mismatch.startswith("sequence"):
        gap = spread(batch, segment_sum(gap, batch.cu_seqlens))
    weight = gap.exp()
    within = weight.clamp(cfg.floor, cfg.mismatch_cap)
    if cfg.mismatch.endswith("mask"):
        within = weight.masked_fill(within != weight, 0.0)
    return within * mask


def gae(
    rewards: Tensor,
    values: Tensor,
    ends: Tensor,
    gamma: float,
    lam: float,
    beyond: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (arXiv 1506.02438, eq. 16) over episodes laid end to end.

    rewards, values [t]; ends [t] bool: the last token of an episode, after which the value is
    `beyond` [t] (0 unless an episode was cut). Returns (advantages [t], returns [t] = advantages +
    values), summed in fp64.
    """
    last = torch.zeros_like(values) if beyond is None else beyond
    after = torch.where(ends, last, values.roll(-1))
    delta = torch.add(rewards.double(), after, alpha=gamma).sub_(values)
    advantages = decayed_sums(delta, (~ends).double().mul_(gamma * lam))
    returns = advantages + values
    return advantages.to(values.dtype), returns.to(values.dtype)


def off_policy_mask(out: Out, batch: Packed, threshold: float, tokens: Tokens) -> Tensor:
    """[t] 0 on answers of negative advantage that the policy has left behind: the mean of
    log(pi_sampler / pi) over their tokens is above the threshold (DeepSeek-V3.2, arXiv 2512.02556,
    eq. 9), else 1.
    """
    size = lengths(batch, tokens.mask)
    gap = (batch.per_token["rollout_logp"] - out.logp.detach()) * tokens.mask
    far = segment_sum(gap, batch.cu_seqlens) / size > threshold
    worse = segment_sum(tokens.advantage, batch.cu_seqlens) < 0
    return spread(batch, (~(far & worse)).to(tokens.mask.dtype))


def learned(batch: Packed, mask: Tensor) -> Tensor:
    """[t] the answers' tokens that the policy learns from: all, or those of most entropy."""
    chosen = batch.per_token.get("high_entropy")
    return mask if chosen is None else mask * chosen


def entropy_bonus(
    out: Out, batch: Packed, cfg: OnlineMethod, tokens: Tokens, share: Tensor | float = 1.0
) -> Terms:
    """The term "entropy", where there is a bonus: minus the sum over tokens; its mean is taken off
    the loss, however a method averages (TRL 1.16).
    """
    if not cfg.entropy_coef:
        return {}
    assert out.entropy is not None
    total = (out.entropy * learned(batch, tokens.mask) * share).sum()
    return {"entropy": -cfg.entropy_coef * total}


def count_entropy(batch: Packed, cfg: OnlineMethod) -> Terms:
    """What that sum is divided by."""
    return {"entropy": learned(batch, answer_mask(batch)).sum()} if cfg.entropy_coef else {}


def online_metrics(out: Out, batch: Packed, cfg: OnlineMethod, tokens: Tokens) -> Metrics:
    """What there is to see in every method, as sums over answers' tokens."""
    gap = (batch.per_token["rollout_logp"] - batch.per_token["old_logp"]) * tokens.mask
    num = tokens.num
    weight = tokens.weight.detach()
    drift = torch.expm1(-gap) + gap
    metrics: Metrics = {
        "mismatch/kl": ((drift * tokens.mask).sum(), num),  # KL(sampler || trainer)
        "mismatch/abs": (gap.abs().sum(), num),
        "mismatch/weight": (weight.sum(), num),
        "ratio": ((tokens.ratio.detach() * tokens.mask).sum(), num),
    }
    if cfg.bounds is not None:
        low, high = cfg.bounds
        metrics["clip/low"] = (
            (((tokens.ratio < low) & (tokens.advantage < 0)) * tokens.mask).sum(),
            num,
        )
        metrics["clip/high"] = (
            (((tokens.ratio > high) & (tokens.advantage > 0)) * tokens.mask).sum(),
            num,
        )
    if out.entropy is not None:
        metrics["entropy"] = ((out.entropy.detach() * tokens.mask).sum(), num)
    reference = batch.per_token.get("ref_logp")
    if reference is not None:
        total = (divergence(out.logp.detach(), reference, "k3") * tokens.mask).sum()
        metrics["kl"] = total, (batch.extras["role"] == ANSWER).sum().float()
    return metrics
