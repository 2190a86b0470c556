"""A run as it goes on: its ledger, of which only what is new is read, and whether a job holds it.

What is kept of a ledger has a bound, however long it is; so has the time to open it: of a long one
the end is read whole, and of the rest a row a block, the evaluations, and what was lost.
"""

import json
import os
import platform
import re
import time
from array import array
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from moetrain.observe.curves import numbers
from moetrain.observe.ledger import LedgerRow, is_row
from moetrain.observe.runs import is_locked

BLOCK, TAIL = 1 << 18, 1 << 20  # bytes: of a row each, and of the end that is read whole
POINTS = 1024  # of a curve
NAMES = 2000  # figures of a run
RECENT = 20  # training rows
ALIVE_SECONDS = 60.0  # the count of a lease is raised every five seconds
_FAULTS = re.compile(rb'(?<!\\)("faults/(?:[^"\\]|\\.)+"): ([-+.0-9eE]+)')
_EVAL, _WARNING = b'"eval_', b'"warning": '


@dataclass
class Thinned:
    """A figure as it went: each `every`-th value, which doubles when there are POINTS of them."""

    steps: "array[int]" = field(default_factory=lambda: array("q"))
    values: "array[float]" = field(default_factory=lambda: array("d"))
    num: int = 0
    every: int = 1

    def add(self, step: int, value: float) -> None:
        """The next point."""
        self.num += 1
        if (self.num - 1) % self.every:
            return
        self.steps.append(step)
        self.values.append(value)
        if len(self.steps) >= POINTS:
            del self.steps[1::2], self.values[1::2]
            self.every *= 2


@dataclass
class Followed:
    """What a ledger has said so far."""

    step: int = 0
    num_rows: int = 0  # that were read
    num_broken: int = 0  # lines that are no rows
    training: LedgerRow = field(default_factory=LedgerRow)  # the newest training row
    recent: "deque[dict[str, float]]" = field(default_factory=lambda: deque(maxlen=RECENT))
    held_out: LedgerRow = field(default_factory=LedgerRow)  # the newest evaluation
    curves: dict[str, Thinned] = field(default_factory=dict[str, Thinned])
    faults: "Counter[str]" = field(default_factory=lambda: Counter[str]())
    fault_step: int = 0  # the last one that lost something, as far as rows were read
    warnings: "deque[tuple[int, str]]" = field(default_factory=lambda: deque(maxlen=3))

    def add(self, row: LedgerRow) -> None:
        """A row, but for what it counts: that is of all rows, and this of those that are read."""
        self.num_rows += 1
        self.step = int(row["step"])
        figures = numbers(row)
        if any(name.startswith("eval_") for name in figures):
            self.held_out = row
        if "loss" in row:
            self.training = row
            self.recent.append(figures)
        if any(name.startswith("faults/") and value for name, value in figures.items()):
            self.fault_step = self.step
        for name, value in figures.items():
            if name in self.curves or len(self.curves) < NAMES:
                self.curves.setdefault(name, Thinned()).add(self.step, value)
        message = row.get("warning") or []
        texts = cast(list[Any], message) if isinstance(message, list) else [message]
        self.warnings.extend((self.step, str(text)) for text in texts)


