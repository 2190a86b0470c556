# pyright: reportPrivateImportUsage=false, reportPrivateUsage=false
"""Divergences as TRL computes them, recorded for tests/test_distill.py.

Runs with the TRL of .venv, and needs nothing of moetrain:
    .venv/bin/python tools/bench/trl_distill_fixtures.py > tests/fixtures/trl_distill.json
"""

import json
import sys
from typing import Any

import torch
import trl
from torch import Tensor
from trl.experimental.gkd import GKDTrainer
from trl.experimental.server_distillation.server_distillation_trainer import (
    _add_tail_bucket,
    _jsd_divergence,
)

PLACES, WORDS = 6, 9
COMMAND = ".venv/bin/python tools/bench/trl_distill_fixtures.py > tests/fixtures/trl_distill.json"


def logits(seed: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(PLACES, WORDS, generator=g, dtype=torch.float64)


def whole(student: Tensor, teacher: Tensor, beta: float) -> Tensor:
    """GKD's, over all words."""
    return GKDTrainer.generalized_jsd_loss(student[None], teacher[None], beta=beta, reduction="sum")


def sparse(student: Tensor, teacher: Tensor, beta: float, k: int) -> Tensor:
    """Of the teacher's k likeliest words, and the rest as one."""
    own, other = student.log_softmax(-1), teacher.log_softmax(-1)
    top, ids = other.topk(k, -1)
    mask = torch.ones_like(ids, dtype=torch.bool)
    ours, mask_of_both = _add_tail_bucket(own.gather(-1, ids), mask)
    theirs, _ = _add_tail_bucket(top, mask)
    return _jsd_divergence(ours, theirs, beta, mask_of_both).sum()


def case(beta: float, k: int) -> dict[str, Any]:
    student, teacher = logits(0).requires_grad_(), logits(1)
    loss = sparse(student, teacher, beta, k) if k < WORDS else whole(student, teacher, beta)
    loss.backward()
    assert student.grad is not None
    return {"beta": beta, "k": k, "loss": loss.item(), "gradient": student.grad.tolist()}


def main() -> None:
    json.dump(
        {
            "made_by": COMMAND,
            "trl": trl.__version__,
            "student": logits(0).tolist(),
            "teacher": logits(1).tolist(),
            "cases": [case(beta, k) for beta in (0.0, 0.3, 0.5, 1.0) for k in (1, 3, WORDS)],
        },
        sys.stdout,
        indent=1,
    )


if __name__ == "__main__":
    main()
