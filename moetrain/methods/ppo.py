"""Proximal policy optimisation (arXiv 1707.06347, eq. 7) with a value head on the policy:

L = -mean_t w_t min(r_t A_t, clip(r_t) A_t)
    + c mean_t max((v - R)^2, (clip(v, v_old +- e) - R)^2) / 2.

A_t and R_t come from generalised advantage estimation over an answer whose reward stands on its
last token; the KL to the reference is taken off each token's reward as k1 (InstructGPT, arXiv
2203.02155, eq. 2), so it is no term of the loss: there the sum of what follows a token is its
weight, and log(pi / ref) is what makes that the KL's gradient. A_t is whitened over the batch
(arXiv 2006.05990): while the values are still wrong, all that was sampled would else be pushed
away, or drawn near.
"""

import torch
from torch import Tensor

from moetrain.config.online import PpoMethod
from moetrain.methods.base import Carried, Known, Method, Metrics, Online, Out, Running, Terms
from moetrain.methods.online import (
    answer_mask,
    clipped,
    count_entropy,
    divergence,
    entropy_bonus,
    gae,
    learned,
    online_metrics,
    tokens_of,
    with_overlong,
)
from moetrain.methods.running import WEIGHT, normalised, steered, with_rewards
from moetrain.ops.packed import Packed

NEEDS = frozenset({"logp", "entropy", "value"})


def raw(rewards: Tensor, group: Tensor, cfg: object) -> Tensor:
    """No baseline of the group: the value head is the baseline."""
    return rewards


def shape(rewards: Tensor, length: Tensor, truncated: Tensor, cfg: PpoMethod) -> Tensor:
    """An answer that would have gone on has no grade of its own where values stand in for it, and a
    penalty where that is asked for; how long an answer is counts, where the recipe says so.
    """
    if cfg.truncated == "bootstrap":
        rewards = rewards.masked_fill(truncated, 0.0)
    else:
        rewards = rewards - cfg.missing_eos_penalty * truncated.to(rewards.dtype)
    return with_overlong(rewards, length, truncated, cfg)


def rescale(
    rewards: Tensor, truncated: Tensor, carried: Carried, cfg: PpoMethod
) -> tuple[Tensor, dict[str, float]]:
    """Rewards by the moments of all so far, of this batch's too, then cut; before `shape`. Answers
    whose grade is not taken have no part in the moments.
    """
    moved = dict(carried)
    if cfg.reward_norm != "none":
        taken = rewards if cfg.truncated == "reward" else rewards[~truncated]
        moved = with_rewards(carried, taken)
        rewards = normalised(rewards, moved, cfg.reward_norm)
    if cfg.reward_clip is not None:
        rewards = rewards.clamp(-cfg.reward_clip, cfg.reward_clip)
    return rewards, moved


def adapted(cfg: PpoMethod, carried: Carried) -> PpoMethod:
    """With the weight of the KL that the batches before have led to."""
    return cfg.model_copy(update={"beta": carried[WEIGHT]}) if WEIGHT in carried else cfg


def steer(carried: Carried, kl: float, num: int, cfg: PpoMethod) -> dict[str, float]:
    """After a batch of `num` answers whose mean KL was `kl`."""
    if cfg.kl_target is None:
        return dict(carried)
    weight = carried.get(WEIGHT, cfg.beta)
    return {**carried, WEIGHT: steered(weight, kl, cfg.kl_target, num, cfg.kl_horizon)}


def truncated(cfg: PpoMethod) -> str:
    """As the recipe says."""
    return cfg.truncated


def targets(batch: Packed, cfg: PpoMethod) -> dict[str, Tensor]:
    """`advantage` and `return` [t]; the `reward` [q] stands on each answer's last token, and where
    the sequence goes on behind it, so does the value.
    """
    mask = answer_mask(batch)
    keep = mask > 0
    whole = batch.sequence_ids
    sequence = whole[keep]
    ends = torch.cat([sequence[1:] != sequence[:-1], sequence.new_ones(1).bool()])
    rewards = torch.where(ends, batch.extras["reward"][sequence], 0.0)
    if cfg.beta:
        old, ref = batch.per_token["old_logp"][keep], batch.per_token["ref_logp"][keep]
        rewards = rewards - cfg.beta * divergence(old, ref, cfg.kl_estimator)
    values = batch.per_token["old_value"]
    goes_on = torch.cat([whole[1:] == whole[:-1], whole.new_zeros(1).bool()])
    beyond = torch.where(goes_on, values.roll(-1), 0.0)[keep]
    estimates = gae(rewards, values[keep], ends, cfg.gamma, cfg.lam, beyond)
    advantage, returns = (one.new_zeros(keep.shape).masked_scatter(keep, one) for one in estimates)
    return {"advantage": advantage, "return": returns}


def whiten(cfg: PpoMethod) -> bool:
    """As the recipe says."""
    return cfg.whiten


def loss(out: Out, batch: Packed, cfg: PpoMethod, known: Known) -> tuple[Terms, Metrics]:
    """Each token counts the same."""
    assert out.value is not None
    tokens = tokens_of(out, batch, cfg)
    policy = (
        tokens.weight * clipped(tokens.ratio, tokens.advantage, cfg) * learned(batch, tokens.mask)
    )
    old, aim = batch.per_token["old_value"], batch.per_token["return"]
    near = old + (out.value - old).clamp(-cfg.value_clip, cfg.value_clip)
    errors = 0.5 * torch.maximum((out.value - aim).square(), (near - aim).square()) * tokens.mask
    metrics = online_metrics(out, batch, cfg, tokens) | {
        "value/loss": (errors.detach().sum(), tokens.num),
        "value/mean": ((out.value.detach() * tokens.mask).sum(), tokens.num),
    }
    terms = {"loss": policy.sum(), "value": cfg.value_weight * errors.sum()}
    return terms | entropy_bonus(out, batch, cfg, tokens), metrics


def count(batch: Packed, cfg: PpoMethod) -> Terms:
    """Tokens of all answers, for both terms."""
    num = answer_mask(batch).sum()
    return {"loss": num, "value": num} | count_entropy(batch, cfg)


PPO = Method(
    "ppo",
    loss,
    count,
    NEEDS,
    online=Online(
        raw,
        shape,
        targets=targets,
        whiten=whiten,
        truncated=truncated,
        running=Running(rescale, adapted, steer),
    ),
)
