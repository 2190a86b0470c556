"""Whether the two files of an indexed corpus are whole, and fit the run that shall read them.

Megatron's own reader says nothing clear of a damaged file.
"""

import json
import os
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moetrain.data import tokenizer as tokenizers
from moetrain.data.cache import remembered
from moetrain.errors import DataError

LOOK = 1 << 20  # bytes of a .bin that are compared at a place
MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
# Magic, version, dtype's code, sequences, documents; then a length (int32) and a pointer (int64)
# for each sequence and an int64 for each document.
HEADER = struct.Struct("<9sQBQQ")
# Of a token, by the dtype's code; other codes are floats.
DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
READ_AT_ONCE = 1 << 24  # tokens
LOOKED_AT = 1 << 20  # sequences whose places are looked at together


def prefix_of(path: str | Path) -> Path:
    """An index is named by its prefix; one of its files is taken to mean it."""
    path = Path(path).expanduser()
    return path.with_suffix("") if path.suffix in (".bin", ".idx") else path


def existing(prefix: Path, suffix: str) -> Path:
    """One of an index's files. DataError when it is not there."""
    file = Path(f"{prefix}{suffix}")
    if not file.is_file():
        raise DataError(
            f"{file} does not exist: pretraining reads index prefixes. Make one with"
            f" `moetrain data index INPUT --tokenizer FOLDER --out {prefix}`."
        )
    return file


def check_once(prefixes: Sequence[Path], indexes: Sequence[str]) -> None:
    """Refuse a corpus that is listed twice, or copied: megatron-core shuffles both alike, so that
    every sample would come twice in a row.
    """
    for i, (prefix, digest) in enumerate(zip(prefixes, indexes, strict=True)):
        for other in (p for p, d in zip(prefixes[:i], indexes, strict=False) if d == digest):
            if _same_bytes(Path(f"{prefix}.bin"), Path(f"{other}.bin")):
                raise DataError(
                    f"{prefix} is the corpus {other} once more: each of its samples would come"
                    " twice in a row. List it once; to see it more often raise train.epochs or"
                    " its share in data.weights."
                )


