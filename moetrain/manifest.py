"""Whether files are as they were written: the size and XXH3 digest (128 bits) of each file of a
folder, and of every piece of the large ones, so that a part that is read is checked in the same
pass. Earlier versions wrote BLAKE3 and SHA-256, which are read, and take longer than the reading.

A manifest is found out when it is damaged itself. It is no signature: whoever may write the folder
may write another one.
"""

import bisect
import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from blake3 import blake3
from xxhash import xxh3_128

from moetrain.errors import WeightsError
from moetrain.pulse import beat

NAME = "manifest.json"
HASHES: Mapping[str, Callable[[], Any]] = {
    "xxh3_128": xxh3_128,
    "blake3": blake3,
    "sha256": hashlib.sha256,
}
HASH = "xxh3_128"
BLOCK = 1 << 22  # bytes
_LOOK = 1 << 20  # bytes of a file that are hashed between two beats

Files = Mapping[str, "Entry"]


class DamageError(WeightsError):
    """A file is not as it was written."""


@dataclass(frozen=True)
class Piece:
    """The bytes of a file from the end of the piece before it up to `stop`."""

    stop: int
    digest: str  # in hex


@dataclass(frozen=True)
class Entry:
    """A file as it was written."""

    size: int
    digest: str  # in hex; of a file in pieces that of their digests
    pieces: tuple[Piece, ...] = ()  # of a file with more than BLOCK bytes

    @classmethod
    def of(cls, pieces: Sequence[Piece]) -> "Entry":
        """A file of these pieces."""
        if len(pieces) == 1:
            return cls(pieces[0].stop, pieces[0].digest)
        return cls(pieces[-1].stop, joined(piece.digest for piece in pieces), tuple(pieces))


def joined(digests: Iterable[str]) -> str:
    """One digest for the digests of parts, in their order."""
    return digest_of("".join(digests).encode())


def digest_of(content: bytes | memoryview, hash: str = HASH) -> str:
    """In hex."""
    found = HASHES[hash]()
    found.update(content)
    return str(found.hexdigest())


def entry(path: Path) -> Entry:
    """A file as the disk gives it back: its pages are written and dropped from memory first."""
    pieces: list[Piece] = []
    size = 0
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        while (content := file.read(BLOCK)) or not pieces:
            size += len(content)
            pieces.append(Piece(size, digest_of(content)))
            beat()
    return Entry.of(pieces)


def entries(paths: Iterable[Path]) -> dict[str, Entry]:
    """Name -> entry of each file."""
    return {path.name: entry(path) for path in paths}


def complete(folder: Path, known: Files) -> dict[str, Entry]:
    """`known` and the files of `folder` that it lacks."""
    rest = [p for p in folder.iterdir() if p.is_file() and p.name not in known and p.name != NAME]
    return dict(known) | entries(sorted(rest))


def write(folder: Path, files: Files, tensors: Mapping[str, str] | None = None) -> None:
    """Write the manifest; `tensors` are digests of Hugging Face tensors, which are the same in
    whatever files they lie. Raises OSError.
    """
    content: dict[str, Any] = {
        "hash": HASH,
        "files": {name: [one.size, one.digest] for name, one in files.items()},
        "pieces": {
            name: [[piece.stop, piece.digest] for piece in one.pieces]
            for name, one in files.items()
            if one.pieces
        },
    }
    if tensors:
        content["tensors"] = dict(sorted(tensors.items()))
    content["sha256"] = _digest(content)
    (folder / NAME).write_text(_text(content))


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _text(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=1) + "\n"


