"""Which held-out figures can say that a checkpoint is the best one, and which way they point."""

from collections.abc import Mapping, Sequence

from moetrain.config.rewards import RewardConfig
from moetrain.config.section import MethodSection
from moetrain.errors import nearest


def figures(method: MethodSection, rewards: Sequence[RewardConfig]) -> dict[str, bool]:
    """Name in the ledger -> whether more is better."""
    if not method.samples:
        return dict(method.judged_by)
    parts = {f"eval_reward/{reward.label}": reward.weight >= 0 for reward in rewards}
    return {"eval_reward/mean": True, **parts}


def check_best(best: str, name: str, known: Mapping[str, bool], *, has_eval: bool) -> None:
    """Raises ValueError where `best` is none of the figures that method `name` is judged by, or
    nothing measures them: no checkpoint would ever be the best one.
    """
    if best not in known:
        raise ValueError(
            f"checkpoint.best={best}: method {name} is judged by {', '.join(known)}."
            f"{nearest(best, known)}"
        )
    if not has_eval:
        raise ValueError(
            f"checkpoint.best={best} needs held-out data, which a replay has none of: give"
            " data.eval, or leave checkpoint.best out"
        )
