# pyright: reportPrivateImportUsage=false
"""Losses as TRL computes them, recorded for tests/test_methods.py.

Runs with the TRL of .venv, and needs nothing of moetrain:
    .venv/bin/python tools/bench/trl_fixtures.py > tests/fixtures/trl.json

All cases draw from one generator: a new one goes at the end of the list, so that those before it
stay as they are (to the last bit of a loss, which machines may differ in).

TRL's own loss methods are called, on trainers that have only what these methods read and with a
model that answers with given log-probs.
"""

import json
import sys
from collections import defaultdict
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import accelerate
import torch
import trl
from torch import Tensor
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer

NUM_PAIRS, WIDTH = 6, 12
PLAIN = ("sigmoid_norm", "hinge", "ipo", "nca_pair", "sppo_hard", "apo_zero", "apo_down")
COMMAND = ".venv/bin/python tools/bench/trl_fixtures.py > tests/fixtures/trl.json"


def bare(kind: Any, **attributes: Any) -> Any:
    """A trainer with what its loss reads."""
    trainer = kind.__new__(kind)
    defaults: dict[str, Any] = {
        "model": SimpleNamespace(training=True),
        "accelerator": accelerate.Accelerator(cpu=True),
        "aux_loss_enabled": False,
        "_metrics": {"train": defaultdict(list), "eval": defaultdict(list)},
        "_total_train_tokens": 0,
        "_tp_size": 1,
        "label_smoothing": 0.0,
    }
    for name, value in {**defaults, **attributes}.items():
        object.__setattr__(trainer, name, value)
    return trainer


class Says:
    """A model that gives these log-probs [b, t], one call after another."""

    training = True

    def __init__(self, *log_probs: Tensor, log_squares: Tensor | None = None):
        self._next, self._squares = iter(log_probs), log_squares

    def __call__(self, **kwargs: Any) -> Any:
        log_probs = next(self._next)
        return SimpleNamespace(
            log_probs=log_probs,
            log_sum_sq_probs=self._squares,
            entropy=torch.zeros_like(log_probs),
            mean_logits=torch.zeros_like(log_probs),
            is_top1=torch.zeros_like(log_probs, dtype=torch.bool),
            label_mask=log_probs != 0,
        )


def answers(rng: torch.Generator, num: int) -> tuple[Tensor, Tensor]:
    """(log-probs [num, WIDTH], mask [num, 1 + WIDTH] of their tokens): prompts and answers of many
    lengths.
    """
    mask = torch.zeros(num, 1 + WIDTH, dtype=torch.int64)
    for row in mask:
        start = int(torch.randint(1, 5, (), generator=rng))
        end = int(torch.randint(start + 1, 2 + WIDTH, (), generator=rng))
        row[start:end] = 1
    logp = -torch.rand(num, WIDTH, generator=rng) * 3 - 0.01
    return logp * mask[:, 1:], mask


def sums(logp: Tensor) -> list[float]:
    return logp.sum(1).tolist()


def pair_case(
    rng: torch.Generator, method: str, settings: dict[str, Any], types: Sequence[str]
) -> Any:
    """TRL's DPO trainer with one or more of its loss types."""
    logp, mask = answers(rng, 2 * NUM_PAIRS)
    reference = logp.sum(1) + torch.randn(2 * NUM_PAIRS, generator=rng)
    squares = None
    if settings.get("use_weighting"):
        squares = -torch.rand(logp.shape, generator=rng) * mask[:, 1:]
    trainer = bare(
        trl.DPOTrainer,
        beta=settings["beta"],
        loss_types=list(types),
        loss_weights=settings.get(
            "loss_weights", [1.0, settings.get("rpo_alpha", 1.0), 1.0][: len(types)]
        ),
        args=SimpleNamespace(discopop_tau=settings.get("discopop_tau", 0.05)),
        ld_alpha=settings.get("ld_alpha"),
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        use_weighting=settings.get("use_weighting", False),
        label_smoothing=settings.get("label_smoothing", 0.0),
    )
    inputs = {
        "input_ids": torch.ones_like(mask),
        "attention_mask": torch.ones_like(mask),
        "completion_mask": mask,
        "ref_chosen_logps": reference[:NUM_PAIRS],
        "ref_rejected_logps": reference[NUM_PAIRS:],
    }
    loss = trainer._compute_loss(Says(logp, log_squares=squares), inputs, False)
    metrics = {
        name: values[-1]
        for name, values in trainer._metrics["train"].items()
        if name.startswith(("rewards/", "logps/"))
    }
    found = case(method, settings, logp, mask, reference, loss, metrics)
    return found if squares is None else found | {"log_squares": squares.tolist()}


