"""What an answer is worth beside the others of its batch: a baseline, then a scale.

Legend: n answers of a batch, `group` [n] says to which prompt each belongs. The scale over tokens
that REINFORCE++ has is taken once packs are made (`Online.whiten`).
"""

from collections.abc import Callable

from torch import Tensor

from moetrain.config.online_base import GroupMethod
from moetrain.methods.online import centred, group_size, group_std


def leave_one_out(rewards: Tensor, group: Tensor, cfg: object) -> Tensor:
    """r - mean of the others of its group (RLOO, arXiv 2402.14740); 0 for an answer alone."""
    num = group_size(rewards, group)
    advantage = centred(rewards, group, cfg) * num / (num - 1).clamp(min=1)
    return advantage.to(rewards.dtype)


def raw(rewards: Tensor, group: Tensor, cfg: object) -> Tensor:
    """No baseline (REINFORCE++, arXiv 2501.03262)."""
    return rewards


BASELINES: dict[str, Callable[[Tensor, Tensor, object], Tensor]] = {
    "grpo": centred,
    "rloo": leave_one_out,
    "reinforce_plus_plus": raw,
    "reinforce_plus_plus_baseline": centred,
}


def advantages(rewards: Tensor, group: Tensor, cfg: GroupMethod) -> Tensor:
    """[n]: what `cfg.advantage_estimator` leaves of the rewards, over the deviation that
    `cfg.scale_rewards` names: the group's (GRPO, arXiv 2402.03300, section 4.1.2) or the batch's
    (arXiv 2508.08221), with n - 1 and 1e-4 beside it.
    """
    advantage = BASELINES[cfg.advantage_estimator](rewards, group, cfg)
    if cfg.by_token or cfg.scale_rewards == "none":
        return advantage
    if cfg.scale_rewards == "group":
        deviation = group_std(rewards, group)
    else:
        deviation = rewards.double().std(correction=min(1, len(rewards) - 1))
    return (advantage / (deviation + 1e-4)).to(rewards.dtype)


def whiten(cfg: GroupMethod) -> bool:
    """Whether they are brought to mean 0 and deviation 1 over the batch's tokens."""
    return cfg.by_token and cfg.scale_rewards == "batch"
