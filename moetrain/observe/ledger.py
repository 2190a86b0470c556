"""The run's record: `<run_dir>/ledger.jsonl`, one JSON object a line, in order of steps.

A training row has step, loss, tokens, lr, grad_norm, tokens_per_s, seconds, memory_gib and
router/...; a held-out row has step and eval_loss. Rows are on disk before the next step begins, and
a resumed run drops those past its checkpoint.
"""

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeGuard, cast

from moetrain.errors import MoetrainError

Row = dict[str, Any]
MANY_STEPS = 2**53
LARGEST = 10**308


def read_ledger(path: Path) -> list[Row]:
    """The complete rows of a ledger; [] when there is none. A last line cut short by a kill is left
    out, and so is all after a line that is no JSON. Raises MoetrainError for a row without a step.
    """
    if not path.is_file():
        return []
    rows: list[Row] = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):  # a machine that lost power may leave zeros
            break
        if not is_row(row):
            raise MoetrainError(
                f"{path}:{number} is no row of a ledger: it has no whole number as its step."
                " Remove the line."
            )
        rows.append(row)
    return rows


def is_row(value: Any) -> TypeGuard[Row]:
    """Whether something that was read is an object with a step."""
    step = cast(Row, value).get("step") if isinstance(value, dict) else None
    return type(step) is int and 0 <= step < MANY_STEPS


def is_number(value: Any) -> TypeGuard[int | float]:
    """Whether something that was read is a number that a float can hold, or one that is none."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return isinstance(value, float) or abs(value) < LARGEST


class Ledger:
    """Appends rows. `step`: the step that the run continues from; what was written past it is
    dropped, and all of it for a run from the start, which looks at its held-out data again.
    """

    def __init__(self, path: Path, step: int = 0):
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [row for row in read_ledger(path) if row["step"] <= step and step]
        _write_whole(path, "".join(_line(row) for row in kept))
        self._file = path.open("a", encoding="utf-8")

    def write(self, row: Mapping[str, Any]) -> None:
        """Append one row and wait until it is on disk."""
        self._file.write(_line(row))
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file; the ledger takes no more rows."""
        self._file.close()


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(row) + "\n"


def _write_whole(path: Path, text: str) -> None:
    part = path.with_name(path.name + ".part")
    with part.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)
    with contextlib.suppress(OSError):  # some network file systems cannot sync a folder
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)
