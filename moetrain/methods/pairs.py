"""What the methods on answers share: each answer's log-probs, and what a person wants to see.

Legend: t tokens of the batch, n sequences, m pairs. A sequence's role is 1 (chosen), 2 (rejected)
or 0 (a shared prompt, padding); the k-th chosen and the k-th rejected one are a pair.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from moetrain.methods.base import Metrics, Out, Terms
from moetrain.ops.packed import Packed
from moetrain.ops.segment import segment_sum

CHOSEN, REJECTED, MISMATCHED = 1, 2, 3


@dataclass(frozen=True)
class Answers:
    """The answers of one role: sums over their scored tokens, all [m] fp32."""

    logp: Tensor
    lengths: Tensor
    ref_logp: Tensor | None  # the reference's, for methods that have one

    @property
    def mean(self) -> Tensor:
        """[m] log-prob a token."""
        return self.logp / self.lengths

    @property
    def ratio(self) -> Tensor:
        """[m] log pi(y|x) - log ref(y|x)."""
        assert self.ref_logp is not None, "the batch has no reference log-probs"
        return self.logp - self.ref_logp

    @property
    def mean_ratio(self) -> Tensor:
        """[m] the same a token."""
        return self.ratio / self.lengths


def answers(out: Out, batch: Packed, role: int) -> Answers:
    """The answers of `role`, in the order of the batch."""
    here = batch.extras["role"] == role
    reference = batch.extras.get("ref_logp")
    return Answers(
        logp=segment_sum(out.logp * batch.loss_mask, batch.cu_seqlens)[here],
        lengths=segment_sum(batch.loss_mask, batch.cu_seqlens)[here],
        ref_logp=None if reference is None else reference[here],
    )


def tail_weights(batch: Packed, alpha: float) -> Tensor:
    """[t]: 1 for an answer's first scored tokens, as many as the shorter answer of its pair has,
    and alpha for those that the longer one has behind them.
    """
    role, device = batch.extras["role"], batch.loss_mask.device
    shared = segment_sum(batch.loss_mask, batch.cu_seqlens)
    shorter = torch.minimum(shared[role == CHOSEN], shared[role == REJECTED])
    shared = shared.index_put((role == CHOSEN,), shorter).index_put((role == REJECTED,), shorter)
    counted = batch.loss_mask.cumsum(0)
    before = torch.cat([counted.new_zeros(1), counted])[batch.cu_seqlens[:-1].long().to(device)]
    ids = batch.sequence_ids.to(device)
    return torch.where(counted - before[ids] <= shared[ids], 1.0, alpha)


def certainty(out: Out, batch: Packed, role: int) -> Tensor:
    """[m], no gradient: exp of the mean over an answer's tokens of log p - log sum p^2, the second
    of which is what the policy's own tokens have in the mean (WPO, arXiv 2406.11827, eq. 2).
    """
    assert out.log_squares is not None, "the head was not asked for squares"
    scored = answers(Out(logp=(out.logp - out.log_squares).detach()), batch, role)
    return scored.mean.exp()


def num_of(batch: Packed, *roles: int) -> Tensor:
    """How many sequences have one of `roles`, fp32 scalar."""
    role = batch.extras["role"]
    return sum((role == r).sum() for r in roles).float()  # type: ignore[union-attr]


def count_pairs(batch: Packed, cfg: object) -> Terms:
    """Number of pairs."""
    return {"loss": num_of(batch, CHOSEN)}


def total(values: Tensor) -> tuple[Tensor, Tensor]:
    """A metric: the mean over all answers of `values` [m]."""
    return values.sum(), values.new_tensor(float(values.numel()))


def reward_metrics(chosen: Tensor, rejected: Tensor) -> Metrics:
    """TRL's names, from the rewards [m] of both answers."""
    return {
        "rewards/chosen": total(chosen),
        "rewards/rejected": total(rejected),
        "rewards/margins": total(chosen - rejected),
        "rewards/accuracies": total((chosen > rejected).float()),
    }


def answer_metrics(out: Out, batch: Packed, chosen: Answers, rejected: Answers) -> Metrics:
    """Log-probs and lengths of both answers, entropy over their tokens, and with a reference `kl`
    in nats an answer: how far the policy is from it, `distance` over both answers.
    """
    metrics: Metrics = {
        "logps/chosen": total(chosen.logp),
        "logps/rejected": total(rejected.logp),
        "lengths/chosen": total(chosen.lengths),
        "lengths/rejected": total(rejected.lengths),
    }
    if out.entropy is not None:
        metrics["entropy"] = ((out.entropy * batch.loss_mask).sum(), batch.loss_mask.sum())
    if chosen.ref_logp is not None:
        far = torch.cat([distance(chosen), distance(rejected)])
        metrics["kl"] = total(far.detach())
    return metrics


def distance(answers: Answers) -> Tensor:
    """[m] nats: length / 2 times the square of the mean log-ratio of an answer's tokens.

    The answers of preference data are neither policy's own, so the mean log-ratio is no KL: it is
    negative where the policy likes both answers better than the reference did. Half the square of a
    token's log-ratio (k2 of methods/online.py) is the KL to second order, whichever of the two
    policies said the token; an answer's mean stands for its tokens, which makes it a lower bound.
    """
    return 0.5 * answers.ratio.square() / answers.lengths
