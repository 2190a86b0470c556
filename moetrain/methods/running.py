"""Numbers of a run that its batches move: the moments of all rewards so far, and a KL's weight.

Pure functions on a batch's numbers and on what the batches before left (`carried`, a part of
checkpoints). They see whole batches, so that packs, ranks and passes change nothing.
"""

import math

from torch import Tensor

from moetrain.methods.base import Carried

NUM, MEAN, SQUARES = "running/rewards", "running/reward_mean", "running/squares"
WEIGHT = "running/beta"


def with_rewards(carried: Carried, rewards: Tensor) -> dict[str, float]:
    """The number, mean and sum of squared distances from the mean with these rewards [n] among them
    (Chan, Golub and LeVeque 1983, eq. 2.1).
    """
    exact = rewards.double()
    if not len(exact):
        return dict(carried)
    num, mean, squares = (carried.get(name, 0.0) for name in (NUM, MEAN, SQUARES))
    total = num + len(exact)
    apart = float(exact.mean()) - mean
    spread = float((exact - exact.mean()).square().sum())
    return {
        **carried,
        NUM: total,
        MEAN: mean + apart * len(exact) / total,
        SQUARES: squares + spread + apart**2 * num * len(exact) / total,
    }


def deviation(carried: Carried) -> float:
    """Of all rewards so far, with n - 1; 1 while they do not differ."""
    num = carried.get(NUM, 0.0)
    return math.sqrt(carried[SQUARES] / (num - 1)) if num > 1 and carried[SQUARES] > 0 else 1.0


def normalised(rewards: Tensor, carried: Carried, kind: str) -> Tensor:
    """[n]: scale divides by the deviation, standardise takes the mean off before."""
    shift = carried.get(MEAN, 0.0) if kind == "standardise" else 0.0
    return ((rewards.double() - shift) / deviation(carried)).to(rewards.dtype)


def steered(weight: float, kl: float, target: float, num: int, horizon: int) -> float:
    """The weight of a KL after a batch of `num` answers whose mean KL was `kl`: weight (1 + num /
    horizon clip(kl / target - 1, -0.2, 0.2)) (Ziegler et al. 2019, arXiv 1909.08593, section 2.2).
    """
    error = min(max(kl / target - 1, -0.2), 0.2)
    return weight * (1 + error * num / horizon)
