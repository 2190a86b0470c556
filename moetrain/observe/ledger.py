"""The run's record: `<run_dir>/ledger.jsonl`, one JSON object a line, in order of steps.

A training row has step, loss, tokens, lr, grad_norm, tokens_per_s, seconds, memory_gib and
router/...; a held-out row has step and eval_loss. Rows are on disk before the next step begins, and
a resumed run drops those past its checkpoint.
"""

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeGuard, cast

from moetrain import files
from moetrain.errors import MoetrainError

LedgerRow = dict[str, Any]
MANY_STEPS = 2**53
LARGEST = 10**308


def read_ledger(path: Path) -> list[LedgerRow]:
    """The complete rows of a ledger; [] when there is none. A last line cut short by a kill is left
    out, and so is all after a line that is no JSON. Raises MoetrainError for a row without a step.
    """
    return [row for _, row in _lines(path)]


def rows_of(path: Path) -> Iterator[LedgerRow]:
    """As `read_ledger`, a row at a time: a long run has a million."""
    return (row for _, row in _lines(path))


def _lines(path: Path) -> Iterator[tuple[bytes, LedgerRow]]:
    if not path.is_file():
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                if not line.endswith(b"\n"):
                    return
                row = json.loads(line)
            except (ValueError, RecursionError):  # a machine that lost power may leave zeros
                return
            if not is_row(row):
                raise MoetrainError(
                    f"{path}:{number} is no row of a ledger: it has no whole number as its step."
                    " Remove the line."
                )
            yield line, row


def is_row(value: Any) -> TypeGuard[LedgerRow]:
    """Whether something that was read is an object with a step."""
    step = cast(LedgerRow, value).get("step") if isinstance(value, dict) else None
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
        self.path = path
        with files.publish(path) as (part,), part.open("wb") as file:
            if step:
                file.writelines(line for line, row in _lines(path) if row["step"] <= step)
        self._file = path.open("a", encoding="utf-8")

    def write(self, row: Mapping[str, Any]) -> None:
        """Append one row and wait until it is on disk."""
        with files.named(self.path):
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file; the ledger takes no more rows."""
        with contextlib.suppress(OSError):  # rows that a full disk refused were reported already
            self._file.close()
