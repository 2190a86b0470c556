"""Rows from a source into files whose every byte has its place before the first is written, so that
threads write at once, a killed conversion goes on where it was, and the result is always the same.

What is being written lies in `.NAME.part` beside its place, with a journal of what is on disk.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from zlib_ng import zlib_ng

from moetrain import files
from moetrain.errors import WeightsError
from moetrain.manifest import HASH, HASHES, Entry, Piece, joined
from moetrain.weights.blobs import Blob
from moetrain.weights.rows import Rows, readable, row_bytes, span_rows, spans

JOURNAL = "journal"
RUN = 1 << 26  # bytes of one tensor that one thread moves at a time
_CACHED = 1 << 18  # bytes
SYNC = 1 << 26  # bytes that are written between two entries of the journal

type Report = Callable[[int, int], None]
"""(bytes that are written, bytes of the result)."""


@dataclass(frozen=True)
class Task:
    """Bytes of a file that one thread writes: fixed ones, then rows, then what ends their blob.

    Without a file the rows are only hashed.
    """

    file: str
    start: int
    fixed: bytes = b""
    tensor: str = ""
    low: int = 0
    high: int = 0
    blob: Blob | None = None
    is_hashed: bool = False  # whether the rows count for the tensor's own digest

    def pieces(self, rows: Rows) -> Iterator[tuple[int, int]]:
        """The rows in ranges that are hashed alone, as those of the whole tensor are cut."""
        if self.tensor:
            shape, dtype = rows.shape(self.tensor), rows.dtype_name(self.tensor)
            for start, stop in spans(shape, dtype):
                if start < self.high and stop > self.low:
                    yield max(start, self.low), min(stop, self.high)


def runs(shape: tuple[int, ...], dtype_name: str, low: int, stop: int) -> Iterator[tuple[int, int]]:
    """Rows [low, stop) of a tensor in ranges that one task moves, cut where its spans end."""
    step = span_rows(shape, dtype_name)
    many = step * max(1, RUN // (step * max(1, row_bytes(shape, dtype_name))))
    while low < stop:
        high = min(stop, (low // many + 1) * many)
        yield low, high
        low = high


@dataclass(frozen=True)
class Plan:
    """All of a result's large files."""

    sizes: Mapping[str, int]
    tasks: tuple[Task, ...]

    @property
    def num_bytes(self) -> int:
        return sum(self.sizes.values())

    def key(self, origin: Sequence[str]) -> str:
        """What a journal belongs to: this plan, a source that is described by `origin`, and the
        hash of its digests.
        """
        digest = hashlib.sha256(json.dumps([HASH, dict(self.sizes), *origin]).encode())
        for task in self.tasks:
            line = f"{task.file} {task.start} {task.tensor} {task.low} {task.high}"
            digest.update(line.encode() + task.fixed)
        return digest.hexdigest()


@dataclass(frozen=True)
class Done:
    """What a task has written."""

    pieces: tuple[tuple[int, str], ...]  # (end in the file, digest)
    rows: tuple[tuple[int, str], ...]  # (first row, digest) of the tensor


@dataclass(frozen=True)
class Written:
    """What all tasks have."""

    entries: Mapping[str, Entry]
    tensors: Mapping[str, str]  # digests