def _same_bytes(a: Path, b: Path) -> bool:
    """Whether two large files are equal as far as their size, ends and middle tell."""
    size = a.stat().st_size
    if size != b.stat().st_size:
        return False
    with a.open("rb") as first, b.open("rb") as second:
        for place in (0, max(0, size // 2 - LOOK // 2), max(0, size - LOOK)):
            first.seek(place)
            second.seek(place)
            if first.read(LOOK) != second.read(LOOK):
                return False
    return True


def check_tokens(prefix: Path, model_vocab: int | None, root: Path) -> None:
    """Refuse a sound index with tokens that the model's embedding does not have, before a run
    meets one: by what is written beside it, or else by one reading of all tokens, which is
    remembered under `root`.
    """
    if model_vocab is None or _is_vouched_for(prefix, model_vocab):
        return
    code = _head(prefix)[1]
    data = Path(f"{prefix}.bin")
    message = remembered(data, root / "tokens" / str(code), lambda path: _extremes(path, code))
    smallest, largest = map(int, message.split())
    if smallest < 0:
        raise DataError(f"{data} has a token {smallest}, which no vocabulary has: make it again.")
    tokenizers.check_vocab(largest + 1, model_vocab, f"The index {prefix}")


def _is_vouched_for(prefix: Path, model_vocab: int) -> bool:
    """Whether the note that `moetrain data index` writes is there, of just these tokens. DataError
    where it says that they were made with more of them than the embedding has.
    """
    note = Path(f"{prefix}.json")
    try:
        message = json.loads(note.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False  # there is none, or it is about something else
    if not isinstance(message, dict) or "vocab" not in message:
        return False
    vocab = message["vocab"]
    if type(vocab) is not int or vocab < 1:
        raise DataError(
            f"{note} says vocab={str(vocab)[:40]!r}, which is no number of tokens. Remove the file,"
            " or make the index again."
        )
    tokenizers.check_vocab(vocab, model_vocab, f"The tokenizer of the index {prefix}")
    return message.get("num_tokens") == int(_lengths(prefix).sum(dtype=np.int64))


def _extremes(data: Path, code: int) -> str:
    """The smallest and the largest token of a .bin."""
    smallest = largest = 0
    with data.open("rb") as file:
        while (tokens := np.fromfile(file, DTYPES[code], READ_AT_ONCE)).size:
            smallest, largest = min(smallest, int(tokens.min())), max(largest, int(tokens.max()))
    return f"{smallest} {largest}"


def num_samples(prefix: Path, seq_len: int) -> int:
    """How many samples of seq_len (and a token after) an index holds. DataError when damaged."""
    version, code, num_sequences, num_documents = _head(prefix)
    if version != VERSION:
        raise DataError(
            f"{prefix}.idx is of version {version}, and {VERSION} is what is read: make it again."
        )
    if code not in DTYPES:
        raise DataError(
            f"{prefix}.idx has tokens of an unknown or fractional type (code {code}; there are"
            f" {', '.join(map(str, DTYPES))}): make it again."
        )
    if os.path.getsize(f"{prefix}.idx") < HEADER.size + num_sequences * 12 + num_documents * 8:
        raise DataError(f"{prefix}.idx is cut short: make it again.")
    if num_sequences == 0:
        raise DataError(f"{prefix} has no document: index something.")
    lengths = _lengths(prefix)
    _check_documents(prefix, num_sequences, num_documents)
    num_tokens, width = int(lengths.sum(dtype=np.int64)), np.dtype(DTYPES[code]).itemsize
    if int(lengths.min(initial=0)) < 0:
        raise DataError(f"{prefix}.idx is damaged: make it again.")
    if os.path.getsize(f"{prefix}.bin") < num_tokens * width:
        raise DataError(
            f"{prefix}.bin is cut short: the index counts {num_tokens} tokens of {width} bytes."
        )
    _check_places(prefix, lengths, width)
    if num_tokens <= seq_len:
        raise DataError(
            f"{prefix} has {num_tokens} tokens: too few for a sample of data.seq_len {seq_len} + 1."
        )
    return (num_tokens - 1) // seq_len


def _head(prefix: Path) -> tuple[int, int, int, int]:
    """(version, dtype's code, sequences, documents + 1) of an index."""
    with open(f"{prefix}.idx", "rb") as file:
        head = file.read(HEADER.size)
    if len(head) < HEADER.size or not head.startswith(MAGIC):
        raise DataError(f"{prefix}.idx is not a Megatron index, or is cut short: make it again.")
    return HEADER.unpack(head)[1:]


def _lengths(prefix: Path) -> NDArray[np.int32]:
    num = _head(prefix)[2]
    return np.memmap(f"{prefix}.idx", np.int32, "r", offset=HEADER.size, shape=(num,))


def _check_places(prefix: Path, lengths: NDArray[np.int32], width: int) -> None:
    """Refuse an index that points outside of its .bin: it would be found in mid-training."""
    size, num = os.path.getsize(f"{prefix}.bin"), len(lengths)
    place = HEADER.size + num * 4
    starts = np.memmap(f"{prefix}.idx", np.int64, "r", offset=place, shape=(num,))
    for first in range(0, num, LOOKED_AT):
        places = starts[first : first + LOOKED_AT]
        ends = places + lengths[first : first + LOOKED_AT].astype(np.int64) * width
        # A sum that is too large for an int64 turns negative.
        wrong = (places < 0) | (ends < places) | (ends > size) | (places % width != 0)
        if wrong.any():
            at = first + int(wrong.argmax())
            raise DataError(
                f"{prefix}.idx says that sequence {at} is at byte {starts[at]} of {prefix}.bin,"
                f" which has {size}: the two do not belong together. Make them again."
            )


def _check_documents(prefix: Path, num_sequences: int, num_bounds: int) -> None:
    """Refuse an index with several sequences a document: GPTDataset shuffles sequences, so that a
    document would be torn apart at the ends of its sentences.
    """
    place = HEADER.size + num_sequences * 12
    bounds = np.memmap(f"{prefix}.idx", np.int64, "r", offset=place, shape=(num_bounds,))
    if num_bounds != num_sequences + 1 or not np.array_equal(bounds, np.arange(num_bounds)):
        raise DataError(
            f"{prefix}.idx has {num_sequences} sequences in {num_bounds - 1} documents (made with"
            " --split-sentences?): they would be shuffled one by one. Index the documents whole,"
            f" with `moetrain data index INPUT --tokenizer FOLDER --out {prefix}`."
        )
