"""Distillation of a teacher's distributions, over given answers (distill) or the student's own
(gkd, arXiv 2306.13649):

l_t = (1 - a) D(teacher_t, student_t) - a log student_t(label), mean over tokens, with the
generalised Jensen-Shannon divergence D over the teacher's k likeliest tokens and all others as one.
A divergence of joined tokens is at most that of the tokens themselves, and 0 only where they agree.
"""

from typing import Any

from torch import Tensor

from moetrain.config.distill import DistillMethod, GkdMethod
from moetrain.methods.base import Known, Method, Metrics, Online, Out, Terms, count_tokens
from moetrain.methods.divergence import generalised_jsd, kl, with_rest
from moetrain.methods.online import (
    answer_mask,
    broadcast_advantage,
    count_entropy,
    entropy_bonus,
    learned,
    online_metrics,
    tokens_of,
)
from moetrain.ops.packed import Packed

NEEDS = frozenset({"logp", "at_teacher"})
NOTHING = -100.0  # a log-prob of no probability, which can be subtracted from itself


def compared(out: Out, batch: Packed, mask: Tensor, interpolation: float) -> tuple[Tensor, Metrics]:
    """D [t], 0 outside the mask [t]; and what there is to see."""
    assert out.at_teacher is not None
    outside = mask[:, None] == 0
    student = with_rest(out.at_teacher.masked_fill(outside, NOTHING))
    teacher = with_rest(batch.per_token["teacher_top"].masked_fill(outside, NOTHING))
    covered = 1 - teacher[:, -1].exp()
    seen = {"kl/teacher": kl(student.detach(), teacher), "teacher/covered": covered}
    values = generalised_jsd(student, teacher, interpolation) * mask
    return values, {name: ((x * mask).sum(), mask.sum()) for name, x in seen.items()}


def loss(out: Out, batch: Packed, cfg: DistillMethod, known: Known) -> tuple[Terms, Metrics]:
    """Over the tokens that the mask keeps."""
    values, metrics = compared(out, batch, batch.loss_mask, cfg.interpolation)
    nll = -(out.logp * batch.loss_mask)
    return {"loss": ((1 - cfg.answer_weight) * values + cfg.answer_weight * nll).sum()}, metrics


def own_loss(out: Out, batch: Packed, cfg: GkdMethod, known: Known) -> tuple[Terms, Metrics]:
    """Over the student's own answers; which weights drew them changes nothing."""
    tokens = tokens_of(out, batch, cfg, "token")
    values, metrics = compared(out, batch, tokens.mask, cfg.interpolation)
    terms = {"loss": (values * learned(batch, tokens.mask)).sum()}
    return terms | entropy_bonus(out, batch, cfg, tokens), (
        online_metrics(out, batch, cfg, tokens) | metrics
    )


def count_own(batch: Packed, cfg: GkdMethod) -> Terms:
    """Number of the answers' tokens."""
    return {"loss": answer_mask(batch).sum()} | count_entropy(batch, cfg)


def no_advantages(rewards: Tensor, group: Tensor, cfg: Any) -> Tensor:
    """[n] zeros: no answer is judged by another."""
    return rewards.new_zeros(rewards.shape)


DISTILL = Method("distill", loss, count_tokens, NEEDS)
GKD = Method(
    "gkd",
    own_loss,
    count_own,
    NEEDS | {"entropy"},
    online=Online(advantages=no_advantages, targets=broadcast_advantage),
)
