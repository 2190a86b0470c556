"""Whether files are as they were written: the size and SHA-256 of each file of a folder, and of
every block of the large ones, so that a part that is read is checked in the same pass.

A manifest is found out when it is damaged itself. It is no signature: whoever may write the folder
may write another one.
"""

import functools
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from moetrain.errors import WeightsError
from moetrain.pulse import beat

NAME = "manifest.json"
BLOCK = 1 << 22  # bytes
_LOOK = 1 << 20  # bytes of a file that are hashed between two beats

Files = Mapping[str, "Entry"]


class DamageError(WeightsError):
    """A file is not as it was written."""


@dataclass(frozen=True)
class Entry:
    """A file as it was written."""

    size: int
    digest: str  # SHA-256 in hex
    blocks: tuple[str, ...] = ()  # of each BLOCK bytes, where there are more


def entry(path: Path) -> Entry:
    """A file as the disk gives it back: its pages are written and dropped from memory first."""
    whole, size = hashlib.sha256(), 0
    blocks: list[str] = []
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        while content := file.read(BLOCK):
            whole.update(content)
            size += len(content)
            blocks.append(hashlib.sha256(content).hexdigest())
            beat()
    return Entry(size, whole.hexdigest(), tuple(blocks) if size > BLOCK else ())


def entries(paths: Iterable[Path]) -> dict[str, Entry]:
    """Name -> entry of each file."""
    return {path.name: entry(path) for path in paths}


def complete(folder: Path, known: Files) -> dict[str, Entry]:
    """`known` and the files of `folder` that it lacks."""
    rest = [p for p in folder.iterdir() if p.is_file() and p.name not in known and p.name != NAME]
    return dict(known) | entries(sorted(rest))


def write(folder: Path, files: Files) -> None:
    """Write the manifest. Raises OSError."""
    (folder / NAME).write_text(_text(files))


def _text(files: Files) -> str:
    content: dict[str, Any] = {
        "files": {name: [one.size, one.digest] for name, one in files.items()},
        "blocks": {name: one.blocks for name, one in files.items() if one.blocks},
        "block": BLOCK,
    }
    content["sha256"] = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    return json.dumps(content, indent=1) + "\n"


class Manifest:
    """What a folder's manifest says, and which blocks were found to be as they were."""

    def __init__(self, folder: Path, files: Files):
        self.folder, self.files = folder, files
        self._seen: set[tuple[str, int]] = set()

    @classmethod
    def of(cls, folder: Path) -> "Manifest | None":
        """The folder's, None where it has none. DamageError when it cannot be read."""
        path = folder / NAME
        try:
            stat = path.stat()
        except OSError:
            return None
        return cls(folder, _parsed(path, stat.st_mtime_ns, stat.st_size))

    def all_there(self) -> None:
        """DamageError for a file that is gone or of another size."""
        for name, one in self.files.items():
            self._sized(name, one)

    def check(self, path: Path, start: int = 0, stop: int | None = None) -> None:
        """DamageError unless the bytes [start, stop) of a file of weights are as they were; each
        block is read once.
        """
        name = path.name
        one = self.files.get(name)
        if one is None:
            raise DamageError(
                f"{path} is none of the files that {self.folder / NAME} names. Copy the folder"
                f" again, or remove {NAME} if another program wrote this file."
            )
        self._sized(name, one)
        if not one.blocks:
            self._check_block(path, one, 0, one.size, one.digest)
            return
        stop = one.size if stop is None else stop
        for number in range(start // BLOCK, -(-stop // BLOCK)):
            self._check_block(path, one, number, BLOCK, one.blocks[number])

    def _sized(self, name: str, one: Entry) -> None:
        try:
            size = (self.folder / name).stat().st_size
        except OSError:
            raise self._damaged(name, "is missing") from None
        if size != one.size:
            raise self._damaged(name, f"has {size} bytes, {one.size} were written")

    def _check_block(self, path: Path, one: Entry, number: int, size: int, digest: str) -> None:
        if (path.name, number) in self._seen:
            return
        found = hashlib.sha256()
        left = size
        with path.open("rb") as file:
            file.seek(number * BLOCK)
            while left and (content := file.read(min(left, _LOOK))):
                found.update(content)
                left -= len(content)
        beat()
        if found.hexdigest() != digest:
            raise self._damaged(path.name, "has other bytes than were written")
        self._seen.add((path.name, number))

    def _damaged(self, name: str, what: str) -> DamageError:
        return DamageError(
            f"{self.folder / name} {what}. Copy the folder again, or remove {NAME} there if you"
            f" changed the file yourself."
        )


@functools.lru_cache(maxsize=32)
def _parsed(path: Path, written: int, size: int) -> Files:
    """A manifest's content; `written` and `size` say which."""
    problem = DamageError(
        f"{path} is damaged. Copy the folder again, or remove the file to read the rest unchecked."
    )
    try:
        text = path.read_bytes().decode()  # no newline becomes another
        content = cast(dict[str, Any], json.loads(text))
        if content.keys() == {"files"}:  # of a version that did not write blocks
            return {name: _entry(one) for name, one in content["files"].items()}
        blocks = cast(dict[str, list[str]], content["blocks"])
        files = {
            name: _entry(one, tuple(blocks.get(name, ()))) for name, one in content["files"].items()
        }
        whole = _text(files) == text and all(
            len(one.blocks) == -(-one.size // BLOCK) for one in files.values() if one.blocks
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise problem from None
    if not whole:
        raise problem
    return files


def _entry(given: Any, blocks: tuple[str, ...] = ()) -> Entry:
    size, digest = given
    if type(size) is not int or not 0 <= size < 1 << 62 or not isinstance(digest, str):
        raise ValueError("no size and digest")
    return Entry(size, digest, blocks)


def read_bytes(path: Path) -> bytes:
    """The content of a small file, checked where its folder's manifest names it. Raises OSError,
    DamageError.
    """
    content = path.read_bytes()
    found = Manifest.of(path.parent)
    if found is not None and path.name in found.files:
        one = found.files[path.name]
        if len(content) != one.size or hashlib.sha256(content).hexdigest() != one.digest:
            found.check(path)
            raise DamageError(f"{path} changed while it was read. Start again.")
    return content


def read_text(path: Path) -> str:
    """As `read_bytes`, UTF-8. Raises UnicodeDecodeError, too."""
    return read_bytes(path).decode("utf-8")


def check(folder: Path, names: Iterable[str] | None = None) -> None:
    """DamageError unless those of the files `names` (None: all) that the folder's manifest names
    are there, as they were written: for what another program reads.
    """
    found = Manifest.of(folder)
    if found is not None:
        for name in found.files if names is None else names:
            if name in found.files:
                found.check(folder / name)


_warned: set[Path] = set()


def say_unchecked(folder: Path) -> None:
    """Say once that a folder of weights has no manifest; on the first rank."""
    if folder in _warned or os.environ.get("RANK", "0") != "0":
        return
    _warned.add(folder)
    print(f"{folder} has no {NAME}: its weights are read as they are", flush=True)
