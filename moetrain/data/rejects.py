"""Records that were skipped: where they stand and why, and when there are too many of them."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from moetrain import files
from moetrain.errors import DataError, plural

# Reasons for which no record is missed.
EMPTY_LINE, EMPTY_FILE = NOTHING_THERE = ("empty line", "empty file")


@dataclass(frozen=True)
class Reject:
    """A skipped record: its file, its line or row (from 1) and the reason."""

    file: str
    line: int
    reason: str


def write_rejects(path: Path, rejects: Iterable[Reject]) -> None:
    """Write one JSON object a line; the file appears whole or not at all (DataError). Without
    rejects there is none afterwards.
    """
    text = b"".join(map(line_of, rejects))
    try:
        if text:
            files.write_text(path, text.decode("utf-8"))
        elif path.exists():
            path.unlink()
    except OSError as error:
        raise DataError(f"{path} cannot be written: {error.strerror or error}.") from error


def line_of(reject: Reject) -> bytes:
    """What stands for one in a file of rejects."""
    # A file's name may be bytes that are no text: Python has half characters there, JSON escapes.
    line = json.dumps(asdict(reject), ensure_ascii=False) + "\n"
    return line.encode("utf-8", "backslashreplace")


def read_rejects(path: Path) -> list[Reject]:
    """What `write_rejects` wrote; nothing when there is no such file."""
    if not path.is_file():
        return []
    return [Reject(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]


def check_rejects(
    rejects: list[Reject], num_records: int, max_rejected: float, option: str = "data.max_rejected"
) -> None:
    """DataError when more than the share `max_rejected` of `num_records` was skipped."""
    if rejects:
        check_share(len(rejects), rejects[0], num_records, max_rejected, option)


def check_share(
    num_rejected: int, first: Reject, num_records: int, max_rejected: float, option: str
) -> None:
    """The same where not all of them are at hand."""
    if num_rejected <= max_rejected * num_records:
        return
    raise DataError(
        f"{num_rejected} of {num_records} records were rejected"
        f" ({num_rejected / num_records:.1%}; {option} allows"
        f" {max_rejected:.1%}). The first: {first.file}:{first.line}: {first.reason}. Mend the"
        f" data or raise {option}."
    )


def noted(template: Iterable[str], records: Mapping[str, int]) -> list[str]:
    """A line for each thing that a user should know of a chat template or of some records."""
    counted = sorted(records.items(), key=lambda item: -item[1])
    lines = [f"note: {note}" for note in template]
    return lines + [f"note: {note} ({plural(num, 'record')})" for note, num in counted]
