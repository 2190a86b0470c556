"""Reading records from what people have.

JSONL, JSON, parquet, a Hugging Face dataset folder, text, folders of these.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moetrain.data.rejects import Reject
from moetrain.errors import DataError

TEXT_SUFFIXES = (".txt", ".md", ".py", ".rst")
# Any of these makes a folder one written by `datasets.save_to_disk`.
HF_MARKERS = ("dataset_dict.json", "state.json")


@dataclass(frozen=True)
class Row:
    """A record and where it stands.

    `line` counts lines of a text file or rows of a table, from 1.
    """

    value: Mapping[str, Any]
    file: str
    line: int


@dataclass(frozen=True)
class Source:
    """One thing that is read at a go, and the files whose content it depends on."""

    path: Path
    files: tuple[Path, ...]
    read: Callable[[Path], Iterator[Row | Reject]]


def find_sources(inputs: Iterable[str | Path]) -> list[Source]:
    """What the inputs stand for, in their order, folders in name order.

    DataError when one is missing or empty.
    """
    return [source for given in inputs for source in _find(Path(given).expanduser())]


def _find(path: Path) -> list[Source]:
    if not path.exists():
        raise DataError(
            f"{path} does not exist. Give a file, a folder of files or a Hugging Face dataset"
            " folder."
        )
    if path.is_file():
        return [_file_source(path)]
    if any((path / marker).is_file() for marker in HF_MARKERS):
        files = tuple(
            sorted(f for f in path.rglob("*") if f.is_file() and not f.name.startswith("cache-"))
        )
        return [Source(path, files, _read_hf)]
    found = sorted(f for f in path.rglob("*") if f.is_file() and f.suffix in READERS)
    found = [f for f in found if not any(p.startswith(".") for p in f.relative_to(path).parts)]
    if not found:
        raise DataError(f"{path} holds no data file; the endings read are {', '.join(READERS)}.")
    return [_file_source(file) for file in found]


def _file_source(path: Path) -> Source:
    if path.suffix not in READERS:
        raise DataError(f"{path} cannot be read; the endings read are {', '.join(READERS)}.")
    return Source(path, (path,), READERS[path.suffix])


def read_rows(source: Source) -> Iterator[Row | Reject]:
    """The records of a source, with a Reject for each that cannot be read.

    DataError when the file itself is damaged.
    """
    try:
        yield from source.read(source.path)
    except OSError as error:
        raise DataError(f"{source.path} cannot be read: {error.strerror or error}.") from error


def _parse(raw: bytes, file: str, line: int) -> Row | Reject:
    """One line of a JSONL file."""
    if not raw.strip():
        return Reject(file, line, "empty line")
    try:
        value = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        return Reject(file, line, f"not UTF-8 at byte {error.start}")
    except json.JSONDecodeError as error:
        return Reject(file, line, f"malformed JSON at column {error.colno}: {error.msg}")
    except RecursionError:
        return Reject(file, line, "malformed JSON: nested too deeply")
    return _row(value, file, line)


def _row(value: Any, file: str, line: int) -> Row | Reject:
    if not isinstance(value, dict):
        return Reject(file, line, f"a record must be an object, not {type(value).__name__}")
    if not value:
        return Reject(file, line, "empty record")
    return Row(value, file, line)


def _read_jsonl(path: Path) -> Iterator[Row | Reject]:
    with path.open("rb") as file:
        for line, raw in enumerate(file, start=1):
            yield _parse(raw.removeprefix(b"\xef\xbb\xbf") if line == 1 else raw, str(path), line)


def _read_json(path: Path) -> Iterator[Row | Reject]:
    """A .json file: one list of records, or JSONL under another ending."""
    with path.open("rb") as file:
        head = file.read(64).removeprefix(b"\xef\xbb\xbf").lstrip()
    if not head.startswith(b"["):
        yield from _read_jsonl(path)
        return
    try:
        values = json.loads(path.read_text(encoding="utf-8-sig"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise DataError(
            f"{path} is not valid JSON: {error}. Mend it or store one record a line (.jsonl)."
        ) from error
    for row, value in enumerate(values, start=1):
        yield _row(value, str(path), row)


def _read_parquet(path: Path) -> Iterator[Row | Reject]:
    import pyarrow
    import pyarrow.parquet

    row = 0
    try:
        table = pyarrow.parquet.ParquetFile(path)
        for batch in table.iter_batches(batch_size=1024):
            for value in batch.to_pylist():
                row += 1
                yield _row(value, str(path), row)
    except pyarrow.ArrowException as error:
        raise DataError(
            f"{path} is not a readable parquet file: {str(error).splitlines()[0]}"
        ) from error


def _read_hf(path: Path) -> Iterator[Row | Reject]:
    """A folder of `save_to_disk`; of several splits only `train` is taken without being named."""
    import datasets

    try:
        loaded = datasets.load_from_disk(str(path))
    except (FileNotFoundError, ValueError, KeyError) as error:
        raise DataError(f"{path} is not a readable Hugging Face dataset folder: {error}") from error
    if isinstance(loaded, datasets.DatasetDict):
        name = "train" if "train" in loaded else next(iter(loaded))
        if len(loaded) > 1 and name != "train":
            raise DataError(
                f"{path} has the splits {', '.join(map(str, loaded))}: give the folder of one,"
                f" {path}/{name}."
            )
        loaded = loaded[name]
    for row, value in enumerate(loaded, start=1):
        assert isinstance(value, dict)
        yield _row(value, str(path), row)


def _read_text(path: Path) -> Iterator[Row | Reject]:
    """A whole file is one record {"text": ...}."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        yield Reject(str(path), 1, f"not UTF-8 at byte {error.start}")
        return
    yield Row({"text": text}, str(path), 1) if text.strip() else Reject(str(path), 1, "empty file")


READERS: dict[str, Callable[[Path], Iterator[Row | Reject]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".parquet": _read_parquet,
    **dict.fromkeys(TEXT_SUFFIXES, _read_text),
}