def kin(rng: torch.Generator, *types: str, **settings: Any) -> Any:
    """dpo with other losses than the sigmoid's."""
    settings = {"beta": 0.3, "loss_type": list(types), **settings}
    return pair_case(rng, "dpo", settings, types)


def case(
    method: str,
    settings: dict[str, Any],
    logp: Tensor,
    mask: Tensor,
    reference: Tensor | None,
    loss: Tensor,
    metrics: dict[str, float] | None = None,
) -> dict[str, Any]:
    return {
        "method": {"name": method, **settings},
        "logp": logp.tolist(),  # [answers, t]: chosen ones, then rejected ones
        "mask": mask[:, 1:].tolist(),
        "reference": None if reference is None else reference.tolist(),
        "loss": loss.item(),
        "metrics": metrics or {},
    }


def smoothed(rng: torch.Generator) -> Any:
    """cDPO: TRL has label smoothing in CPO's formula, which is DPO's of the two log-ratios."""
    settings = {"beta": 0.3, "label_smoothing": 0.1}
    logp, mask = answers(rng, 2 * NUM_PAIRS)
    reference = logp.sum(1) + torch.randn(2 * NUM_PAIRS, generator=rng)
    ratio = logp.sum(1) - reference
    trainer = bare(CPOTrainer, loss_type="sigmoid", alpha=0.0, **settings)
    losses, *_ = trainer.cpo_loss(ratio[:NUM_PAIRS], ratio[NUM_PAIRS:])
    return case("dpo", settings, logp, mask, reference, losses.mean())


def simpo(rng: torch.Generator) -> Any:
    settings = {"beta": 2.0, "gamma": 0.5}
    logp, mask = answers(rng, 2 * NUM_PAIRS)
    mean = logp.sum(1) / mask.sum(1)
    trainer = bare(CPOTrainer, loss_type="simpo", alpha=0.0, beta=2.0, simpo_gamma=0.5)
    losses, *_ = trainer.cpo_loss(mean[:NUM_PAIRS], mean[NUM_PAIRS:])
    return case("simpo", settings, logp, mask, None, losses.mean())


def orpo(rng: torch.Generator) -> Any:
    """The odds ratio is TRL's; its likelihood term also scores the prompt, the paper's (and ours)
    the answer alone, so that term is written out.
    """
    logp, mask = answers(rng, 2 * NUM_PAIRS)
    mean = logp.sum(1) / mask.sum(1)
    trainer = bare(ORPOTrainer, beta=0.3)
    losses, *_ = trainer.odds_ratio_loss(mean[:NUM_PAIRS], mean[NUM_PAIRS:])
    likelihood = -logp[:NUM_PAIRS].sum() / mask[:NUM_PAIRS].sum()
    return case("orpo", {"beta": 0.3}, logp, mask, None, likelihood - losses.mean())


def kto(rng: torch.Generator, *, near: bool = False, loss_type: str = "kto") -> Any:
    """`near`: the mismatched answers' mean ratio is below 0, which counts as 0."""
    settings: dict[str, Any] = {"beta": 0.3, "desirable_weight": 1.2, "undesirable_weight": 0.7}
    logp, mask = answers(rng, 2 * NUM_PAIRS)
    other, other_mask = answers(rng, 2 * NUM_PAIRS)
    reference = logp.sum(1) + torch.randn(2 * NUM_PAIRS, generator=rng)
    gap = torch.rand(2 * NUM_PAIRS, generator=rng)
    other_reference = other.sum(1) + (gap if near else -gap)
    trainer = bare(
        trl.KTOTrainer,
        loss_type=loss_type,
        calculate_KL=loss_type == "kto",
        precompute_ref_logps=True,
        **settings,
    )
    inputs = {
        "input_ids": torch.ones_like(mask),
        "attention_mask": torch.ones_like(mask),
        "completion_mask": mask,
        "KL_input_ids": torch.ones_like(other_mask),
        "KL_attention_mask": torch.ones_like(other_mask),
        "KL_completion_mask": other_mask,
        "label": torch.tensor([True] * NUM_PAIRS + [False] * NUM_PAIRS),
        "ref_logps": reference,
        "ref_KL_logps": other_reference,
    }
    loss = trainer._compute_loss(Says(*([other] * (loss_type == "kto")), logp), inputs, False)
    kl = float((other.sum(1) - other_reference).mean())
    if loss_type != "kto":
        settings["loss_type"] = loss_type
    return case("kto", settings, logp, mask, reference, loss) | {"kl": kl}


