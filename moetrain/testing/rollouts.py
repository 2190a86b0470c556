"""A run's rollouts, for tests that look at what was drawn."""

from pathlib import Path

from moetrain.data.samples import Sample
from moetrain.data.trajectories import Trajectory
from moetrain.loops.store import Batch, Store


def batch_of(run_dir: Path, step: int) -> Batch:
    """What `step` of a run learned from."""
    batch = Store(run_dir / "rollouts").read(step)
    assert batch is not None
    return batch


def sample_of(one: Trajectory) -> Sample:
    """The answer that a trajectory of one turn is."""
    (branch,), (turn,) = one.branches, one.turns
    return Sample(
        prompt_id=one.prompt_id,
        index=one.index,
        tokens=tuple(one.tokens),
        logprobs=tuple(one.logprobs),
        text=one.text,
        finish="length" if one.is_cut else "stop",
        version=turn.version,
        routes=branch.routes,
        kept=branch.kept,
    )
