"""A corpus in pieces of some megabytes, in order: what is tokenised and written at a time, and
where a killed build goes on.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from moetrain.data.rejects import Reject
from moetrain.data.sources import Cuts, Record, Source, cuts_of, read_part, read_rows

FIRST, LARGEST = 1 << 16, 1 << 23  # bytes: a mistake is seen soon, and later ones cost little each
SAMPLE = 1 << 15


@dataclass(frozen=True)
class Place:
    """Up to where a corpus is read."""

    source: int = 0  # that many sources are read whole
    offset: int = 0  # bytes, row groups or rows that are read of the next


@dataclass(frozen=True)
class Piece:
    """Records that follow each other: part of a source, or such as had to be read already."""

    end: Place
    num_bytes: int  # of the files up to its end
    number: int = 0  # of its source, where it is part of one
    path: Path | None = None
    cuts: Cuts = field(default_factory=lambda: Cuts(0))
    start: int = 0
    stop: int = 0
    rows: tuple[Record | Reject, ...] = ()

    @property
    def is_counted(self) -> bool:
        """Whether its records are counted from its beginning and not from their file's."""
        return self.path is not None and not self.cuts.is_table

    def read(self) -> Iterable[Record | Reject]:
        """Its records. DataError where the file is damaged."""
        if self.path is None:
            return self.rows
        return read_part(self.path, self.cuts, self.start, self.stop)


def total_bytes(sources: Sequence[Source]) -> int:
    """Of all files. Raises OSError."""
    return sum(_size(source) for source in sources)


def pieces(sources: Sequence[Source], place: Place) -> Iterator[Piece]:
    """What follows `place`, the first pieces small. DataError as read_rows; OSError."""
    size = FIRST
    before = total_bytes(sources[: place.source])
    waiting: list[Record | Reject] = []
    held = 0
    for number in range(place.source, len(sources)):
        source, offset = sources[number], place.offset if number == place.source else 0
        num_bytes, cuts = _size(source), cuts_of(source)
        if cuts is None:
            for row, record in enumerate(read_rows(source), start=1):
                if row <= offset:
                    continue
                waiting.append(record)
                held += _weight(record)
                if held >= size:
                    end = Place(number, row)
                    yield Piece(end, before + min(num_bytes, held), rows=tuple(waiting))
                    waiting, held, size = [], 0, min(2 * size, LARGEST)
        elif waiting:
            yield Piece(Place(number, 0), before, rows=tuple(waiting))
            waiting, held = [], 0
        if cuts is not None:
            while offset < cuts.num:
                stop = min(cuts.num, offset + (1 if cuts.is_table else size))
                end = Place(number, stop) if stop < cuts.num else Place(number + 1, 0)
                done = before + num_bytes * stop // cuts.num
                yield Piece(end, done, number, source.path, cuts, offset, stop)
                offset, size = stop, min(2 * size, LARGEST)
        before += num_bytes
    if waiting:
        yield Piece(Place(len(sources), 0), before, rows=tuple(waiting))


def sample(sources: Sequence[Source], num: int = 16, size: int = SAMPLE) -> Iterator[Piece]:
    """Small pieces from all over a corpus."""
    step = max(1, len(sources) // num)
    taken = sources[::step][:num]
    each = -(-num // max(1, len(taken)))
    for source in taken:
        cuts = cuts_of(source)
        if cuts is None:
            rows: list[Record | Reject] = []
            held = 0
            for record in read_rows(source):
                rows.append(record)
                held += _weight(record)
                if held >= size:
                    break
            yield Piece(Place(), 0, rows=tuple(rows))
            continue
        for i in range(min(each, cuts.num)):
            start = cuts.num * i // each
            stop = start + (1 if cuts.is_table else size)
            yield Piece(Place(), 0, 0, source.path, cuts, start, min(stop, cuts.num))


def _size(source: Source) -> int:
    return sum(file.stat().st_size for file in source.files)


def _weight(record: Record | Reject) -> int:
    """About how many bytes a record has."""
    if isinstance(record, Reject):
        return 64
    return 64 + sum(len(value) for value in record.value.values() if isinstance(value, str))