def reward(rng: torch.Generator, *, margin: bool, center: float | None) -> Any:
    scores = torch.randn(2 * NUM_PAIRS, generator=rng)
    margins = torch.rand(NUM_PAIRS, generator=rng) if margin else None
    trainer = bare(trl.RewardTrainer, args=SimpleNamespace(center_rewards_coefficient=center))
    inputs = {"attention_mask": torch.ones(2 * NUM_PAIRS, 1)}
    if margins is not None:
        inputs["margin"] = margins
    loss = trainer.compute_loss(lambda **_: SimpleNamespace(logits=scores[:, None]), inputs)
    return {
        "method": {"name": "reward", "center_rewards": center or 0.0},
        "scores": scores.tolist(),
        "margin": None if margins is None else margins.tolist(),
        "loss": loss.item(),
    }


def tokens(rng: torch.Generator, method: str, loss_type: str) -> Any:
    logp, mask = answers(rng, NUM_PAIRS)
    arguments = SimpleNamespace(loss_type=loss_type, average_tokens_across_devices=False)
    trainer = bare(trl.SFTTrainer, args=arguments, compute_loss_func=None, label_smoother=None)
    inputs = {"input_ids": torch.ones_like(mask), "attention_mask": torch.ones_like(mask)}
    loss = trainer.compute_loss(Says(logp), inputs)
    return case(method, {}, logp, mask, None, loss)


def main() -> None:
    torch.set_default_dtype(torch.float64)
    rng = torch.Generator().manual_seed(7)
    cases = [
        pair_case(rng, "dpo", {"beta": 0.3}, ["sigmoid"]),
        pair_case(rng, "dpo", {"beta": 0.3, "rpo_alpha": 0.2}, ["sigmoid", "sft"]),
        pair_case(rng, "hinge", {"beta": 0.3}, ["hinge"]),
        pair_case(rng, "ipo", {"beta": 0.4}, ["ipo"]),
        smoothed(rng),
        simpo(rng),
        orpo(rng),
        kto(rng),
        reward(rng, margin=False, center=None),
        reward(rng, margin=True, center=0.05),
        tokens(rng, "sft", "nll"),
        tokens(rng, "dft", "dft"),
        kto(rng, near=True),
        reward(rng, margin=True, center=None),
        reward(rng, margin=False, center=0.05),
        pair_case(rng, "ipo", {"beta": 0.1}, ["ipo"]),
        pair_case(rng, "hinge", {"beta": 1.0}, ["hinge"]),
        pair_case(rng, "robust", {"beta": 0.3, "label_smoothing": 0.1}, ["robust"]),
        pair_case(rng, "robust", {"beta": 0.1, "label_smoothing": 0.4}, ["robust"]),
        *(kin(rng, name) for name in PLAIN),
        kin(rng, "exo_pair", label_smoothing=0.001),
        kin(rng, "exo_pair", beta=0.1, label_smoothing=0.2),
        kin(rng, "robust", label_smoothing=0.1),
        kin(rng, "bco_pair", reward_shift="none"),
        kin(rng, "discopop"),
        kin(rng, "discopop", discopop_tau=0.5, beta=1.0),
        kin(rng, "sigmoid", "bco_pair", "sft", loss_weights=[0.8, 0.2, 1.0], reward_shift="none"),
        kin(rng, "apo_zero", "ipo"),
        kin(rng, "sigmoid", ld_alpha=0.4),
        kin(rng, "ipo", ld_alpha=0.0),
        kin(rng, "sigmoid_norm", "apo_down", loss_weights=[1.0, 0.5], ld_alpha=0.7),
        kin(rng, "sigmoid", use_weighting=True),
        kin(rng, "hinge", "nca_pair", loss_weights=[0.5, 2.0], use_weighting=True, ld_alpha=0.5),
        kto(rng, loss_type="apo_zero_unpaired"),
    ]
    content = {"trl": trl.__version__, "command": COMMAND, "cases": cases}
    json.dump(content, sys.stdout, indent=1)


if __name__ == "__main__":
    main()