def stream(
    plan: Plan,
    rows: Rows,
    folder: Path,
    *,
    origin: Sequence[str],
    workers: int,
    report: Report | None = None,
) -> Written:
    """Write the plan's files into `folder`, which holds what an earlier call for the same origin
    has written; the files are on disk afterwards.

    Raises OSError; whatever reading raises.
    """
    key = plan.key(origin)
    done = _resumed(folder / JOURNAL, key, plan)
    size = {i: _size(task, rows) for i, task in enumerate(plan.tasks)}
    total, written = sum(size.values()), sum(size[i] for i in done)
    with _opened(plan, folder) as handles, (folder / JOURNAL).open("a") as journal:

        def commit(new: Mapping[int, Done]) -> None:
            for name in {plan.tasks[i].file for i in new}:
                if name:
                    os.fdatasync(handles[name])
            for i, one in new.items():
                entry = json.dumps([i, one.pieces, one.rows])
                journal.write(f"{_entry_digest(key, entry)} {entry}\n")
            journal.flush()
            os.fsync(journal.fileno())
            done.update(new)

        fresh: dict[int, Done] = {}
        rest = [i for i in range(len(plan.tasks)) if i not in done]
        with ThreadPoolExecutor(1) as committing:  # the disk works while more is read
            last = committing.submit(commit, {})
            for i, one in in_threads(lambda i: _write(plan.tasks[i], rows, handles), rest, workers):
                fresh[i] = one
                written += size[i]
                if report is not None:
                    report(written, total)
                if last.done() and sum(size[j] for j in fresh) >= SYNC:
                    last.result()
                    last, fresh = committing.submit(commit, fresh), {}
            last.result()
            commit(fresh)
    return _collected(plan, done)


def _size(task: Task, rows: Rows) -> int:
    blob = task.blob
    if blob is not None:
        return blob.size
    if not task.tensor:
        return len(task.fixed)
    shape, dtype = rows.shape(task.tensor), rows.dtype_name(task.tensor)
    return len(task.fixed) + (task.high - task.low) * row_bytes(shape, dtype)


def in_threads[Job, Result](
    work: Callable[[Job], Result], jobs: Iterable[Job], workers: int
) -> Iterator[tuple[Job, Result]]:
    """(job, its result) as they end; no more begin once one has failed."""
    todo = iter(jobs)
    running: dict[Future[Result], Job] = {}
    with ThreadPoolExecutor(workers) as pool:
        try:
            while True:
                for job in islice(todo, workers + 1 - len(running)):
                    running[pool.submit(work, job)] = job
                if not running:
                    return
                ended, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in ended:
                    yield running.pop(future), future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _write(task: Task, rows: Rows, handles: Mapping[str, int]) -> Done:
    """Do one task."""
    handle, at, checksum = handles.get(task.file, -1), task.start, 0
    pieces: list[tuple[int, str]] = []
    hashed: list[tuple[int, str]] = []

    def add(content: memoryview | bytes) -> str:
        nonlocal at, checksum
        left, digest = memoryview(content), HASHES[HASH]()
        while left:  # a part that the processor's cache holds is read from memory once
            part, left = left[:_CACHED], left[_CACHED:]
            digest.update(part)
            if task.blob is not None:
                checksum = zlib_ng.crc32(part, checksum)
            if handle >= 0:
                put(handle, part, at)
                at += len(part)
        if handle >= 0:
            pieces.append((at, digest.hexdigest()))
        return digest.hexdigest()

    if task.fixed:
        add(task.fixed)
    checksum = 0
    for low, high in task.pieces(rows):
        content = rows.rows(task.tensor, low, high).reshape(-1).data
        digest = add(content)
        if task.is_hashed:
            hashed.append((low, digest))
    if task.blob is not None:
        add(task.blob.suffix(checksum))
    return Done(tuple(pieces), tuple(hashed))


def put(handle: int, content: memoryview | bytes, at: int) -> None:
    """All of it: a write may take only a part."""
    left = memoryview(content)
    while left:
        num = os.pwrite(handle, left, at)
        left, at = left[num:], at + num


