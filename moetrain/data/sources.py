"""Reading records from what people have.

JSONL, JSON, parquet, a Hugging Face dataset folder, text, folders of these.
"""

import glob
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moetrain.data import folders, tables
from moetrain.data.json_texts import Place, decoded, json_places
from moetrain.data.parsing import parse_json, parse_list, with_parsed_messages
from moetrain.data.rejects import EMPTY_FILE, EMPTY_LINE, Reject
from moetrain.errors import DataError

TEXT_SUFFIXES = (".txt", ".md", ".py", ".rst")


@dataclass(frozen=True)
class Record:
    """A record and where it stands.

    `line` counts lines of a text file or rows of a table, from 1; `nulls` are the columns of a
    table that this row has nothing in.
    """

    value: Mapping[str, Any]
    file: str
    line: int
    nulls: tuple[str, ...] = ()


@dataclass(frozen=True)
class Source:
    """One thing that is read at a go, and the files whose content it depends on."""

    path: Path
    files: tuple[Path, ...]
    read: Callable[[Path], Iterator[Record | Reject]]


def find_sources(inputs: Iterable[str | Path], *, held_out: bool = False) -> list[Source]:
    """What the inputs stand for, in their order, folders in name order.

    An input is a file, a folder, or a pattern of these (`data/train_sft-*.parquet`). Of a folder
    with splits it is the train split, or with `held_out` the validation or test split.
    DataError when one is missing, empty, or could mean several splits.
    """
    return [source for given in inputs for source in _find(Path(given).expanduser(), held_out)]


def _find(path: Path, held_out: bool) -> list[Source]:
    if not path.exists():
        if not glob.has_magic(str(path)):
            raise DataError(
                f"{path} does not exist. Give a file, a folder of files or a Hugging Face dataset"
                " folder."
            )
        paths = sorted(Path(name) for name in glob.glob(str(path), recursive=True))
        if not paths:
            raise DataError(f"{path} means no file that is there.")
        return [source for one in paths for source in _find(one, held_out)]
    if path.is_file():
        return [_file_source(path)]
    if (path / folders.SAVED).is_file():
        return [_saved_source(path)]
    parts = folders.parts_of(path, READERS, TEXT_SUFFIXES)
    if not parts:
        raise DataError(f"{path} holds no data file; the endings read are {', '.join(READERS)}.")
    taken = folders.chosen(path, parts, TEXT_SUFFIXES, held_out)
    return [_saved_source(part) if part.is_dir() else _file_source(part) for part in taken]


def _saved_source(path: Path) -> Source:
    files = sorted(f for f in path.rglob("*") if f.is_file() and not f.name.startswith("cache-"))
    return Source(path, tuple(files), _read_hf)


def _file_source(path: Path) -> Source:
    if path.suffix not in READERS:
        raise DataError(f"{path} cannot be read; the endings read are {', '.join(READERS)}.")
    return Source(path, (path,), READERS[path.suffix])


def read_rows(source: Source) -> Iterator[Record | Reject]:
    """The records of a source, with a Reject for each that cannot be read.

    DataError when the file itself is damaged.
    """
    try:
        yield from source.read(source.path)
    except OSError as error:
        raise DataError(f"{source.path} cannot be read: {error.strerror or error}.") from error


def _parse(raw: bytes, file: str, line: int, places: frozenset[Place]) -> Record | Reject:
    """One line of a JSONL file."""
    if not raw.strip():
        return Reject(file, line, EMPTY_LINE)
    try:
        return _row(parse_json(raw), file, line, places=places)
    except ValueError as error:
        return Reject(file, line, str(error))


def _row(
    value: Any,
    file: str,
    line: int,
    nulls: tuple[str, ...] = (),
    places: frozenset[Place] = frozenset(),
) -> Record | Reject:
    if not isinstance(value, dict):
        return Reject(file, line, f"a record must be an object, not {type(value).__name__}")
    if not value and not nulls:
        return Reject(file, line, "empty record")
    try:
        return Record(with_parsed_messages(decoded(value, places)), file, line, nulls)
    except ValueError as error:
        return Reject(file, line, str(error))


def _read_jsonl(path: Path) -> Iterator[Record | Reject]:
    places = json_places(_values(path))
    for line, raw in enumerate(_lines(path), start=1):
        yield _parse(raw, str(path), line, places)


@dataclass(frozen=True)
class Cuts:
    """What a source can be read in parts by: `num` bytes of JSONL, or row groups of a table."""

    num: int
    places: frozenset[Place] = frozenset()
    is_table: bool = False


def cuts_of(source: Source) -> Cuts | None:
    """None where it is read at a go. DataError as read_rows."""
    try:
        if source.read is _read_parquet:
            return Cuts(len(_row_groups(source.path)), is_table=True)
        if source.read is _read_jsonl or (source.read is _read_json and not _is_list(source.path)):
            places = json_places(_values(source.path))
            return Cuts(source.path.stat().st_size, places)
    except OSError as error:
        raise DataError(f"{source.path} cannot be read: {error.strerror or error}.") from error
    return None


