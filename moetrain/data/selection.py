"""Which records of each input a run reads: a sample of them, and a share that is held out."""

from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass, replace
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from moetrain.config.recipe import Recipe
from moetrain.data.rejects import Reject
from moetrain.data.sources import Record, find_sources, read_rows
from moetrain.errors import DataError, plural


@dataclass(frozen=True)
class Selection:
    """The same records wherever and however often a run is started.

    take: records of each input, None for all of one; more than there are: some again. share: of
    each input, held out; at least one record. Without shuffle the first are taken and the last are
    held out. What is held out is never among what is taken.
    """

    take: tuple[int | None, ...]
    share: float
    seed: int
    shuffle: bool
    held_out: bool = False

    @classmethod
    def of(cls, recipe: Recipe) -> Self | None:
        """Of data.train; None where all of it is read."""
        data = recipe.data
        if data.take is None and not data.eval_share:
            return None
        take = tuple(data.take) if data.take is not None else (None,) * len(data.train)
        return cls(take, data.eval_share, recipe.seed, data.shuffle)

    def other(self) -> Self:
        """What this one leaves out for evaluation."""
        return replace(self, held_out=True)

    def key(self) -> list[Any]:
        """All that decides, for a cache."""
        return list(astuple(self))

    def times(self, number: int, num_records: int, name: str) -> NDArray[np.int64]:
        """[num_records] how often each record of input `number`, called `name`, is read. Raises
        DataError where nothing would be left to train on.
        """
        wanted = self.take[number]
        order = np.arange(num_records)
        if self.shuffle:
            order = np.random.default_rng([self.seed, number]).permutation(num_records)
        num_held = 0
        if self.share:
            basis = num_records if wanted is None else min(num_records, wanted)
            num_held = max(int(basis * self.share), 1)
        # Shuffled, either end would do; in order the last records are the held-out ones.
        rest, held = np.split(order, [num_records - num_held])
        times = np.zeros(num_records, dtype=np.int64)
        if self.held_out:
            times[held] = 1
            return times
        left = len(rest) if wanted is None else wanted - num_held
        if not len(rest) or left < 1:
            raise DataError(
                f"{name} has {plural(num_records, 'record')}, and data.eval_share={self.share:g}"
                f" leaves none of them to train on. Give data.eval instead."
            )
        whole, more = divmod(left, len(rest))
        times[rest] = whole
        times[rest[:more]] += 1
        return times


def rows_of(
    inputs: Sequence[str], selection: Selection | None = None, *, held_out: bool = False
) -> Iterator[Record | Reject]:
    """The records of all inputs in their order, or those of them that are selected: each once
    before any comes a second time. `held_out`: of folders with splits the held-out one is read.
    """
    for number, given in enumerate(inputs):
        if selection is None:
            yield from _rows(given, held_out)
            continue
        num_records = sum(1 for _ in _rows(given, held_out))
        times = selection.times(number, num_records, given)
        for turn in range(int(times.max(initial=0))):
            for row, often in zip(_rows(given, held_out), times, strict=True):
                if often > turn:
                    yield row


def _rows(given: str, held_out: bool) -> Iterator[Record | Reject]:
    sources = find_sources([given], held_out=held_out)
    return (row for source in sources for row in read_rows(source))
