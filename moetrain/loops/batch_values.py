"""What a pack's tokens are given that depends on the whole batch, over all data-parallel ranks."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from moetrain.config.online_base import OnlineMethod
from moetrain.engine.world import World
from moetrain.methods.base import Online
from moetrain.methods.online import answer_mask, divergence
from moetrain.ops.packed import ANSWER, Packed
from moetrain.ops.quantile import quantile
from moetrain.ops.segment import segment_sum


def with_targets(
    packs: Sequence[Packed],
    online: Online,
    cfg: OnlineMethod,
    rewards: Tensor,
    group: Tensor,
    world: World | None,
) -> list[Packed]:
    """Packs with what the method makes of their log-probs before the first step: advantages, and
    which tokens are learned from. rewards [n] and group [n] are of all answers of the batch; a
    pack's extras say with `place` which it holds. Collective.
    """
    done = list(packs)
    if online.penalised(cfg):
        kl = answers_kl(done, len(rewards), world)
        advantages = online.advantages(rewards - cfg.beta * kl, group, cfg)
        done = [with_advantages(pack, advantages) for pack in done]
    done = [with_values(pack, online.targets(pack, cfg)) for pack in done]
    if cfg.top_entropy_quantile < 1:
        done = of_most_entropy(done, cfg.top_entropy_quantile, world)
    return whitened(done, world) if online.whiten(cfg) else done


def with_values(pack: Packed, values: Mapping[str, Tensor]) -> Packed:
    """The pack with further values per token."""
    return replace(pack, per_token={**pack.per_token, **values})


def with_advantages(pack: Packed, advantages: Tensor) -> Packed:
    """The pack with the advantages of its answers, out of those of all."""
    values = advantages[pack.extras["place"].long()]
    values = values.masked_fill(pack.extras["role"] != ANSWER, 0.0)
    return replace(pack, extras=pack.extras | {"advantage": values})


def answers_kl(packs: Sequence[Packed], num: int, world: World | None) -> Tensor:
    """[num] fp64: log(pi_old / ref) summed over each answer of the batch; 0 for one that is left
    out. Collective.
    """
    kl = torch.zeros(num, dtype=torch.float64)
    for pack in packs:
        k1 = divergence(pack.per_token["old_logp"], pack.per_token["ref_logp"], "k1")
        sums = segment_sum(k1 * answer_mask(pack), pack.cu_seqlens).double().cpu()
        answers = pack.extras["role"] == ANSWER
        kl.index_add_(0, pack.extras["place"][answers].long(), sums[answers])
    return _total(kl, world)


def mean_kl(packs: Sequence[Packed], world: World | None) -> tuple[float, int]:
    """(mean over answers of log(pi_old / ref) summed over their tokens, answers) of all packs of
    all data-parallel ranks. Collective.
    """
    sums = torch.zeros(2, dtype=torch.float64)
    for pack in packs:
        k1 = divergence(pack.per_token["old_logp"], pack.per_token["ref_logp"], "k1")
        total = (k1.double() * answer_mask(pack)).sum().cpu()
        sums += torch.stack([total, (pack.extras["role"] == ANSWER).sum().double().cpu()])
    sums = _total(sums, world)
    return float(sums[0] / sums[1].clamp_min(1)), int(sums[1])


def of_most_entropy(packs: Sequence[Packed], share: float, world: World | None) -> list[Packed]:
    """Packs whose `high_entropy` is 1 on the `share` of the batch's answers' tokens that had most
    entropy (arXiv 2506.01939), else 0. Collective.
    """
    masks = [answer_mask(pack) for pack in packs]
    entropies = [pack.per_token["old_entropy"] for pack in packs]
    given = [x[mask > 0] for x, mask in zip(entropies, masks, strict=True)]
    least = quantile(torch.cat(given), 1 - share, lambda counts: _total(counts, world))
    return [
        with_values(pack, {"high_entropy": (x >= least).to(mask.dtype) * mask})
        for pack, x, mask in zip(packs, entropies, masks, strict=True)
    ]


def _total(values: Tensor, world: World | None) -> Tensor:
    return values if world is None else world.sum(values, world.dp_group)


def whitened(packs: Sequence[Packed], world: World | None) -> list[Packed]:
    """Packs whose `advantage` has mean 0 and standard deviation 1 over the answers' tokens of all
    packs of all data-parallel ranks. Collective.
    """
    sums = torch.zeros(3, dtype=torch.float64)
    for pack in packs:
        advantages = pack.per_token["advantage"][answer_mask(pack) > 0].double().cpu()
        sums += torch.stack(
            [torch.tensor(float(len(advantages))), advantages.sum(), advantages.square().sum()]
        )
    if world is not None:
        sums = world.sum(sums, world.dp_group)
    num, mean, square = sums[0].clamp_min(1), sums[1] / sums[0], sums[2] / sums[0]
    scale = (square - mean.square()).clamp_min(0).mul(num / (num - 1).clamp_min(1)).sqrt() + 1e-8

    def change(pack: Packed) -> Packed:
        scaled = (pack.per_token["advantage"] - float(mean)) / float(scale) * answer_mask(pack)
        return with_values(pack, {"advantage": scaled})

    return [change(pack) for pack in packs]
