"""On-policy distillation: the student's own answers, and for each token the teacher's word as its
advantage,

A_t = sum_(i >= t) d^(i - t) (log teacher_i - log student_i) + w A^rewards,

the student as it was before the step, into PPO's clip; mean over tokens. With d = 0 and w = 0 the
gradient is that of the reverse KL of each token's distribution; with d = 1 that of the whole
answer's (MiniLLM, arXiv 2306.08543, eq. 5).
"""

from dataclasses import replace

import torch
from torch import Tensor

from moetrain.config.distill import OnPolicyDistillMethod
from moetrain.methods import advantages
from moetrain.methods.base import Known, Metrics, Out, Terms
from moetrain.methods.online import answer_mask, gae
from moetrain.methods.policy import BY_TOKEN, ONLINE, clip, policy_gradient, targets, terms_of
from moetrain.ops.packed import Packed


def of_rewards(rewards: Tensor, group: Tensor, cfg: OnPolicyDistillMethod) -> Tensor:
    """[n] what they add to the teacher's word."""
    if not cfg.reward_weight:
        return rewards.new_zeros(rewards.shape)
    return cfg.reward_weight * advantages.advantages(rewards, group, cfg)


def with_teacher(batch: Packed, cfg: OnPolicyDistillMethod) -> dict[str, Tensor]:
    """Targets whose `advantage` [t] has the teacher's word, too."""
    values = targets(batch, cfg)
    mask = answer_mask(batch)
    word = (batch.per_token["teacher_logp"] - batch.per_token["old_logp"]) * mask
    ids = batch.sequence_ids
    ends = torch.cat([ids[1:] != ids[:-1], ids.new_ones(1).bool()])
    total, _ = gae(word, torch.zeros_like(word), ends, cfg.discount, 1.0)
    return values | {"advantage": values["advantage"] + total * mask}


def loss(
    out: Out, batch: Packed, cfg: OnPolicyDistillMethod, known: Known
) -> tuple[Terms, Metrics]:
    """As of the other policy gradients."""
    terms, metrics = terms_of(out, batch, cfg, clip, BY_TOKEN)
    mask = answer_mask(batch)
    away = (batch.per_token["old_logp"] - batch.per_token["teacher_logp"]) * mask
    return terms, metrics | {"kl/teacher": (away.sum(), mask.sum())}


ON_POLICY_DISTILL = replace(
    policy_gradient(
        "on_policy_distill",
        BY_TOKEN,
        online=replace(ONLINE, advantages=of_rewards, targets=with_teacher),
    ),
    loss=loss,
)
