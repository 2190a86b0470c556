"""Weights as the folders of successive pushes: the first has every tensor whole, each later one
what moved since the one before it. Read by the trainer, and in vLLM's processes, which have no
moetrain.

A tensor that moved is there whole, under its name, or in part where that is less: `values:NAME`
[m, width] are the new values at `places:NAME` [m] of the tensor seen as [-1, width]. The width is 1
or the tensor's last dimension. `check:NAME` is the CRC-32 of the whole that comes of it.
"""

import glob
import os
import re
import zlib
from collections.abc import Iterable
from typing import Any

PLACES, VALUES, CHECK = "places:", "values:", "check:"


class Folders:
    """The tensors as the last of `folders` left them."""

    def __init__(self, folders: Iterable[str]):
        self._files: dict[str, list[Any]] = {}  # the newest whole tensor's, then later parts of it
        early: set[str] = set()  # parts of what is whole in a later folder, or in none
        for file in (file for folder in folders for file in _open(folder)):
            for key in file.keys():
                name = key.removeprefix(PLACES)
                if key.startswith((VALUES, CHECK)):
                    continue
                if name == key:
                    self._files[name] = [file]
                elif name in self._files:
                    self._files[name].append(file)
                else:
                    early.add(name)
        if lost := sorted(early - self._files.keys()):
            raise ValueError(f"there are parts of {lost[:4]}, which no folder has whole")

    def names(self) -> list[str]:
        return list(self._files)

    def schema(self) -> dict[str, list[int]]:
        """Name -> shape."""
        return {n: list(parts[0].get_slice(n).get_shape()) for n, parts in self._files.items()}

    def to_load(self, new: Iterable[str]) -> list[str]:
        """What vLLM is given when the folders `new` have changed: their tensors, and those that it
        can only load together with them.
        """
        touched = {loaded_with(name) for folder in new for name in names_in(folder)}
        return [name for name in self._files if loaded_with(name) in touched]

    def read(self, name: str) -> Any:
        """A tensor, put together. ValueError when it is not what the trainer had."""
        if name not in self._files:
            raise ValueError(f"no folder has {name}")
        whole, *parts = self._files[name]
        tensor = whole.get_tensor(name)
        if parts:  # what a file gives is one memory for all who ask it
            tensor = tensor.clone()
        for part in parts:
            values = part.get_tensor(VALUES + name)
            tensor.view(-1, values.size(1))[part.get_tensor(PLACES + name).long()] = values
        if parts and checksum(tensor) != int(parts[-1].get_tensor(CHECK + name)):
            raise ValueError(f"the parts of {name} do not give what the trainer has")
        return tensor


def checksum(tensor: Any) -> int:
    """The CRC-32 of a tensor's bits."""
    import torch

    return zlib.crc32(tensor.contiguous().view(-1).view(torch.uint8).numpy())


def unseen(push: dict[str, Any], held: int | None) -> list[str]:
    """The folders of a push that differ from what a server has, whose weights it knows as `held`:
    all, where the trainer does not know them by that number.
    """
    build_on = held is not None and held == push["since"]
    return [link["folder"] for link in push["links"] if not build_on or link["version"] > held]


def loaded_with(name: str) -> str:
    """What of a model vLLM can only load together: q, k and v are one tensor there, and all experts
    of a layer. It fills what is missing of a layer's tensor with whatever is in memory, and puts
    back a tensor of which it is given nothing.
    """
    layer = re.match(r".*\blayers\.\d+\.", name)
    if layer is None:
        return name
    return layer[0] + ("experts" if ".experts." in name else "")


def names_in(folder: str) -> dict[str, bool]:
    """The tensors that a folder has something of, and whether it has the whole."""
    keys = [key for file in _open(folder) for key in file.keys()]
    parts = {key.removeprefix(PLACES): False for key in keys if key.startswith(PLACES)}
    return parts | {key: True for key in keys if not key.startswith((PLACES, VALUES, CHECK))}


def _open(folder: str) -> list[Any]:
    from safetensors import safe_open

    paths = sorted(glob.glob(os.path.join(glob.escape(folder), "*.safetensors")))
    return [safe_open(path, framework="pt") for path in paths]
