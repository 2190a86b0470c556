"""Huge pages: a fork copies the page table, and a process that has imported everything has 120,000
pages of 4 kB. That takes 29 ms of CPU time, and 7 ms with pages of 2 MB (Linux 6.18).
"""

import ctypes
import re
from pathlib import Path

SIZE = 1 << 21
COLLAPSE = 25  # of madvise; Linux has it since 6.1, and refuses it before
_PRIVATE = re.compile(r"([0-9a-f]+)-([0-9a-f]+) rw-p \S+ 00:00 0 +(?:\[heap\])?$", re.MULTILINE)


def use_huge_pages() -> None:
    """For what this process has allocated so far, as far as the kernel agrees."""
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    for begin, end in _PRIVATE.findall(Path("/proc/self/maps").read_text()):
        first, last = -(-int(begin, 16) // SIZE) * SIZE, int(end, 16) // SIZE * SIZE
        if first < last:
            madvise(first, last - first, COLLAPSE)
