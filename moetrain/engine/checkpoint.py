"""Checkpoints in Megatron's torch_dist format: written aside, published by one rename, kept by
number and by merit.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from torch.distributed.checkpoint.api import CheckpointException

from moetrain.engine.model import PackedGPT
from moetrain.engine.optim import counted, part_steps, start_state
from moetrain.errors import CheckpointError

if TYPE_CHECKING:
    from moetrain.engine.engine import Engine

# The optimizer's state by model tensor, not by rank: it can be read back at another layout.
_METADATA = {"distrib_optim_sharding_type": "fully_reshardable"}


def model_state(chunks: list[PackedGPT]) -> dict[str, Any]:
    """All weights of this rank as sharded tensors.

    Without `_extra_state`, where Transformer Engine keeps what fp8 needs: nothing here, and the
    torch backend has no such thing for a run that changes its backend.
    """
    return {
        f"model{i}": {
            name: part
            for name, part in chunk.sharded_state_dict().items()
            if not name.endswith("_extra_state")
        }
        for i, chunk in enumerate(chunks)
    }


def fill(chunks: list[PackedGPT], loaded: dict[str, Any]) -> None:
    """Copy what was read for `model_state` into the weights."""
    for i, chunk in enumerate(chunks):
        chunk.load_state_dict(loaded[f"model{i}"], strict=False)


def save(folder: Path, content: dict[str, Any], optimizer: Any, state: dict[str, Any]) -> None:
    """Write `content` (sharded tensors), the optimizer when given, and `state` into `folder` (made
    here, by all ranks together).
    """
    with _together():
        folder.mkdir(parents=True, exist_ok=True)
    if optimizer is not None:
        with counted(optimizer, state["steps_done"]):
            content["optimizer"] = optimizer.sharded_state_dict(content, metadata=_METADATA)
    dist_checkpointing.save(content, str(folder), validate_access_integrity=False)
    with _together():
        if dist.get_rank() == 0:
            (folder / "state.json").write_text(
                json.dumps(state | {"has_optimizer": optimizer is not None})
            )


@contextlib.contextmanager
def _together() -> Iterator[None]:
    """No rank goes on before all have come out, be it by an error: the others would wait for it."""
    try:
        yield
    finally:
        dist.barrier()


def load_weights(chunks: list[PackedGPT], folder: Path) -> None:
    """Read the weights of a checkpoint into the live shards, at whatever layout it was written."""
    fill(chunks, dist_checkpointing.load(model_state(chunks), str(folder)))


def restore(
    folder: Path, content: dict[str, Any], optimizer: Any
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the checkpoint holds for `content` and the optimizer, and the saved `state`."""
    state = json.loads((folder / "state.json").read_text())
    if optimizer is not None and not state.pop("has_optimizer", True):
        raise CheckpointError(
            f"{folder} holds weights without optimizer state, so a run cannot resume from it. "
            "Start a new run_dir with model.path set to it."
        )
    if optimizer is not None:
        start_state(optimizer)
        with counted(optimizer, 0):
            content["optimizer"] = optimizer.sharded_state_dict(
                content, is_loading=True, metadata=_METADATA
            )
    return dist_checkpointing.load(content, str(folder)), state


def restore_optimizer(optimizer: Any, loaded: dict[str, Any]) -> None:
    """Give the optimizer what `restore` read for it, once the weights are in their place."""
    optimizer.load_state_dict(loaded["optimizer"])
    part_steps(optimizer)


