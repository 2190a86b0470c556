"""An index while it is written, in blocks: `.NAME.part` beside its place holds what is done, and a
journal, so that a build that was killed goes on after its last whole block.

Each block is told from damage by digests in the journal, so that nothing waits for the disk.
"""

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Any

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from moetrain import files
from moetrain.data.index_files import HEADER, MAGIC, VERSION
from moetrain.data.pieces import Place
from moetrain.data.rejects import Reject, line_of
from moetrain.errors import DataError

JOURNAL = "journal"
CONTENTS = ("tokens", "lengths", "rejected")
CODES: dict[Any, int] = {np.uint16: 8, np.int32: 4}  # of a token's type, in an index
SMALL_VOCAB = 65500  # Megatron's: from there on a token takes four bytes
AT_ONCE = 1 << 20  # documents


@dataclass(frozen=True)
class State:
    """What is done."""

    source: int = 0  # see pieces.Place
    offset: int = 0
    row: int = 0  # of the source that is being read, where its pieces are counted by themselves
    num_documents: int = 0
    num_tokens: int = 0
    num_rejected: int = 0
    num_empty: int = 0
    num_special: int = 0
    num_bytes: int = 0  # that are read
    sizes: tuple[int, ...] = (0, 0, 0)  # of CONTENTS

    @property
    def place(self) -> Place:
        return Place(self.source, self.offset)


@dataclass(frozen=True)
class Block:
    """What became of a piece."""

    tokens: NDArray[Any]  # with the end after each document
    lengths: NDArray[np.int32]
    rejects: Sequence[Reject]
    num_rows: int
    num_empty: int
    num_special: int


def type_of(vocab: int) -> type[np.generic]:
    """The type of a token in an index."""
    return np.uint16 if vocab < SMALL_VOCAB else np.int32


class Parts:
    """The files of an index that is being made."""

    def __init__(self, folder: Path, key: str, stack: ExitStack) -> None:
        self.folder = folder
        self.state = _resumed(folder, key)
        self._journal = stack.enter_context((folder / JOURNAL).open("a", encoding="utf-8"))
        if self.state == State():
            self._journal.truncate(0)
            self._journal.write(f"{key}\n")
            self._journal.flush()
        self._files: list[IO[bytes]] = []
        for name, size in zip(CONTENTS, self.state.sizes, strict=True):
            file = stack.enter_context((folder / name).open("ab"))
            file.truncate(size)
            self._files.append(file)

    def add(self, block: Block, state: State) -> None:
        """Write a block, after which all is done that `state` says but for the files' sizes."""
        contents = [
            block.tokens.data.cast("B") if len(block.tokens) else b"",
            block.lengths.data.cast("B") if len(block.lengths) else b"",
            b"".join(map(line_of, block.rejects)),
        ]
        for file, content in zip(self._files, contents, strict=True):
            file.write(content)
            file.flush()
        sizes = (a + len(b) for a, b in zip(self.state.sizes, contents, strict=True))
        self.state = replace(state, sizes=tuple(sizes))
        digests = [blake3(content).hexdigest() for content in contents]
        self._journal.write(f"{_entry(self.state, digests)}\n")
        self._journal.flush()

    def first_reject(self) -> Reject | None:
        """The first record that is none."""
        with (self.folder / "rejected").open("rb") as file:
            line = file.readline()
        return Reject(**json.loads(line)) if line else None

    def publish(self, prefix: Path, token: type[np.generic], note: str) -> None:
        """Give the files their names; the note goes beside them. Raises OSError."""
        # Data first, index last, and none between: an index of other data would be believed.
        paths = [Path(f"{prefix}{suffix}") for suffix in (".bin", ".json", ".idx")]
        with files.publish(*paths) as (data, beside, end):
            _write_index(end, self.folder / "lengths", self.state.num_documents, token)
            beside.write_text(note)
            os.replace(self.folder / "tokens", data)

    def publish_rejects(self, path: Path) -> None:
        """The list of rejects; without one there is none afterwards. Raises OSError."""
        if not self.state.num_rejected:
            path.unlink(missing_ok=True)
            return
        with files.publish(path) as (aside,):
            shutil.copyfile(self.folder / "rejected", aside)


@contextmanager
def parts_of(prefix: Path, key: str) -> Iterator[Parts]:
    """What there is of the index `prefix`, of the content that `key` stands for: nothing, or what a
    killed build has left. It goes with a DataError and at the end; another error leaves it.

    Raises OSError; DataError where another process is writing it.
    """
    with files.part_folder(prefix, DataError) as folder:
        parts: Parts | None = None
        try:
            with ExitStack() as stack, files.named(folder):
                parts = Parts(folder, key, stack)
                yield parts
        except BaseException as error:
            if parts is None or isinstance(error, DataError) or parts.state == State():
                shutil.rmtree(folder, ignore_errors=True)
            raise
        shutil.rmtree(folder, ignore_errors=True)


def _entry(state: State, digests: Sequence[str]) -> str:
    line = json.dumps([asdict(state), digests])
    return f"{blake3(line.encode()).hexdigest()[:16]} {line}"


def _resumed(folder: Path, key: str) -> State:
    """What the journal says is done, as far as the files bear it out; what is past that goes."""
    journal, done = folder / JOURNAL, State()
    whole = 0
    with suppress(OSError, ValueError, TypeError, KeyError), ExitStack() as stack:
        lines = stack.enter_context(journal.open("rb"))
        contents = [stack.enter_context((folder / name).open("rb")) for name in CONTENTS]
        first = lines.readline()
        whole = len(first) if first.decode() == f"{key}\n" else 0
        while whole and (line := lines.readline()).endswith(b"\n"):
            digest, _, entry = line.decode().partition(" ")
            if blake3(entry.rstrip("\n").encode()).hexdigest()[:16] != digest:
                break
            fields, digests = json.loads(entry)
            state = State(**fields | {"sizes": tuple(fields["sizes"])})
            new = [b - a for a, b in zip(done.sizes, state.sizes, strict=True)]
            digests_there = [
                blake3(file.read(n)).hexdigest() for file, n in zip(contents, new, strict=True)
            ]
            if digests_there != digests:
                break
            done, whole = state, whole + len(line)
    if journal.exists():
        os.truncate(journal, whole if done != State() else 0)
    return done


def _write_index(path: Path, lengths: Path, num: int, token: type[np.generic]) -> None:
    """Megatron's index of documents that follow each other: for each its length, its place in
    bytes and its number.
    """
    width, place = np.dtype(token).itemsize, 0
    with path.open("wb") as file:
        file.write(HEADER.pack(MAGIC, VERSION, CODES[token], num, num + 1))
        with lengths.open("rb") as content:
            shutil.copyfileobj(content, file)
        with lengths.open("rb") as content:
            while (counts := np.fromfile(content, np.int32, AT_ONCE)).size:
                ends = place + np.cumsum(counts, dtype=np.int64) * width
                (ends - counts.astype(np.int64) * width).tofile(file)
                place = int(ends[-1])
        for first in range(0, num + 1, AT_ONCE):
            np.arange(first, min(num + 1, first + AT_ONCE), dtype=np.int64).tofile(file)
