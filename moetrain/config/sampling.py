"""What a method that learns from rollouts asks of them."""

from collections.abc import Sequence

from moetrain.config.online_base import GroupMethod, OnlineMethod
from moetrain.config.rollout import RolloutConfig

PLAIN = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
"""Sampling from the model's own distribution."""


def check_sampling(
    name: str,
    method: OnlineMethod,
    rollout: RolloutConfig,
    weights: Sequence[float],
    epochs: float | None,
) -> None:
    """Raises ValueError where nothing could be learned, or a setting would not be what it says."""
    fresh = rollout.replay is None
    changed = [n for n, value in PLAIN.items() if getattr(rollout, n) != value]
    if method.taught and changed:
        raise ValueError(
            f"rollout.{changed[0]}={getattr(rollout, changed[0]):g}: {name} compares the student's"
            f" distributions with the teacher's as they are: leave {changed[0]} out"
        )
    if method.compares and rollout.group_size == 1 and fresh:
        raise ValueError(
            f"rollout.group_size=1: {name} compares the answers to a prompt, and one alone"
            " teaches nothing. Give 2 or more; ppo can learn from one"
        )
    if weights and not any(weights) and fresh:
        raise ValueError(
            "rewards: every weight is 0, so that no answer is better than another. Give one another"
        )
    dynamic = isinstance(method, GroupMethod) and method.dynamic_sampling
    if dynamic and epochs:
        raise ValueError(
            f"train.epochs: {name} samples further prompts in place of groups without signal, so"
            " nobody knows how many steps there are. Give train.steps, or"
            " method.dynamic_sampling=false"
        )
    if dynamic and not method.compares:
        raise ValueError(
            f"method.dynamic_sampling: {name} learns from groups of equal rewards, too. Leave it"
            " out"
        )
    if rollout.partial and not method.corrects:
        raise ValueError(
            f"rollout.partial: {name} as it is set here has no weights for what older weights drew."
            " Give method.mismatch=tis, or leave rollout.partial out"
        )
    if rollout.surplus and epochs and not rollout.partial:
        raise ValueError(
            "train.epochs: rollout.oversample throws away prompts whose answers are late, so nobody"
            " knows how many steps there are. Give train.steps, or rollout.partial=true"
        )
    if method.inner_steps > rollout.prompts_per_step and fresh:
        raise ValueError(
            f"method.inner_steps={method.inner_steps} is more than rollout.prompts_per_step="
            f"{rollout.prompts_per_step}: each optimizer step takes whole groups. Give less, or"
            " more prompts"
        )
