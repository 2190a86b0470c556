"""The checkpoints of a run: written aside, verified, published by one rename, kept by number and by
merit.
"""

import contextlib
import json
import math
import os
import shutil
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from torch.distributed.checkpoint.api import CheckpointException

from moetrain import files
from moetrain.engine.checkpoint import Saving, first_line
from moetrain.engine.manifest import damage
from moetrain.engine.snapshot import Weights
from moetrain.errors import CheckpointError
from moetrain.models.lookup import checkpoint_at

if TYPE_CHECKING:
    from moetrain.engine.engine import Engine

T = TypeVar("T")


@dataclass(frozen=True)
class _Flight:
    """A checkpoint that is being written."""

    saving: Saving
    final: Path
    metric: float | None


class Checkpoints:
    """The checkpoints of a run: `<run_dir>/checkpoints/step_00000010`, each complete the moment its
    name exists.

    Args:
        keep: how many of the newest stay; the best one stays besides.
        best: name of the held-out metric that says which checkpoint is the best, or None.
        more: whether that is the one with the highest value, not the lowest.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        keep: int,
        best: str | None = None,
        more: bool = False,
        optimizer: bool = True,
        background: bool = False,
    ):
        self.folder = run_dir / "checkpoints"
        self.keep, self.optimizer = keep, optimizer
        self.best_name, self.more = best, more
        self.background = background
        self._flight: _Flight | None = None
        self._removal: threading.Thread | None = None

    def all(self) -> list[Path]:
        """Published checkpoints, oldest first."""
        return sorted(p for p in self.folder.glob("step_*") if p.is_dir())

    def latest(self) -> Path | None:
        """The newest published checkpoint. A half-written one has another name and is never seen
        here.
        """
        folders = self.all()
        return folders[-1] if folders else None

    def best(self) -> Path | None:
        """The checkpoint with the best held-out metric so far."""
        is_known = (self.folder / "best.json").is_file()
        return checkpoint_at(self.folder / "best") if is_known else None

    def save(
        self,
        engine: "Engine",
        step: int,
        state: dict[str, Any],
        metric: float | None = None,
        reference: Weights | None = None,
    ) -> Path:
        """Save step `step`, and a snapshot beside it: write it, or have it written in the
        background until `tick` or `settle` publishes it. Collective. Raises CheckpointError;
        earlier checkpoints stay.
        """
        self.settle(engine)
        final = self.folder / f"step_{step:08d}"
        if final.is_dir():
            return final
        temporary = self.folder / f".writing_{step:08d}"
        if engine.world.is_first:
            for stale in self.folder.glob(".writing_*"):
                shutil.rmtree(stale, ignore_errors=True)
        engine.world.barrier()

        def begin() -> Saving:
            return engine.begin_save(
                temporary, state, optimizer=self.optimizer, reference=reference
            )

        saving = self._together(engine, temporary, begin)
        self._flight = _Flight(saving, final, metric)
        if not self.background:
            self.settle(engine)
        return final

    def tick(self, engine: "Engine") -> None:
        """Publish what has been written since, if every rank is done. Collective; call it between
        steps.
        """
        if self._flight is None:
            return
        if engine.world.all(self._flight.saving.is_written):
            self.settle(engine)

    def settle(self, engine: "Engine") -> None:
        """Wait for the save under way and publish it; then drop the oldest beyond `keep`.
        Collective.
        """
        flight, self._flight = self._flight, None
        if flight is None:
            return
        self._together(engine, flight.saving.folder, flight.saving.finish)

        def publish() -> None:
            if engine.world.is_first:
                _sync(flight.saving.folder)
                os.rename(flight.saving.folder, flight.final)
                _sync(self.folder)
                self._remember(flight.final, flight.metric)
                self._drop_old()

        self._together(engine, flight.saving.folder, publish)

    def close(self, engine: "Engine") -> None:
        """Leave nothing behind that is not finished. Collective."""
        self.settle(engine)
        if self._removal is not None:
            self._removal.join()

    def _together(self, engine: "Engine", temporary: Path, do: Callable[[], T]) -> T:
        """What `do` gives; CheckpointError on every rank when it fails on one."""
        try:
            # torch's own is no Exception: some rank could not write.
            return engine.world.together(do, self._failed, (Exception, CheckpointException))
        except CheckpointError:
            if engine.world.is_first:
                shutil.rmtree(temporary, ignore_errors=True)
            engine.world.barrier()
            raise

    def _failed(self, error: BaseException) -> CheckpointError:
        if isinstance(error, CheckpointError):
            why = str(error)
        elif isinstance(error, CheckpointException):  # a full disk is one of several errors
            why = "not everything could be written"
        else:
            why = first_line(error)
        free = shutil.disk_usage(self.folder).free / 2**30 if self.folder.is_dir() else 0.0
        return CheckpointError(
            f"Saving to {self.folder} failed ({why}; {free:.2f} GiB free). Earlier checkpoints are"
            " whole: make room or set checkpoint.keep lower, and start again to resume."
        )

    def _remember(self, final: Path, metric: float | None) -> None:
        record = self.folder / "best.json"
        if self.best_name is None or metric is None or not math.isfinite(metric):
            return
        sign = 1 if self.more else -1
        if sign * metric > sign * self._best_value(record, -sign * math.inf):
            best = {"name": final.name, "metric": self.best_name, "value": metric}
            files.write_text(record, json.dumps(best))

    def _best_value(self, record: Path, worst: float) -> float:
        """The best one's, unless it was the best by another metric, or is gone."""
        if not record.is_file():
            return worst
        best = json.loads(record.read_text())
        is_there = best["metric"] == self.best_name and (self.folder / best["name"]).is_dir()
        return float(best["value"]) if is_there else worst

    def _drop_old(self) -> None:
        """Rename, so that a kill leaves no half checkpoint under a good name, and remove aside: it
        may take long on a shared file system.
        """
        best = self.best()
        doomed: list[Path] = []
        for old in self.all()[: -self.keep] if self.keep else []:
            if old != best:
                doomed.append(old.with_name(f".writing_old_{old.name}"))
                os.rename(old, doomed[-1])
        if self._removal is not None:
            self._removal.join()
        self._removal = threading.Thread(target=_remove, args=(doomed,), daemon=True)
        self._removal.start()

    def restore(
        self, engine: "Engine", reference: Weights | None = None
    ) -> tuple[dict[str, Any] | None, list[str]]:
        """Bring `engine`, and a snapshot that was saved beside it, to the newest checkpoint that is
        whole: (the state saved with it, or None without one, what to tell the user of damaged
        ones). Collective.

        Raises CheckpointError when there are checkpoints and none is whole.
        """
        warnings: list[str] = []
        folders = self.all()
        engine.world.barrier()  # no rank renames one before all have looked
        for path in reversed(folders):
            problem = damage(path, engine.world)
            if not problem:
                return engine.restore(path, reference), warnings
            warnings.append(f"{path} is damaged ({problem}); the checkpoint before it is taken")
            if engine.world.is_first:
                with contextlib.suppress(OSError):  # of another name, it is not in the way
                    os.rename(path, path.with_name(f"damaged_{path.name}"))
        if folders:
            raise CheckpointError(
                f"{warnings[-1].partition(';')[0]}, and no checkpoint before it is whole. Start a"
                " new run_dir."
            )
        return None, warnings


def _remove(folders: list[Path]) -> None:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def _sync(folder: Path) -> None:
    """Flush a folder's files and entries to the disk, so that a rename never publishes unwritten
    data.
    """
    for path in [p for p in folder.iterdir() if p.is_file()] + [folder]:
        with contextlib.suppress(OSError):
            handle = os.open(path, os.O_RDONLY)
            os.fsync(handle)
            os.close(handle)
