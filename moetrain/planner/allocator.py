"""What torch's caching allocator takes of a GPU for tensors that come and go, by its rules with
expandable segments, which jobs here set (`slurm/common.sh`): torch 2.13, c10/cuda's
CUDACachingAllocator. Imports no torch.
"""

from bisect import bisect_left, insort

ROUND = 512  # bytes that a block is a multiple of
SMALL = 2**20  # a larger block is in the other pool
PAGES = (2 * 2**20, 20 * 2**20)  # that a pool grows by: of small blocks, and of large ones
LEAST = (ROUND, 2**20)  # a free block is not cut where less would be left of it


class Pool:
    """Blocks in one range of addresses that only grows."""

    def __init__(self, page: int, least: int):
        self.page, self.least = page, least
        self.mapped = 0  # bytes
        self._end = 0  # of the last block in use
        self._by_size: list[tuple[int, int]] = []  # (size, start) of free blocks
        self._starts: dict[int, int] = {}  # start -> size of them
        self._ends: dict[int, int] = {}  # end -> start

    def take(self, size: int) -> tuple[int, int]:
        """(start, size) of a block: of the smallest that is free and large enough, else behind the
        last.
        """
        place = bisect_left(self._by_size, (size, 0))
        if place == len(self._by_size):
            start = self._end
            self._end += size
            self.mapped = max(self.mapped, -(-self._end // self.page) * self.page)
            return start, size
        whole, start = self._by_size[place]
        self._drop(start)
        if whole - size < self.least:
            return start, whole
        self._add(start + size, whole - size)
        return start, size

    def give(self, start: int, size: int) -> None:
        """Free a block; with free ones beside it it is one."""
        if start in self._ends:
            before = self._ends[start]
            size += self._drop(before)
            start = before
        if start + size in self._starts:
            size += self._drop(start + size)
        if start + size == self._end:
            self._end = start  # its pages stay
        else:
            self._add(start, size)

    def _add(self, start: int, size: int) -> None:
        insort(self._by_size, (size, start))
        self._starts[start], self._ends[start + size] = size, start

    def _drop(self, start: int) -> int:
        size = self._starts.pop(start)
        del self._ends[start + size]
        del self._by_size[bisect_left(self._by_size, (size, start))]
        return size


class Allocator:
    """Both pools."""

    def __init__(self) -> None:
        self.pools = [Pool(page, least) for page, least in zip(PAGES, LEAST, strict=True)]

    @property
    def reserved(self) -> int:
        """Bytes taken of the device, which are never fewer than before."""
        return sum(pool.mapped for pool in self.pools)

    def take(self, size: int) -> tuple[int, int, int]:
        """A block for a tensor, to `give` back."""
        rounded = -(-size // ROUND) * ROUND
        pool = int(rounded > SMALL)
        return (pool, *self.pools[pool].take(rounded))

    def give(self, block: tuple[int, int, int]) -> None:
        """It is free again."""
        pool, start, size = block
        self.pools[pool].give(start, size)
