"""A command in a process of its own: what it says, and which files it opens."""

import ctypes
import os
import struct
import sys
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

OPENED = 0x20  # inotify's IN_OPEN


@dataclass
class Done:
    """What came of a command."""

    code: int
    said: str  # on stderr
    made: str  # a digest of what it made
    opened: set[str] = field(default_factory=set[str])
    imported: list[str] = field(default_factory=list[str])  # modules


def apart(do: Callable[[], int], place: Path, watched: Path | None = None) -> Done:
    """Do it in a forked process; what it says, which files of `watched` it opens, and which modules
    it imports.
    """
    said = tempfile.TemporaryFile(dir=place)
    modules = tempfile.TemporaryFile(dir=place)
    with said, modules:
        known = set(sys.modules)
        events = _watch(watched) if watched else None
        pid = os.fork()
        if not pid:
            null = os.open(os.devnull, os.O_RDWR)
            os.dup2(null, 0)
            os.dup2(null, 1)
            os.dup2(said.fileno(), 2)
            try:
                code = do()
            except SystemExit as end:
                code = end.code if isinstance(end.code, int) else 1
            except BaseException:
                traceback.print_exc()
                code = 99
            sys.stderr.flush()
            modules.write("\n".join(name for name in sys.modules if name not in known).encode())
            modules.flush()
            os._exit(code)
        _, status = os.waitpid(pid, 0)
        said.seek(0)
        told = said.read().decode(errors="replace")
        modules.seek(0)
        imported = modules.read().decode().split("\n")
        opened = _opened(events) if events is not None else set[str]()
    return Done(os.waitstatus_to_exitcode(status), told, "", opened, imported)


def _watch(folder: Path) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    events = libc.inotify_init1(os.O_NONBLOCK)
    assert events >= 0 and libc.inotify_add_watch(events, os.fsencode(folder), OPENED) >= 0
    return events


def _opened(events: int) -> set[str]:
    found: set[str] = set()
    while True:
        try:
            data = os.read(events, 1 << 16)
        except BlockingIOError:
            os.close(events)
            return found
        while data:
            size = struct.unpack_from("iIII", data)[3]
            found.add(data[16 : 16 + size].rstrip(b"\0").decode())
            data = data[16 + size :]