class Follower:
    """Reads the ledger at `path` as it grows. `said` is what it has said."""

    def __init__(self, path: Path):
        self.path = path
        self.said = Followed()
        self.changed: float | None = None  # when the file was written last, seconds since 1970
        self._place, self._offset = (0, 0), 0

    def poll(self) -> bool:
        """Read what is new, up to the last whole line; whether there was any. A ledger that a
        resumed run has written anew is read from its beginning. Raises OSError for one that cannot
        be read; none at all is an empty one.
        """
        try:
            with self.path.open("rb") as file:
                there = os.fstat(file.fileno())
                place = (there.st_dev, there.st_ino)
                if place != self._place or there.st_size < self._offset:
                    self.said, self._place, self._offset = Followed(), place, 0
                self.changed = there.st_mtime
                before = self._offset
                file.seek(before)
                while block := _whole_lines(file.read(BLOCK), file):
                    self._offset += len(block)
                    if there.st_size - self._offset > TAIL:
                        self._skim(block)
                    else:
                        self._read(block)
                return self._offset > before
        except FileNotFoundError:
            self.said, self.changed, self._place, self._offset = Followed(), None, (0, 0), 0
            return False

    def _read(self, block: bytes) -> None:
        self._count(block)
        for line in block.splitlines():
            self._add(line)

    def _skim(self, block: bytes) -> None:
        """A row, the last evaluation, and what was said and lost."""
        self._count(block)
        lines = {0, block.rfind(b"\n", 0, max(0, block.rfind(_EVAL))) + 1}
        at = block.rfind(_WARNING)
        lines |= {block.rfind(b"\n", 0, at) + 1} if at >= 0 else set()
        for start in sorted(lines):
            self._add(block[start : block.index(b"\n", start)])

    def _count(self, block: bytes) -> None:
        if b'"faults/' in block:
            for name, value in _FAULTS.findall(block):
                if len(self.said.faults) < NAMES:
                    self.said.faults[_name(name)] += round(_float(value))

    def _add(self, line: bytes) -> None:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if is_row(row):
            self.said.add(row)
        else:
            self.said.num_broken += 1


def _whole_lines(block: bytes, file: Any) -> bytes:
    """Up to the last end of a line; a longer line whole, and b"" where it has no end yet."""
    if block and b"\n" not in block:
        blocks = [block]
        while b"\n" not in blocks[-1]:
            blocks.append(file.read(BLOCK))
            if not blocks[-1]:
                return b""
        block = b"".join(blocks)
    whole = block[: block.rfind(b"\n") + 1]
    file.seek(len(whole) - len(block), os.SEEK_CUR)
    return whole


def _name(text: bytes) -> str:
    try:
        return str(json.loads(text))
    except ValueError:
        return text.decode(errors="replace")


def _float(text: bytes) -> float:
    try:
        value = float(text)
    except ValueError:
        return 0.0
    return value if abs(value) < 1e15 else 0.0


class Holder:
    """Whether a job holds the run in `folder`, on this node or on another.

    A job of this node holds the kernel's lock. One of another has a lease alone, whose count it
    raises: that is seen from the second look on; at the first one the file's age must do.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._lease: dict[str, Any] = {}
        self._seen = float("-inf")  # when its count was seen to rise
        self._has_locks = False  # the file system, as this node sees it

    def look(self) -> str | None:
        """Where it runs: "here" or a host's name; None where nothing holds the run."""
        before, age = self._lease, self._read()
        if is_locked(self.folder):
            self._has_locks = True
            return "here"
        host, is_other = self._lease.get("host"), self._lease.get("host") != platform.node()
        if not self._lease or (self._has_locks and not is_other):
            return None
        if (age < ALIVE_SECONDS and is_other) if not before else before != self._lease:
            self._seen = time.monotonic()
        return str(host) if time.monotonic() - self._seen < ALIVE_SECONDS else None

    def _read(self) -> float:
        """Its age in seconds."""
        path = self.folder / ".lease"
        try:
            lease, written = json.loads(path.read_text()), path.stat().st_mtime
        except FileNotFoundError:
            self._lease = {}
            return 0.0
        except (OSError, ValueError, RecursionError):  # it is being written
            return 0.0
        self._lease = cast(dict[str, Any], lease) if isinstance(lease, dict) else {}
        return time.time() - written


def last_end(folder: Path) -> str:
    """How the newest start ended, in words; "" where nothing says so (run/starts.py)."""
    rows: list[dict[str, Any]] = []
    for line in _lines(folder / "starts.jsonl"):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        rows += [cast(dict[str, Any], row)] if isinstance(row, dict) else []
    if not rows:
        return ""
    if "end" not in rows[-1]:
        return "killed, or lost with its node"
    return f"exit code {rows[-1]['end']}" + ", a crash" * (rows[-1].get("crash") is True)


def _lines(path: Path) -> Iterator[bytes]:
    try:
        yield from path.read_bytes().split(b"\n")
    except OSError:
        return
