"""Runs whose rollout engine does not serve what it was given."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from moetrain import rollout
from moetrain.config.load import load_recipe
from moetrain.errors import RolloutError
from moetrain.loops.rl import train
from moetrain.rollout import fleet
from moetrain.rollout.embedded import Embedded
from moetrain.rollout.pushed import Pushed

LEFT_OUT = "model.layers.0.self_attn.o_proj.weight"
NOT_TRAINED = "model.embed_tokens.weight"  # by an adapter


class _Deaf(Embedded):
    """Takes no weights after the first."""

    def push(
        self, weights: Iterable[tuple[str, Tensor]], version: int, since: int | None = None
    ) -> dict[str, float]:
        return {"bytes": 0.0} if version else super().push(weights, version, since)


class _LeavesOut(Embedded):
    """Of what moved it does not take one matrix."""

    def push(
        self, weights: Iterable[tuple[str, Tensor]], version: int, since: int | None = None
    ) -> dict[str, float]:
        sent = ((n, w) for n, w in weights if since is None or n != LEFT_OUT)
        return super().push(sent, version, since)


class _OnAnotherBase(Embedded):
    """What it says it holds are other weights, as a server's that was started anew."""

    def push(
        self, weights: Iterable[tuple[str, Tensor]], version: int, since: int | None = None
    ) -> dict[str, float]:
        if since is not None:
            self._tensors[NOT_TRAINED] = self._tensors[NOT_TRAINED].roll(1, 0)
        return super().push(weights, version, since)


class _ShortFolders(Pushed):
    """Of what moved one matrix is not written for the servers."""

    def _changes(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        return super()._changes((n, w) for n, w in weights if n != LEFT_OUT)


ENGINES = {"deaf": _Deaf, "leaves out": _LeavesOut, "on another base": _OnAnotherBase}


@contextmanager
def _planted(fault: str) -> Iterator[None]:
    kinds, folders = dict(rollout.ENGINES), fleet.Pushed
    if fault == "short folders":
        fleet.Pushed = _ShortFolders
    else:
        cls = ENGINES[fault]
        opened = rollout.EngineKind(lambda recipe, hf, tokenizer: cls(hf, tokenizer))
        rollout.ENGINES["embedded"] = opened
    try:
        yield
    finally:
        rollout.ENGINES.update(kinds)
        fleet.Pushed = folders


def train_with(fault: str, recipe: str, run_dir: str, *more: str) -> str:
    """What a run of `recipe` says at its end."""
    settings = ["train.steps=3", f"run_dir={run_dir}", "observe.progress=false", "optim.lr=1e-2"]
    settings += ["rewards=[{name: length, options: {target: 40}}]", "optim.warmup=0", *more]
    try:
        with _planted(fault):
            train(load_recipe(Path(recipe), settings))
    except RolloutError as error:
        return str(error)
    return "the run went on"