def read_part(path: Path, cuts: Cuts, start: int, stop: int) -> Iterator[Record | Reject]:
    """The records of a table's row groups [start, stop), or those lines of a file that begin within
    its bytes [start, stop), counted from 1 on: nobody knows how many there are before.

    DataError when the file is damaged.
    """
    try:
        if cuts.is_table:
            yield from _read_parquet(path, range(start, stop))
            return
        for line, raw in enumerate(_lines_from(path, start, stop), start=1):
            yield _parse(raw, str(path), line, cuts.places)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}.") from error


def _lines_from(path: Path, start: int, stop: int) -> list[bytes]:
    with path.open("rb") as file:
        before = min(start, 1)  # a line begins behind the end of another
        file.seek(start - before)
        content = file.read(stop - start + before)
        if before:
            content = content.partition(b"\n")[2]
        if not content:
            return []
        if not content.endswith(b"\n"):
            content += file.readline()
    lines = content.removesuffix(b"\n").split(b"\n")
    if not start:
        lines[0] = lines[0].removeprefix(b"\xef\xbb\xbf")
    return lines


def _lines(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        for line, raw in enumerate(file, start=1):
            yield raw.removeprefix(b"\xef\xbb\xbf") if line == 1 else raw


def _values(path: Path) -> Iterator[Any]:
    """What the lines say, without those that say nothing."""
    for raw in _lines(path):
        with suppress(ValueError):
            yield parse_json(raw)


def _read_json(path: Path) -> Iterator[Record | Reject]:
    """A .json file: one list of records, or JSONL under another ending."""
    if not _is_list(path):
        yield from _read_jsonl(path)
        return
    try:
        values = list(parse_list(path.read_text(encoding="utf-8-sig")))
        places = json_places(values)
        for row, value in enumerate(values, start=1):
            if isinstance(value, ValueError):
                yield Reject(str(path), row, str(value))
            else:
                yield _row(value, str(path), row, places=places)
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{path} is not valid JSON: {error}. Mend it or store one record a line (.jsonl)."
        ) from error


def _is_list(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(64).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")


def _table_row(row: tables.Found, path: Path, line: int) -> Record | Reject:
    if isinstance(row, str):
        return Reject(str(path), line, row)
    value, nulls = row
    return _row(value, str(path), line, nulls)


def _read_parquet(path: Path, groups: range | None = None) -> Iterator[Record | Reject]:
    """The rows of all row groups, or of these."""
    import pyarrow.parquet

    with _as_parquet(path):
        row = 0 if groups is None else sum(_row_groups(path)[: groups.start])
        table = pyarrow.parquet.ParquetFile(path)
        chosen = None if groups is None else list(groups)
        for batch in table.iter_batches(batch_size=1024, row_groups=chosen):
            for value in tables.records(batch):
                row += 1
                yield _table_row(value, path, row)


def _row_groups(path: Path) -> list[int]:
    """The rows of each."""
    import pyarrow.parquet

    with _as_parquet(path):
        known = pyarrow.parquet.ParquetFile(path).metadata
        return [known.row_group(i).num_rows for i in range(known.num_row_groups)]


@contextmanager
def _as_parquet(path: Path) -> Iterator[None]:
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, *tables.UNREADABLE, LookupError, TypeError) as error:
        raise DataError(
            f"{path} is not a readable parquet file: {(str(error).splitlines() or [''])[0]}"
        ) from error


def _read_hf(path: Path) -> Iterator[Record | Reject]:
    """A folder of `save_to_disk` with one data set."""
    import datasets

    try:
        loaded: Any = datasets.load_from_disk(str(path))
        batches = loaded.with_format("arrow").iter(1024)
        row = 0
        for batch in batches:
            for value in tables.records(batch):
                row += 1
                yield _table_row(value, path, row)
    except Exception as error:  # its files say what its reader does next: anything can go wrong
        message = (str(error).splitlines() or [""])[0]
        raise DataError(
            f"{path} is not a readable Hugging Face dataset folder:"
            f" {type(error).__name__}: {message} (datasets {datasets.__version__}). If a newer"
            f" version wrote it, save it there as parquet (to_parquet) instead."
        ) from error


def _read_text(path: Path) -> Iterator[Record | Reject]:
    """A whole file is one record {"text": ...}."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        yield Reject(str(path), 1, f"not UTF-8 at byte {error.start}")
        return
    yield Record({"text": text}, str(path), 1) if text.strip() else Reject(str(path), 1, EMPTY_FILE)


READERS: dict[str, Callable[[Path], Iterator[Record | Reject]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".parquet": _read_parquet,
    **dict.fromkeys(TEXT_SUFFIXES, _read_text),
}
