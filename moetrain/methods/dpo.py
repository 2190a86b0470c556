"""Direct preference optimisation and its kin: weighted sums of the losses in pair_losses.py.

`ipo`, `hinge` and `robust` are dpo with that loss_type. Several losses with weights are MPO (arXiv
2411.10442: 0.8 sigmoid + 0.2 bco_pair + sft). Two settings change what all of them see: ld_alpha
counts less what the longer answer has past the shorter one's length (LD-DPO, arXiv 2409.06411), for
policy and reference alike as in TRL 1.16; use_weighting weighs a pair with what the policy itself
would say of both answers (WPO, arXiv 2406.11827, eq. 2).
"""

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from moetrain.config.method import DpoMethod, HingeMethod, IpoMethod, PairLoss, RobustMethod
from moetrain.methods.base import Known, Method, Metrics, Out, Terms
from moetrain.methods.pair_losses import PAIR_LOSSES, Numbers
from moetrain.methods.pairs import (
    CHOSEN,
    REJECTED,
    Answers,
    answer_metrics,
    answers,
    certainty,
    count_pairs,
    num_of,
    reward_metrics,
    tail_weights,
    total,
)
from moetrain.ops.packed import Packed

NEEDS = frozenset({"logp", "entropy", "ref_logp"})
# Of the steps before: the mean of both answers' rewards, and how many steps these are.
SHIFT, STEPS = "bco/shift", "bco/steps"


def dpo(out: Out, batch: Packed, cfg: DpoMethod, known: Known) -> tuple[Terms, Metrics]:
    """The losses of loss_type; with rpo_alpha or sft also that much of the chosen answers' negative
    log-likelihood a token (RPO, arXiv 2404.19733, eq. 1).
    """
    seen = out
    if cfg.ld_alpha is not None:
        seen = replace(out, logp=out.logp * tail_weights(batch, cfg.ld_alpha))
    chosen, rejected = answers(seen, batch, CHOSEN), answers(seen, batch, REJECTED)
    shift = known.get(SHIFT, 0.0) if cfg.reward_shift == "running" else 0.0
    numbers = Numbers(cfg.beta, cfg.label_smoothing, cfg.discopop_tau, shift)
    weight = None
    if cfg.use_weighting:
        weight = certainty(out, batch, CHOSEN) * certainty(out, batch, REJECTED)
    loss, metrics = weighted(chosen, rejected, cfg.weights, numbers, weight)
    metrics |= answer_metrics(out, batch, chosen, rejected)
    nll = -answers(out, batch, CHOSEN).logp.sum()
    return {"loss": loss, "nll": cfg.nll_weight * nll}, metrics


def weighted(
    chosen: Answers,
    rejected: Answers,
    weights: Mapping[PairLoss, float],
    numbers: Numbers,
    weight: Tensor | None = None,
) -> tuple[Tensor, Metrics]:
    """The weighted sum of losses, summed over all pairs, each of which may have a `weight` [m]; and
    what there is to see in rewards. Of several losses each is seen by itself.
    """
    metrics = reward_metrics(numbers.beta * chosen.ratio, numbers.beta * rejected.ratio)
    loss = chosen.logp.new_zeros(())
    for name, share in weights.items():
        if name == "sft":
            continue
        costs = PAIR_LOSSES[name](chosen, rejected, numbers)
        if weight is not None:
            costs = costs * weight
        loss = loss + share * costs.sum()
        if len(weights) > 1:
            metrics[f"loss/{name}"] = total(costs.detach())
    if weight is not None:
        metrics["wpo/weight"] = total(weight)
    return loss, metrics


def count_dpo(batch: Packed, cfg: DpoMethod) -> Terms:
    """Pairs, and the scored tokens of the chosen answers."""
    num_tokens = batch.loss_mask.new_zeros(())
    if num_of(batch, CHOSEN):
        zeros = batch.loss_mask.new_zeros(batch.num_tokens)
        num_tokens = answers(Out(logp=zeros), batch, CHOSEN).lengths.sum()
    return count_pairs(batch, cfg) | {"nll": num_tokens}


def carried(known: Known, seen: Mapping[str, float], cfg: DpoMethod) -> dict[str, float]:
    """The mean reward that bco_pair takes off in the next step; each step counts the same."""
    if "bco_pair" not in cfg.weights or cfg.reward_shift == "none":
        return {}
    steps = known.get(STEPS, 0.0)
    mean_reward = (seen["rewards/chosen"] + seen["rewards/rejected"]) / 2
    return {SHIFT: (known.get(SHIFT, 0.0) * steps + mean_reward) / (steps + 1), STEPS: steps + 1}


def also_needs(cfg: DpoMethod) -> frozenset[str]:
    """Weights are taken from the squares of the policy's distributions."""
    return frozenset({"log_squares"}) if cfg.use_weighting else frozenset()


def _alone(name: PairLoss) -> Method:
    """A method that is one loss."""

    def loss(
        out: Out, batch: Packed, cfg: IpoMethod | HingeMethod | RobustMethod, known: Known
    ) -> tuple[Terms, Metrics]:
        share = cfg.label_smoothing if isinstance(cfg, RobustMethod) else 0.0
        chosen, rejected = answers(out, batch, CHOSEN), answers(out, batch, REJECTED)
        loss, metrics = weighted(chosen, rejected, {name: 1.0}, Numbers(cfg.beta, share))
        return {"loss": loss}, metrics | answer_metrics(out, batch, chosen, rejected)

    return Method(name, loss, count_pairs, NEEDS)


DPO = Method("dpo", dpo, count_dpo, NEEDS, also_needs=also_needs, carried=carried)
IPO, HINGE, ROBUST = _alone("ipo"), _alone("hinge"), _alone("robust")
