"""Pickles in Megatron checkpoints, read without running anything: the index `.metadata`, by a list
of the classes that torch's distributed checkpoints are described with, and what is no tensor, as
`torch.load(weights_only=True)` has it.
"""

import io
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import filesystem, metadata, planner
from torch.distributed.checkpoint._traverse import set_element
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

from moetrain.manifest import Manifest
from moetrain.weights.torch_index import CLASSES, unpickled

_TORCH: Any = torch

# Every global that an index may name. A class here is made of plain values, and none of its methods
# runs more than its own code.
ALLOWED: Mapping[tuple[str, str], Any] = {
    ("torch", "Size"): torch.Size,
    ("torch", "device"): torch.device,
    ("torch.serialization", "_get_layout"): _TORCH.serialization._get_layout,
    ("collections", "OrderedDict"): OrderedDict,
    **{("torch", str(d).removeprefix("torch.")): d for d in vars(_TORCH).values()
       if isinstance(d, torch.dtype)},
    **{(module.__name__, name): vars(module)[name] for module in (metadata, planner, filesystem)
       for name in CLASSES[module.__name__].split() if name in vars(module)},
}  # fmt: skip


def index_of(folder: Path) -> Metadata:
    """A checkpoint's index as torch has it. Raises CheckpointError."""
    return unpickled(folder, ALLOWED, _checked)


def _checked(metadata: Any) -> Metadata:
    """ValueError unless it says where things lie, all of them in the folder."""
    if not isinstance(metadata, Metadata) or not isinstance(metadata.state_dict_metadata, dict):
        raise ValueError("it holds something else")
    if not isinstance(metadata.storage_data, dict):
        raise ValueError("it names no files")
    for part in metadata.storage_data.values():
        name, numbers = part.relative_path, (part.offset, part.length)
        if not isinstance(name, str) or Path(name).name != name or "\0" in name:
            raise ValueError(f"{name!r} lies outside of the checkpoint")
        if any(type(n) is not int or not 0 <= n < 1 << 62 for n in numbers):
            raise ValueError(f"{name} has no place {numbers}")
    if metadata.storage_meta is not None and not isinstance(metadata.storage_meta, StorageMeta):
        raise ValueError("it holds something else")
    return metadata


class CheckedReader(FileSystemReader):
    """torch's reader of a checkpoint; the index is read as above, and every part that is read is
    checked by the checkpoint's manifest in the same pass.
    """

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        index = index_of(Path(self.path))
        if index.storage_meta is None:
            index.storage_meta = StorageMeta()
        index.storage_meta.load_id = self.load_id
        return index

    def read_data(self, plan: Any, planner: Any) -> Any:
        folder = Path(self.path)
        manifest = Manifest.of(folder)
        if manifest is not None:
            for item in plan.items:
                part = self.storage_data[item.storage_index]
                start = part.offset
                manifest.check(folder / part.relative_path, start, start + part.length)
        return super().read_data(plan, planner)


def install() -> None:
    """Have Megatron and torch read checkpoints as here."""
    from megatron.core.dist_checkpointing.strategies import torch as strategy

    any_strategy: Any = strategy
    any_strategy.FileSystemReader = CheckedReader

    def load_bytes(self: Any, read_item: Any, value: io.BytesIO) -> None:
        # Upstream unpickles here, which runs what the bytes say (torch 2.13).
        # A host optimizer's state names its class (Megatron's HybridDeviceOptimizer).
        with torch.serialization.safe_globals([torch.optim.AdamW]):
            name, content = read_item.dest_index.fqn, torch.load(value, weights_only=True)
        if self.flatten_state_dict:
            set_element(self.original_state_dict, self.mappings[name], content)
        else:
            self.state_dict[name] = content

    any_planner: Any = DefaultLoadPlanner
    any_planner.load_bytes = load_bytes
