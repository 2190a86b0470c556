"""What every rank knows of a batch, whose answers the first rank alone holds."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from moetrain.loops.rollouts import tensors
from moetrain.loops.store import Batch


@dataclass(frozen=True)
class Outline:
    """A batch without its answers; n answers, in the order of the groups."""

    step: int
    cursor: int  # prompts of the stream that are used up after it
    num_groups: int
    seconds: dict[str, float]
    rewards: Tensor  # [n] fp32
    group: Tensor  # [n] int64
    lengths: Tensor  # [n] int64, tokens that the model wrote
    cut: Tensor  # [n] bool: a limit of tokens ended it
    oldest: int  # version of the weights that an answer came from, at least
    held: tuple[int, ...] = ()  # places of the stream whose answers go on after it
    batch: Batch | None = None  # on the first rank

    def is_last(self, num_prompts: int) -> bool:
        """Whether a stream of so many prompts has nothing after it."""
        return self.cursor >= num_prompts and not self.held

    def state(self, fingerprint: str) -> dict[str, Any]:
        """The place after it, of a stream with this fingerprint, for a checkpoint."""
        return {"cursor": self.cursor, "held": list(self.held), "fingerprint": fingerprint}


def outline_of(batch: Batch) -> Outline:
    """On the rank that holds it; `batch` is not set."""
    rewards, group = tensors(batch.groups)
    made = [answer.trajectory for answer in batch.answers]
    return Outline(
        step=batch.step,
        cursor=batch.cursor,
        num_groups=len(batch.groups),
        seconds=batch.seconds,
        rewards=rewards,
        group=group,
        lengths=torch.tensor([one.num_tokens for one in made], dtype=torch.int64),
        cut=torch.tensor([one.is_cut for one in made], dtype=torch.bool),
        oldest=min((one.version for one in made), default=0),
        held=batch.held,
    )


def outlined(
    read: Callable[[], Batch], first: Callable[[Callable[[], Outline]], Outline]
) -> Outline:
    """What every rank knows of a batch that `first` reads on the first rank, where it stays."""
    held: list[Batch] = []

    def asked() -> Outline:
        held.append(read())
        return outline_of(held[0])

    return replace(first(asked), batch=held[0] if held else None)
