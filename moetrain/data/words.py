"""What a teacher says of a set's tokens, on disk: its likeliest tokens wherever one is learned.

Legend: n sequences of a set, m learned tokens of all, in the set's order, k tokens of a place. A
folder: starts.npy [n+1] int64 (the first learned token of each sequence), ids.npy [m, k] int32,
top.npy [m, k] float32 (their log-probs), identity.json (what it was made of).
"""

from pathlib import Path

import numpy as np
import torch
from numpy.lib.format import open_memmap
from numpy.typing import NDArray
from torch import Tensor

from moetrain.errors import DataError


class Words:
    """A folder, opened. Raises DataError where it is not one, or of another set.

    num_learned: learned tokens of each of the set's sequences [n].
    """

    def __init__(self, folder: Path, num_learned: NDArray[np.int64]) -> None:
        try:
            self.starts, self.ids, self.top = (
                np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("starts", "ids", "top")
            )
        except (OSError, ValueError, EOFError) as error:
            raise DataError(
                f"A teacher's words in {folder} cannot be read ({error}): remove the folder."
            ) from error
        shapes_agree = self.ids.shape == self.top.shape and self.ids.ndim == 2
        if not (
            shapes_agree
            and np.array_equal(np.diff(self.starts), num_learned)
            and len(self.ids) == self.starts[-1]
        ):
            raise DataError(f"A teacher's words in {folder} are of another set: remove the folder.")

    @property
    def k(self) -> int:
        """Tokens of a place."""
        return int(self.ids.shape[1])

    def of(self, item: int, first: int, mask: Tensor) -> dict[str, Tensor]:
        """`teacher_ids` and `teacher_top` [t, k] of tokens of a sequence, of whose learned ones
        `first` come before; mask [t]: which of them are learned.
        """
        places = (mask > 0).nonzero()[:, 0]
        begin = int(self.starts[item]) + first
        rows = slice(begin, begin + len(places))
        ids = torch.zeros(len(mask), self.k, dtype=torch.int32)
        top = torch.zeros(len(mask), self.k)
        ids[places] = torch.from_numpy(np.array(self.ids[rows]))
        top[places] = torch.from_numpy(np.array(self.top[rows]))
        return {"teacher_ids": ids, "teacher_top": top}


class WordsWriter:
    """The arrays of a folder, filled in any order."""

    def __init__(self, folder: Path, num_learned: NDArray[np.int64], k: int) -> None:
        self.starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(num_learned)])
        np.save(folder / "starts.npy", self.starts)
        shape = (int(self.starts[-1]), k)
        self._ids = open_memmap(folder / "ids.npy", "w+", np.int32, shape)
        self._top = open_memmap(folder / "top.npy", "w+", np.float32, shape)

    def write(self, item: int, ids: NDArray[np.int32], top: NDArray[np.float32]) -> None:
        """All of one sequence [its learned tokens, k]."""
        rows = slice(int(self.starts[item]), int(self.starts[item + 1]))
        self._ids[rows], self._top[rows] = ids, top

    def close(self) -> None:
        """To the disk."""
        self._ids.flush()
        self._top.flush()
