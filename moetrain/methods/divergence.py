"""How far a student's distributions are from a teacher's, of which the likeliest tokens are known.

Legend: t tokens, k tokens of a place that are known one by one.
"""

import torch
from torch import Tensor

REST = 1e-7  # a float's share of 1: less than that is left to no other token


def with_rest(logp: Tensor) -> Tensor:
    """[t, k] log-probs of some tokens -> [t, k + 1], the last the log-prob of any other."""
    rest = 1 - logp.exp().sum(-1, keepdim=True)
    return torch.cat([logp, rest.clamp_min(REST).log()], dim=-1)


def kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) [t] of log-probs [t, n]."""
    return (p.exp() * (p - q)).sum(-1)


def generalised_jsd(student: Tensor, teacher: Tensor, interpolation: float) -> Tensor:
    """[t] from log-probs [t, n]: the generalised Jensen-Shannon divergence b KL(teacher || m) +
    (1 - b) KL(student || m) with m = b teacher + (1 - b) student (GKD, arXiv 2306.13649, eq. 1);
    its limits, scaled as there, at the ends: KL(teacher || student) for b = 0, KL(student ||
    teacher) for b = 1.
    """
    if interpolation == 0:
        return kl(teacher, student)
    if interpolation == 1:
        return kl(student, teacher)
    b = torch.tensor(interpolation, dtype=student.dtype, device=student.device)
    mixed = torch.logaddexp(teacher + b.log(), student + torch.log1p(-b))
    return b * kl(teacher, mixed) + (1 - b) * kl(student, mixed)
