"""The weights of the last push, on disk for all servers: a whole folder, and after it one for each
push of what moved. `remote/moetrain_weights.py` has their format and reads them.
"""

import json
import shutil
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from moetrain import files
from moetrain.errors import RolloutError
from moetrain.rollout.remote.moetrain_weights import (
    CHECK,
    PLACES,
    VALUES,
    Folders,
    checksum,
    names_in,
)

SHARD_BYTES = 5_000_000_000
MOST_LINKS = 64  # folders that a reader puts together
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Link:
    """The folder of a push."""

    version: int
    folder: Path
    size: int  # bytes of its tensors


class Pushed:
    """The folders of a run's pushes, as far as they are of use.

    Args:
        folder: takes them; every server must see it.
        hf: content of config.json.
    """

    def __init__(self, folder: Path, hf: dict[str, Any]):
        self.folder, self.hf = folder, hf
        self.links: list[Link] = []  # a whole one, then what moved after it
        self.whole_bytes = 0
        self._lock = threading.Lock()

    @property
    def version(self) -> int | None:
        """Whose weights these are; None where there are none."""
        return self.links[-1].version if self.links else None

    @property
    def held(self) -> int | None:
        """The version that what moved since can be added to; None where nothing is there, or so
        much that all is to be written anew.
        """
        size = sum(link.size for link in self.links)
        much = len(self.links) > MOST_LINKS or size > 2 * self.whole_bytes
        return None if much else self.version

    def write(self, weights: Iterable[tuple[str, Tensor]], version: int, *, whole: bool) -> int:
        """Take the weights of a push: all of them, or those of which some may have moved since the
        last one. The bytes of what moved. Raises RolloutError.
        """
        if whole:
            self.clear()
            self.tidy()  # before there is another one on the disk
        changes = weights if whole else self._changes(weights)
        link = self._write(changes, version, f"{version:08d}")
        self.links = [*self.links, link]
        if whole:
            self.whole_bytes = link.size
        else:
            self._drop_the_outdated()
        return link.size

    def clear(self) -> None:
        """These weights are served no more."""
        self.links = []

    def whole(self) -> Path:
        """A folder of all weights, which a fresh server starts from."""
        with self._lock:  # servers are lost together
            if len(self.links) > 1:
                last = self.links[-1].version
                self.links = [self._write(self._all(), last, f"{last:08d}-whole")]
            return self.links[0].folder

    def message(self, since: int | None) -> dict[str, Any]:
        """What a server is told that has the weights of push `since` (None: of none of these)."""
        links = [{"version": link.version, "folder": str(link.folder)} for link in self.links]
        return {"links": links, "since": since, "version": self.version}

    def tidy(self) -> None:
        """Remove what no server will read again."""
        folders = {link.folder for link in self.links}
        for old in self.folder.iterdir() if self.folder.is_dir() else ():
            if old not in folders:
                shutil.rmtree(old, ignore_errors=True)

    def _held(self) -> Folders:
        try:
            return Folders(str(link.folder) for link in self.links)
        except SafetensorError as error:
            raise ValueError(str(error)) from error

    def _all(self) -> Iterator[tuple[str, Tensor]]:
        held = self._held()
        for name in held.names():
            yield name, held.read(name)

    def _changes(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Of each tensor what moved, as it is written."""
        held = self._held()
        for name, tensor in weights:
            new = tensor.cpu().contiguous()
            part = part_of(held.read(name), new)
            if part is None:
                continue
            places, values = part
            if places.nbytes + 8 + values.nbytes >= new.nbytes:
                yield name, new
            else:
                yield PLACES + name, places
                yield CHECK + name, torch.tensor(checksum(new))
                yield VALUES + name, values

    def _write(self, tensors: Iterable[tuple[str, Tensor]], version: int, name: str) -> Link:
        """A Hugging Face folder without a tokenizer: only ids travel."""
        folder = self.folder / name
        written = 0
        try:
            shutil.rmtree(folder, ignore_errors=True)
            with files.sibling_folder(folder) as part:
                (part / "config.json").write_text(json.dumps(self.hf))
                for number, shard in enumerate(_shards(tensors)):
                    save_file(shard, part / f"{number:05d}.safetensors", {"format": "pt"})
                    written += sum(tensor.nbytes for tensor in shard.values())
                part.rename(folder)
        except ValueError as error:  # of what earlier pushes left there
            raise RolloutError(
                f"{self.folder}: {error}. Its files were changed: start again, and all weights are"
                " written anew."
            ) from error
        except (OSError, RuntimeError, SafetensorError) as error:  # the last: a full disk
            raise RolloutError(
                f"The weights of step {version} cannot be written to {self.folder}: {error}. Make"
                " room there."
            ) from error
        return Link(version, folder, written)

    def _drop_the_outdated(self) -> None:
        """Leave out folders of which every tensor is whole in a later one."""
        current: list[Link] = []
        later: set[str] = set()
        for link in reversed(self.links):
            held = names_in(str(link.folder))
            if not current or not held.keys() <= later:
                current.insert(0, link)
            later |= {name for name, whole in held.items() if whole}
        self.links = current


def part_of(old: Tensor, new: Tensor) -> tuple[Tensor, Tensor] | None:
    """The places and values of what differs in its bits, by numbers or by rows, whichever is less;
    None where nothing does.
    """
    bits = BITS[new.element_size()]
    differs = old.contiguous().view(-1).view(bits) != new.view(-1).view(bits)
    count = int(differs.count_nonzero())
    if not count:
        return None
    kind = torch.int32 if new.numel() < 1 << 31 else torch.int64
    width = new.size(-1) if new.dim() > 1 else 1
    rows = differs.view(-1, width).any(1) if width > 1 else differs
    if count * (kind.itemsize + new.itemsize) < int(rows.count_nonzero()) * (
        kind.itemsize + width * new.itemsize
    ):
        rows, width = differs, 1
    places = rows.nonzero()[:, 0]
    return places.to(kind), new.view(-1, width)[places]


def _shards(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors:
        shard[name] = tensor.to("cpu", copy=True).contiguous()
        size += tensor.nbytes
        if size >= SHARD_BYTES and not name.startswith((PLACES, CHECK)):  # values follow
            yield shard
            shard, size = {}, 0
    if shard:
        yield shard
