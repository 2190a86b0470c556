"""A step's graded answers out of a folder of earlier rollouts."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from moetrain.data.prompts import PromptSet
from moetrain.engine.world import World
from moetrain.errors import DataError
from moetrain.loops.outline import Outline, outlined
from moetrain.loops.store import Batch, Store
from moetrain.models import Model


def check_drawn(store: Store, step: int, drawn: Mapping[str, float]) -> None:
    """Raise DataError unless the batch of `step` is there, and was sampled as `drawn` says."""
    batch = store.read(step)
    if batch is None:
        raise DataError(
            f"rollout.replay={store.folder} has no batch of step {step}. Give the"
            " rollouts folder of a run that came so far."
        )
    for name, sampling in drawn.items():
        was = batch.drawn_with.get(name)
        if was not in (None, sampling):
            raise DataError(
                f"rollout.replay={store.folder} was sampled at {name} {was:g}: set"
                f" rollout.{name}={was:g}, or every log-prob is compared with another"
                " distribution's."
            )


def check_known(batch: Batch, store: Store, model: Model) -> None:
    """Raise DataError where a batch has tokens or experts that the model has not: it was sampled
    from another one.
    """
    parts = [part for answer in batch.answers for part in answer.trajectory.branches]
    texts = [group.prompt.tokens for group in batch.groups]
    ids = [*texts, *(part.tokens for part in parts), *(part.context for part in parts)]
    ids += [part.kept.ids for part in parts if part.kept is not None]
    ids += [part.word.ids for part in parts if part.word is not None]
    for what, num, arrays in (
        ("token", model.heads.vocab, ids),
        ("expert", model.num_experts, [part.routes for part in parts]),
    ):
        given = (array for array in arrays if array is not None and np.size(array))
        most = max((int(np.max(array)) for array in given), default=-1)
        if most >= num:
            raise DataError(
                f"rollout.replay={store.folder} has {what} {most}, and the model {num} {what}s:"
                " another model has sampled it. Give that model, or another folder."
            )


class Replayed:
    """Rollouts of an earlier run, without an engine: the same batches, the same losses. The first
    rank alone reads them.

    drawn: how the recipe scores answers; it has to be as they were sampled.
    """

    def __init__(
        self,
        store: Store,
        prompts: PromptSet,
        drawn: Mapping[str, float],
        world: World,
        model: Model,
    ):
        self.store, self.prompts, self.drawn, self.world = store, prompts, drawn, world
        self.model = model

    def start(self, step: int, last: int, state: dict[str, Any]) -> None:
        self.world.first(lambda: check_drawn(self.store, step + 1, self.drawn))

    def take(self, step: int) -> Outline | None:
        def read() -> Batch:
            batch = self.store.read(step)
            if batch is None:
                raise DataError(
                    f"rollout.replay={self.store.folder} ends before step {step}. Set"
                    f" train.steps={step - 1}, or leave rollout.replay out."
                )
            check_known(batch, self.store, self.model)
            return batch

        return outlined(read, self.world.first)

    def push(self, step: int) -> dict[str, float]:
        return {}

    def evaluate(self, step: int) -> dict[str, Any]:
        return {}

    def state_dict(self, given: Outline) -> dict[str, Any]:
        return given.state(self.prompts.train.fingerprint)
