"""Weights as the folders of successive pushes: the first has every tensor whole, each later one
what moved since the one before it. Read by the trainer, and in vLLM's processes, which have no
moetrain.

A tensor that moved is there whole, under its name, or in part where that is less: `values:NAME`
[m, width] are the new values at `places:NAME` [m] of the tensor seen as [-1, width]. The width is 1
or the tensor's last dimension.
"""

import glob
import os
from collections.abc import Iterable
from typing import Any

PLACES, VALUES = "places:", "values:"


class Folders:
    """The tensors as the last of `folders` left them."""

    def __init__(self, folders: Iterable[str]):
        self._files: dict[str, list[Any]] = {}  # the newest whole tensor's, then later parts of it
        for folder in folders:
            self._add(folder)

    def _add(self, folder: str) -> None:
        for file in _open(folder):
            for key in file.keys():
                if key.startswith(PLACES):
                    name = key.removeprefix(PLACES)
                    if name not in self._files:
                        raise ValueError(f"{folder} has a part of {name}, which is nowhere whole")
                    self._files[name].append(file)
                elif not key.startswith(VALUES):
                    self._files[key] = [file]

    def names(self) -> list[str]:
        return list(self._files)

    def schema(self) -> dict[str, list[int]]:
        """Name -> shape."""
        return {n: list(own[0].get_slice(n).get_shape()) for n, own in self._files.items()}

    def read(self, name: str) -> Any:
        """A tensor, put together."""
        whole, *parts = self._files[name]
        tensor = whole.get_tensor(name)
        if parts:  # what a file gives is one memory for all who ask it
            tensor = tensor.clone()
        for part in parts:
            values = part.get_tensor(VALUES + name)
            tensor.view(-1, values.size(1))[part.get_tensor(PLACES + name).long()] = values
        return tensor


def names_in(folder: str) -> dict[str, bool]:
    """The tensors that a folder has something of, and whether it has the whole."""
    keys = [key for file in _open(folder) for key in file.keys() if not key.startswith(VALUES)]
    return {key.removeprefix(PLACES): not key.startswith(PLACES) for key in keys}


def _open(folder: str) -> list[Any]:
    from safetensors import safe_open

    paths = sorted(glob.glob(os.path.join(glob.escape(folder), "*.safetensors")))
    return [safe_open(path, framework="pt") for path in paths]
