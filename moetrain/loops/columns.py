"""Columns of arrays of unequal lengths in a safetensors file, written piece by piece and read where
they lie.

A column `name` is `name`, all its arrays end to end along their first dimension, and `name/lengths`
[num] int64; -1 where a row has none.
"""

import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from moetrain.errors import DataError, WeightsError
from moetrain.weights.header import Stored, read_header
from moetrain.weights.hf_files import Target, header

NAMES = {"uint8": "U8", "int16": "I16", "int32": "I32", "int64": "I64", "float32": "F32"}
DTYPES = {name: np.dtype(numpy).newbyteorder("<") for numpy, name in NAMES.items()}
LENGTHS = "/lengths"
Column = Sequence[NDArray[Any] | None]
"""An array for each row: all of one dtype, and alike but for their first dimension."""


def write_columns(path: Path, columns: Mapping[str, tuple[Column, DTypeLike]]) -> int:
    """Write name -> (arrays, dtype) where nobody looks yet; no second copy of them is made. Returns
    the CRC-32 of the file. Raises OSError. A column without any array is left out.
    """
    parts: dict[str, tuple[np.dtype[Any], tuple[int, ...], Iterable[NDArray[Any]]]] = {}
    for name, (arrays, dtype) in columns.items():
        there = [array for array in arrays if array is not None]
        if not there:
            continue
        lengths = np.array([-1 if array is None else len(array) for array in arrays], np.int64)
        shape = (sum(map(len, there)), *there[0].shape[1:])
        parts[name] = np.dtype(dtype), shape, there
        parts[name + LENGTHS] = lengths.dtype, lengths.shape, [lengths]
    first = header(Target(name, NAMES[d.name], shape) for name, (d, shape, _) in parts.items())
    crc = zlib.crc32(first)
    with path.open("wb") as file:
        file.write(first)
        for dtype, _, arrays in parts.values():
            for array in arrays:
                data = np.ascontiguousarray(array, dtype.newbyteorder("<")).data.cast("B")
                file.write(data)
                crc = zlib.crc32(data, crc)
    return crc


def read_columns(path: Path, crc: int) -> dict[str, list[NDArray[Any] | None]]:
    """name -> arrays as views of the mapped file. Raises DataError where it is missing or is not as
    `write_columns` left it.
    """
    if not path.is_file():
        raise DataError(
            f"{path} is missing; it has the numbers of {path.stem}.jsonl. Copy it there, or remove"
            " both."
        )
    try:
        there = read_header(path, None)
        content = np.memmap(path, np.uint8, "r")
    except (OSError, ValueError, WeightsError) as error:
        raise DataError(str(error)) from None
    total = 0
    for start in range(0, len(content), 1 << 26):
        total = zlib.crc32(content[start : start + (1 << 26)], total)
    if total != crc:
        raise DataError(f"{path} has other bytes than were written. Remove it, or copy it again.")
    try:
        return {
            name: _rows(_view(content, one), _view(content, there[name + LENGTHS]))
            for name, one in there.items()
            if name + LENGTHS in there
        }
    except ValueError as error:
        raise DataError(f"{path} is not as it was written ({error}). Remove it.") from error


def _view(content: NDArray[np.uint8], one: Stored) -> NDArray[Any]:
    if one.dtype not in DTYPES:
        raise ValueError(f"{one.dtype} in it")
    data = content[one.start : one.start + one.num_bytes]
    return data.view(DTYPES[one.dtype]).reshape(one.shape)


def _rows(values: NDArray[Any], lengths: NDArray[Any]) -> list[NDArray[Any] | None]:
    ends = np.maximum(lengths, 0).cumsum()
    is_whole = values.ndim and lengths.dtype == np.int64 and lengths.ndim == 1
    if not is_whole or lengths.min(initial=0) < -1 or lengths.max(initial=0) > len(values):
        raise ValueError("lengths that are none")
    if (ends[-1] if len(ends) else 0) != len(values):
        raise ValueError(f"{len(values)} rows, and lengths of {ends[-1:]}")
    return [
        None if length < 0 else values[end - length : end]
        for length, end in zip(lengths.tolist(), ends.tolist(), strict=True)
    ]