class Checkpoints:
    """The checkpoints of a run: `<run_dir>/checkpoints/step_00000010`, each complete the moment its
    name exists.

    Args:
        keep: how many of the newest stay; the best one stays besides.
        best: name of the held-out metric whose lowest value is the best checkpoint, or None.
    """

    def __init__(
        self, run_dir: Path, *, keep: int, best: str | None = None, optimizer: bool = True
    ):
        self.folder = run_dir / "checkpoints"
        self.keep, self.best_name, self.optimizer = keep, best, optimizer

    def all(self) -> list[Path]:
        """Published checkpoints, oldest first."""
        return sorted(p for p in self.folder.glob("step_*") if p.is_dir())

    def latest(self) -> Path | None:
        """The newest published checkpoint. A half-written one has another name and is never seen
        here.
        """
        found = self.all()
        return found[-1] if found else None

    def best(self) -> Path | None:
        """The checkpoint with the lowest held-out metric so far."""
        record = self.folder / "best.json"
        return self.folder / json.loads(record.read_text())["name"] if record.is_file() else None

    def save(
        self, engine: "Engine", step: int, state: dict[str, Any], metric: float | None = None
    ) -> Path:
        """Write and publish step `step`, then drop the oldest beyond `keep`. Raises
        CheckpointError; nothing is lost then.
        """
        final = self.folder / f"step_{step:08d}"
        if final.is_dir():
            return final
        temporary = self.folder / f".writing_{step:08d}"
        if engine.mesh.is_main:
            for stale in self.folder.glob(".writing_*"):
                shutil.rmtree(stale, ignore_errors=True)
        dist.barrier()
        self._check(engine, temporary, self._write(engine, temporary, state))
        problem = ""
        if engine.mesh.is_main:
            try:
                _sync(temporary)
                os.rename(temporary, final)
                _sync(self.folder)
                self._remember(final, metric)
                self._drop_old()
            except OSError as error:
                problem = str(error.strerror or error)
        self._check(engine, temporary, problem)
        return final

    def _write(self, engine: "Engine", temporary: Path, state: dict[str, Any]) -> str:
        """What this rank could not do, or nothing."""
        problem = ""
        try:
            engine.save(temporary, state, optimizer=self.optimizer)
        except CheckpointException:  # torch's, which is no Exception: some rank could not write
            problem = "not everything could be written"
        except Exception as error:  # a full disk surfaces as one of several upstream errors
            problem = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        return problem

    def _check(self, engine: "Engine", temporary: Path, problem: str) -> None:
        """Collective: go on when no rank had a problem, else remove the rest and raise."""
        problems: list[Any] = [None] * engine.mesh.world_size
        dist.all_gather_object(problems, problem)
        first = next((p for p in problems if p), None)
        if first:
            if engine.mesh.is_main:
                shutil.rmtree(temporary, ignore_errors=True)
            dist.barrier()
            free = shutil.disk_usage(self.folder).free / 2**30 if self.folder.is_dir() else 0.0
            raise CheckpointError(
                f"Saving to {self.folder} failed ({first}; {free:.2f} GiB free). Earlier "
                f"checkpoints are whole: "
                "make room or set checkpoint.keep lower, and start again to resume."
            )

    def _remember(self, final: Path, metric: float | None) -> None:
        record = self.folder / "best.json"
        if self.best_name is None or metric is None:
            return
        if not record.is_file() or metric < json.loads(record.read_text())["value"]:
            part = record.with_suffix(".part")
            part.write_text(
                json.dumps({"name": final.name, "metric": self.best_name, "value": metric})
            )
            os.replace(part, record)

    def _drop_old(self) -> None:
        best = self.best()
        for old in self.all()[: -self.keep] if self.keep else []:
            if old != best:
                # Renamed first, so that a kill in the middle of the removal leaves no half
                # checkpoint under a good name.
                doomed = old.with_name(f".writing_old_{old.name}")
                os.rename(old, doomed)
                shutil.rmtree(doomed, ignore_errors=True)

    def restore(self, engine: "Engine", path: Path) -> dict[str, Any]:
        """Bring `engine` to checkpoint `path`; returns the state saved with it."""
        return engine.restore(path)


def _sync(folder: Path) -> None:
    """Flush a folder's files and entries to the disk, so that a rename never publishes unwritten
    data.
    """
    for path in [p for p in folder.iterdir() if p.is_file()] + [folder]:
        with contextlib.suppress(OSError):
            handle = os.open(path, os.O_RDONLY)
            os.fsync(handle)
            os.close(handle)