def _collected(plan: Plan, done: Mapping[int, Done]) -> Written:
    pieces: dict[str, list[Piece]] = {name: [] for name in plan.sizes}
    tensors: dict[str, list[tuple[int, str]]] = {}
    for i, task in enumerate(plan.tasks):
        if task.file:
            pieces[task.file] += [Piece(stop, digest) for stop, digest in done[i].pieces]
        if task.is_hashed:
            tensors.setdefault(task.tensor, []).extend(done[i].rows)
    for name, entries in pieces.items():
        entries.sort(key=lambda piece: piece.stop)
        assert entries and entries[-1].stop == plan.sizes[name], f"{name} is not covered"
    return Written(
        {name: Entry.of(entries) for name, entries in pieces.items()},
        {
            name: joined(digest for _, digest in sorted(entries))
            for name, entries in tensors.items()
        },
    )


@contextmanager
def _opened(plan: Plan, folder: Path) -> Iterator[dict[str, int]]:
    """Handles of the plan's files, each of its full size, for which the disk has room."""
    handles: dict[str, int] = {}
    try:
        for name, size in plan.sizes.items():
            with files.named(folder / name):
                handles[name] = os.open(folder / name, os.O_RDWR | os.O_CREAT, 0o666)
                if os.fstat(handles[name]).st_size != size:
                    files.reserve(handles[name], size)
        yield handles
    finally:
        for handle in handles.values():
            os.close(handle)


def _entry_digest(key: str, entry: str) -> str:
    return hashlib.sha256(f"{key} {entry}".encode()).hexdigest()[:16]


def _resumed(journal: Path, key: str, plan: Plan) -> dict[int, Done]:
    """What a journal for this key says is on disk; one for another, or none, begins anew, and so do
    files that are not of their size any more.
    """
    done: dict[int, Done] = {}
    lines = journal.read_bytes().split(b"\n") if _is_plain(journal) else []
    if lines[:1] != [key.encode()]:
        _empty(journal.parent)
        journal.write_text(key + "\n")
        return done
    _empty(journal.parent, {JOURNAL, *plan.sizes})
    whole = len(key) + 1
    for line in lines[1:-1]:
        digest, _, entry = line.decode(errors="replace").partition(" ")
        if digest != _entry_digest(key, entry):
            break  # torn by the kill
        i, pieces, rows = json.loads(entry)
        done[i] = Done(tuple(map(tuple, pieces)), tuple(map(tuple, rows)))
        whole += len(line) + 1
    os.truncate(journal, min(whole, journal.stat().st_size))
    kept = {name for name, size in plan.sizes.items() if _size_of(journal.with_name(name)) == size}
    return {i: one for i, one in done.items() if plan.tasks[i].file in {*kept, ""}}


def _is_plain(path: Path) -> bool:
    return path.is_file() and not path.is_symlink()


def _size_of(path: Path) -> int:
    return path.stat().st_size if _is_plain(path) else -1


@contextmanager
def part_of(dst: Path, *, resume: bool) -> Iterator[Path]:
    """The folder `.NAME.part` beside `dst`, which takes its name in the end. A kill leaves it, for
    `resume`; an error removes it unless it is to be resumed.

    Raises OSError; WeightsError where another process is writing it.
    """
    with files.part_folder(dst, WeightsError) as part:
        try:
            if not resume:
                _empty(part)
            yield part
            files.sync_files(part)  # it may take long, and a kill meanwhile costs nothing
            (part / JOURNAL).unlink(missing_ok=True)
            files.put_folder(part, dst)
        except Exception:
            if not resume:
                shutil.rmtree(part, ignore_errors=True)
            raise


def _empty(folder: Path, kept: Collection[str] = ()) -> None:
    """Remove all but those of the names that are files."""
    for path in folder.iterdir():
        if path.name in kept and _is_plain(path):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def check_room(plan: Plan, part: Path) -> None:
    """WeightsError where the disk has too little room for what is not there yet."""
    there = sum(path.stat().st_blocks * 512 for path in part.iterdir())
    needed, free = plan.num_bytes - there, shutil.disk_usage(part).free
    if needed > free:
        raise WeightsError(
            f"No space left on the disk of {part.parent}: {readable(needed)} are needed and"
            f" {readable(free)} free. Make room there or give another folder."
        )