class Manifest:
    """What a folder's manifest says, and which pieces were found to be as they were."""

    def __init__(self, folder: Path, hash: str, files: Files, tensors: Mapping[str, str]):
        self.folder, self.hash, self.files, self.tensors = folder, hash, files, tensors
        self._seen: set[tuple[str, int]] = set()

    @classmethod
    def of(cls, folder: Path) -> "Manifest | None":
        """The folder's, None where it has none. DamageError when it cannot be read."""
        path = folder / NAME
        try:
            stat = path.stat()
        except OSError:
            return None
        return cls(folder, *_parsed(path, stat.st_mtime_ns, stat.st_size))

    def all_there(self) -> None:
        """DamageError for a file that is gone or of another size."""
        for name, one in self.files.items():
            self._sized(name, one)

    def check(self, path: Path, start: int = 0, stop: int | None = None) -> None:
        """DamageError unless the bytes [start, stop) of a file of weights are as they were; each
        piece is read once.
        """
        one = self._entry(path)
        for number, (low, high, digest) in self._pieces(one, start, stop):
            if (path.name, number) not in self._seen:
                self._compare(path, number, self._hashed(path, low, high), digest)

    def check_read(self, path: Path, start: int, content: memoryview) -> None:
        """The same of bytes that were read from `start` on: pieces that lie in them whole are not
        read again.
        """
        one = self._entry(path)
        stop = start + len(content)
        for number, (low, high, digest) in self._pieces(one, start, stop):
            if start <= low and high <= stop:
                found = digest_of(content[low - start : high - start], self.hash)
                self._compare(path, number, found, digest)
            elif (path.name, number) not in self._seen:
                self._compare(path, number, self._hashed(path, low, high), digest)

    def _entry(self, path: Path) -> Entry:
        one = self.files.get(path.name)
        if one is None:
            raise DamageError(
                f"{path} is none of the files that {self.folder / NAME} names. Copy the folder"
                f" again, or remove {NAME} if another program wrote this file."
            )
        self._sized(path.name, one)
        return one

    def _pieces(
        self, one: Entry, start: int, stop: int | None
    ) -> Iterator[tuple[int, tuple[int, int, str]]]:
        """(number, (first byte, one behind the last, digest)) of what [start, stop) meets."""
        stop = one.size if stop is None else stop
        if not one.pieces:
            yield 0, (0, one.size, one.digest)
            return
        number = bisect.bisect_right(one.pieces, start, key=lambda piece: piece.stop)
        low = one.pieces[number - 1].stop if number else 0
        while number < len(one.pieces) and low < stop:
            piece = one.pieces[number]
            yield number, (low, piece.stop, piece.digest)
            number, low = number + 1, piece.stop

    def _sized(self, name: str, one: Entry) -> None:
        try:
            size = (self.folder / name).stat().st_size
        except OSError:
            raise self._damaged(name, "is missing") from None
        if size != one.size:
            raise self._damaged(name, f"has {size} bytes, {one.size} were written")

    def _compare(self, path: Path, number: int, found: str, digest: str) -> None:
        beat()
        if found != digest:
            raise self._damaged(path.name, "has other bytes than were written")
        self._seen.add((path.name, number))

    def _hashed(self, path: Path, start: int, stop: int) -> str:
        found, left = HASHES[self.hash](), stop - start
        with path.open("rb") as file:
            file.seek(start)
            while left and (content := file.read(min(left, _LOOK))):
                found.update(content)
                left -= len(content)
        return str(found.hexdigest())

    def _damaged(self, name: str, what: str) -> DamageError:
        return DamageError(
            f"{self.folder / name} {what}. Copy the folder again, or remove {NAME} there if you"
            f" changed the file yourself."
        )


@functools.lru_cache(maxsize=32)
def _parsed(path: Path, written: int, size: int) -> tuple[str, Files, Mapping[str, str]]:
    """A manifest's hash, files and tensors; `written` and `size` say which."""
    problem = DamageError(
        f"{path} is damaged. Copy the folder again, or remove the file to read the rest unchecked."
    )
    try:
        text = path.read_bytes().decode()  # no newline becomes another
        content = cast(dict[str, Any], json.loads(text))
        if content.keys() != {"files"}:  # of a version that wrote no digest of its own
            rest = {key: value for key, value in content.items() if key != "sha256"}
            if _text(content) != text or content["sha256"] != _digest(rest):
                raise problem
        pieces = cast(dict[str, list[list[Any]]], content.get("pieces", {}))
        files = {
            name: _entry(size, digest, pieces.get(name, []) or _blocks(content, name, size))
            for name, (size, digest) in content["files"].items()
        }
        tensors = {str(name): str(digest) for name, digest in content.get("tensors", {}).items()}
        hash = content.get("hash", "sha256")
        if hash not in HASHES:
            raise DamageError(
                f"{path} has digests of a newer version ({hash!r:.40}). Install that version of"
                f" moetrain, or remove the file to read the rest unchecked."
            )
        if any(Path(name).name != name or b"\0" in name.encode() for name in files):
            raise problem  # outside of the folder, or no name
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise problem from None
    return hash, files, tensors


def _blocks(content: Mapping[str, Any], name: str, size: int) -> list[list[Any]]:
    """The pieces of a file in a manifest of an earlier version, which had all of one size."""
    digests: list[str] = content.get("blocks", {}).get(name, [])
    block = content.get("block", BLOCK)
    return [[min((i + 1) * block, size), digest] for i, digest in enumerate(digests)]


def _entry(size: Any, digest: Any, pieces: list[list[Any]]) -> Entry:
    stops = [stop for stop, _ in pieces]
    whole = [type(n) is int and 0 <= n < 1 << 62 for n in (size, *stops)]
    if not all(whole) or not all(isinstance(one, str) for one in (digest, *(d for _, d in pieces))):
        raise ValueError("no sizes and digests")
    if stops and (stops[-1] != size or stops != sorted(stops)):
        raise ValueError("pieces that do not cover the file")
    return Entry(size, digest, tuple(Piece(stop, one) for stop, one in pieces))


def read_bytes(path: Path) -> bytes:
    """The content of a small file, checked where its folder's manifest names it. Raises OSError,
    DamageError.
    """
    content = path.read_bytes()
    found = Manifest.of(path.parent)
    if found is not None and path.name in found.files:
        one = found.files[path.name]
        if len(content) != one.size or digest_of(content, found.hash) != one.digest:
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
