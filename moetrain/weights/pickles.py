"""Pickles read without running anything: only what a list names is made of them. No torch."""

import contextlib
import io
import pickle
import pickletools
import resource
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

ROOM, ROOM_A_BYTE = 1 << 28, 64  # bytes of memory for a pickle, besides those for each of its own

type Allowed = Mapping[tuple[str, str], Any]


class RefusedError(Exception):
    """A pickle names what it needs not."""


class _Plain(pickle.Unpickler):
    """Reads what is made of `allowed` and of plain values; references to something outside of the
    pickle come as they are.
    """

    def __init__(self, content: bytes, allowed: Allowed):
        super().__init__(io.BytesIO(content))
        self._allowed = allowed

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self._allowed[module, name]
        except KeyError:
            raise RefusedError(f"it asks for {module}.{name}") from None

    def persistent_load(self, pid: Any) -> Any:
        return pid


def load(content: bytes, allowed: Allowed) -> Any:
    """What a pickle holds. Raises RefusedError, MemoryError, and whatever damaged bytes lead to."""
    return _Plain(content, allowed).load()


def load_small(content: bytes, allowed: Allowed) -> Any:
    """The same of a few bytes, in threads too, for which memory cannot be bounded: instructions
    that ask for more than there is are refused.
    """
    for code, argument, _ in pickletools.genops(content):
        is_large = isinstance(argument, int) and argument > len(content)
        if code.name in ("BYTEARRAY8", "FRAME") or ("PUT" in code.name and is_large):
            raise RefusedError(f"it asks for memory ({code.name})")
    return load(content, allowed)


@contextlib.contextmanager
def bounded(num_bytes: int) -> Iterator[None]:
    """Meanwhile this process may take no more memory than a pickle of `num_bytes` needs: five bytes
    of one can ask for 64 GB (LONG_BINPUT; Python 3.12).
    """
    room = ROOM + ROOM_A_BYTE * num_bytes
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    used = int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()
    wanted = used + room
    if soft != resource.RLIM_INFINITY:
        wanted = min(wanted, soft)
    resource.setrlimit(resource.RLIMIT_DATA, (wanted, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
