"""The header of a safetensors file: read without trust, since it may be any bytes."""

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, cast

from moetrain.errors import WeightsError
from moetrain.manifest import Manifest

MAX_HEADER = 100_000_000  # bytes, as safetensors has it
MAX_TENSORS = 500_000  # of a file; models of 10^12 parameters have 150,000
MAX_DIMENSIONS = 64  # torch's
# Bytes of an element, by the name that safetensors has for its dtype.
SIZES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
}


@dataclass(frozen=True)
class Stored:
    """A tensor as its file's header says."""

    dtype: str  # safetensors' name
    shape: tuple[int, ...]
    start: int  # its first byte in the file

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) * SIZES[self.dtype]


def read_header(path: Path, manifest: Manifest | None) -> dict[str, Stored]:
    """The tensors of a safetensors file, which fill it from the header to the end.

    Raises:
        WeightsError: it is something else, truncated, of other bytes than `manifest` says, or has
            a tensor whose dtype, shape and place do not fit each other.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            first = file.read(8)
            if first == b"version ":
                raise WeightsError(
                    f"{path}: a Git LFS pointer, not the weights. Run `git lfs pull` there."
                )
            (length,) = struct.unpack("<Q", first)
            if manifest is not None:
                manifest.check(path, 0, 8 + min(length, size - 8))
            if length > min(size - 8, MAX_HEADER):  # before reading: it may be any 8 bytes
                raise ValueError(f"a header of {length} bytes in a file of {size}")
            content = file.read(length)
            if (many := content.count(b"{")) > MAX_TENSORS:  # each takes 1 kB of memory
                raise ValueError(f"a header of about {many} tensors; no file has {MAX_TENSORS}")
            header = json.loads(content.decode(), object_pairs_hook=_once)
    except (OSError, ValueError, struct.error) as error:
        raise broken(path, str(error)) from None
    except RecursionError:
        raise broken(path, "its header is nested too deeply") from None
    if not isinstance(header, dict):
        raise broken(path, "its header is no mapping")
    entries = cast(dict[str, Any], header)
    if not _is_note(entries.pop("__metadata__", {})):
        raise broken(path, "its __metadata__ is no mapping of texts")
    _check_places(path, entries, size - 8 - length)
    return {
        name: Stored(e["dtype"], tuple(e["shape"]), 8 + length + e["data_offsets"][0])
        for name, e in entries.items()
    }


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Programs differ in which of two values of one key they take."""
    merged = dict(pairs)
    if len(merged) != len(pairs):
        raise ValueError("its header has a key twice")
    "".join(merged).encode()  # ValueError for half a character, which no terminal shows
    return merged


def _check_places(path: Path, header: Mapping[str, Any], size: int) -> None:
    """Tensors follow each other without a gap, each as long as its dtype and shape say, and the
    last ends where the file does: `size` bytes behind the header.
    """
    places: list[tuple[int, int, str]] = []
    for name, entry in header.items():
        start, stop = _place(path, name, entry)
        places.append((start, stop, name))
    at = 0
    for start, stop, name in sorted(places):
        if start != at:
            what = "overlaps the tensor before it" if start < at else "leaves a gap before it"
            raise broken(path, f"{name} {what}")
        at = stop
    if at > size:
        raise WeightsError(f"{path}: truncated, {size} of {at} bytes of tensors. Fetch it again.")
    if at < size:
        raise broken(path, f"{size - at} bytes follow the last tensor")


def _place(path: Path, name: str, entry: Any) -> tuple[int, int]:
    """Where a tensor is, as its dtype and shape confirm."""
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise broken(path, f"{name} has no dtype, shape or data_offsets")
    given = cast(dict[str, Any], entry)
    kind, shape, offsets = given["dtype"], given["shape"], given["data_offsets"]
    if not isinstance(kind, str) or kind not in SIZES:
        raise WeightsError(
            f"{path}: {name} has dtype {kind}; allowed: {', '.join(SIZES)}. Take a "
            f"checkpoint that is not quantised."
        )
    if not (_counts(shape) and _counts(offsets) and len(offsets) == 2):
        raise broken(path, f"shape or data_offsets of {name} are no whole numbers")
    start, stop = offsets
    if stop - start != prod(shape) * SIZES[kind]:
        raise broken(path, f"{name} is {kind} {shape} and has {stop - start} bytes")
    return start, stop


def _is_note(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(text, str) for text in cast(dict[str, Any], value).values()
    )


def _counts(value: Any) -> bool:
    """Whether it is a list of whole numbers from 0 on, none beyond what a file can hold."""
    if not isinstance(value, list) or len(cast(list[Any], value)) > MAX_DIMENSIONS:
        return False
    return all(type(number) is int and 0 <= number < 1 << 63 for number in cast(list[Any], value))


def broken(path: Path, why: str) -> WeightsError:
    return WeightsError(f"{path}: not a whole safetensors file ({why}). Fetch it again.")
