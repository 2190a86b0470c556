"""One checkpoint in Megatron's torch_dist format: saved while training goes on, and read back."""

import json
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from torch.distributed.checkpoint.api import CheckpointException

import moetrain
from moetrain.engine.manifest import write as write_manifest
from moetrain.engine.model import PackedGPT
from moetrain.engine.optim import part_steps, sharded_state, start_state
from moetrain.engine.reading import read, read_state
from moetrain.engine.sharded import sharded
from moetrain.engine.snapshot import Weights, named_values
from moetrain.engine.world import World
from moetrain.errors import CheckpointError
from moetrain.manifest import Entry, entries
from moetrain.models import Model
from moetrain.pulse import beat
from moetrain.weights.mcore_layout import style_for

# The optimizer's state by model tensor, not by rank: it can be read back at another layout.
FORMAT = 1  # of what a checkpoint's folder holds beside Megatron's files
_METADATA = {"distrib_optim_sharding_type": "fully_reshardable"}


def model_state(
    chunks: list[PackedGPT], model: Model, world: World, values: Weights | None = None
) -> dict[str, Any]:
    """All weights of this rank as sharded tensors, whatever backend made them: Transformer Engine's
    `_extra_state`, where it keeps what fp8 needs, is no weight. `values`: of a snapshot, in their
    place.
    """
    style = style_for(model)
    return {
        f"model{i}": {
            name: sharded(name, tensor, chunk, world, model.table, model, style)
            for name, tensor in named_values(chunk, i, values)
        }
        for i, chunk in enumerate(chunks)
    }


def fill(chunks: list[PackedGPT], loaded: dict[str, Any]) -> None:
    """Copy what was read for `model_state` into the weights."""
    for i, chunk in enumerate(chunks):
        chunk.load_state_dict(loaded[f"model{i}"], strict=False)


class Saving:
    """A save under way. Making one is collective and blocks for the plan and the copy to host
    memory; a thread then writes, and reads back, what is this rank's.
    """

    def __init__(
        self,
        folder: Path,
        content: dict[str, Any],
        optimizer: Any,
        state: dict[str, Any],
        world: World,
        aside: Mapping[str, Any] = MappingProxyType({}),
    ):
        """Save `content` (sharded tensors), the optimizer when given, `state`, and what is no
        weight of the model, `aside`, into `folder` (made here, by all ranks together).
        """
        self.folder, self.world = folder, world
        self.files: dict[str, Entry] = {}
        self._problem: BaseException | None = None
        self._note = state | {"format": FORMAT, "has_optimizer": optimizer is not None}
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            self._problem = error
        _agree(self._problem, self.world)
        if optimizer is not None:
            content["optimizer"] = sharded_state(
                optimizer, content, state["steps_done"], _METADATA, loading=False
            )
        request: Any = dist_checkpointing.save(
            {**content, **aside},
            str(folder),
            validate_access_integrity=False,
            async_sharded_save=True,
            async_strategy="mcore",
        )
        # What follows in upstream's list is done in `finish`: there, a full disk on the first rank
        # would leave the others in a barrier.
        self._write_index: Callable[[], None] = request.finalize_fns[0]
        arguments = list(request.async_fn_args)
        if request.async_fn is not None:
            arguments[1] = _on_host(request.preload_fn())
        self._thread = threading.Thread(
            target=self._write, args=(request.async_fn, arguments), name="checkpoint", daemon=True
        )
        self._thread.start()

    def _write(self, write: Callable[..., None] | None, arguments: list[Any]) -> None:
        try:
            if write is not None:
                write(*arguments)
                self.files = entries(self.folder.glob(f"__{arguments[0]}_*"))
        except BaseException as error:  # handed to the main thread by `finish`
            self._problem = error

    @property
    def is_written(self) -> bool:
        """Whether this rank's part is."""
        return not self._thread.is_alive()

    def finish(self) -> None:
        """Wait for the thread, and write the index and the manifest. Collective; raises what any
        rank met.
        """
        while self._thread.is_alive():
            self._thread.join(1.0)
            beat()
        _agree(self._problem, self.world)
        try:
            self._write_index()
        except CheckpointException:  # torch's, which is no Exception
            raise OSError("some of it could not be written; is the disk full?") from None
        known = self.world.gather(self.files)
        problem: Exception | None = None
        if self.world.is_first:
            try:
                (self.folder / "state.json").write_text(json.dumps(self._note))
                save_config(CheckpointingConfig("torch_dist", 1), str(self.folder))
                write_manifest(self.folder, {k: v for files in known for k, v in files.items()})
            except OSError as error:
                problem = error
        _agree(problem, self.world)


def _agree(problem: BaseException | None, world: World) -> None:
    """CheckpointError on every rank when one has a problem: all must leave a save together."""
    world.agree(None if problem is None else CheckpointError(first_line(problem)))


def _on_host(buckets: Any) -> Any:
    """Megatron's write buckets with tensors of their own: what is on the host already, upstream
    hands on as it is, and the next step would write into it.
    """
    return [
        (path, key, (blobs, [(item, tensor.clone()) for item, tensor in tensors]))
        for path, key, (blobs, tensors) in buckets
    ]


def first_line(error: BaseException) -> str:
    """What an exception says, in a line."""
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def restore(
    folder: Path,
    content: dict[str, Any],
    optimizer: Any,
    world: World,
    aside: Mapping[str, Any] = MappingProxyType({}),
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the checkpoint holds for `content`, the optimizer and `aside`, and the saved `state`."""
    state = read_state(folder)
    if state.pop("format", 0) > FORMAT:
        raise CheckpointError(
            f"{folder} was written by a newer moetrain (its format is above {FORMAT}, this is"
            f" {moetrain.__version__}). Update moetrain, or start a new run_dir from an exported"
            " model."
        )
    if optimizer is not None and not state.pop("has_optimizer", True):
        raise CheckpointError(
            f"{folder} holds weights without optimizer state, so a run cannot resume from it. "
            "Start a new run_dir with model.path set to it."
        )
    if optimizer is not None:
        start_state(optimizer)
        content["optimizer"] = sharded_state(optimizer, content, 0, _METADATA, loading=True)
    return read({**content, **aside}, folder, world), state


def restore_optimizer(optimizer: Any, loaded: dict[str, Any]) -> None:
    """Give the optimizer what `restore` read for it, once the weights are in their place."""
    optimizer.load_state_dict(loaded["optimizer"])
    part_steps(optimizer)
