"""A trajectory that was stopped within a turn of the model, taken apart to go on with the turn."""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from moetrain.data.samples import Kept, Sample
from moetrain.data.trajectories import Branch, Trajectory


@dataclass(frozen=True, eq=False)
class Begun:
    """What there is of the turn, and what it stands behind."""

    turn: Sample  # of no routes: going on, all of it passes the router again
    before: Trajectory | None  # without the turn; None: it is the first
    context: NDArray[np.int32] | None  # what was rewritten for it, where it begins a branch


def begun_in(one: Trajectory) -> Begun | None:
    """None where it was not stopped within a turn."""
    if not one.is_within:
        return None
    branch = one.branches[-1]
    rest, turn = _parted(branch, one.prompt_id, one.index)
    if rest is not None:
        return Begun(turn, replace(one, branches=(*one.branches[:-1], rest)), None)
    before = one.branches[:-1]
    return Begun(turn, replace(one, branches=before) if before else None, branch.context)


def _parted(branch: Branch, prompt_id: str, index: int) -> tuple[Branch | None, Sample]:
    """(the branch without its last turn, None where it has no other; that turn)."""
    last = branch.turns[-1]
    place = len(branch.tokens) - last.num_tokens
    left, kept = None, branch.kept
    if kept is not None:
        edge = int(kept.sizes[:place].sum())
        left = Kept(kept.sizes[:place], kept.ids[:edge])
        kept = Kept(kept.sizes[place:], kept.ids[edge:])
    versions = tuple(branch.by_token[place:].tolist())
    turn = Sample(
        prompt_id,
        index,
        tuple(branch.tokens[place:].tolist()),
        tuple(branch.logprobs[place:].tolist()),
        last.text,
        "open",
        last.version,
        kept=kept,
        versions=versions if len(set(versions)) > 1 else None,
    )
    if len(branch.turns) == 1:
        return None, turn
    rest = replace(
        branch,
        turns=branch.turns[:-1],
        tokens=branch.tokens[:place],
        logprobs=branch.logprobs[:place],
        kept=left,
        versions=None if branch.versions is None else branch.versions[:place],
    )
    return rest, turn
