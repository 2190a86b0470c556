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
from moetrain.errors import DataError

LOOK = 1 << 20  # bytes of a .bin that are compared at a place
MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
# Magic, version, dtype's code, sequences, documents; then a length (int32) and a pointer (int64)
# for each sequence and an int64 for each document.
HEADER = struct.Struct("<9sQBQQ")
# Bytes of a token by the dtype's code: uint8, int8, int16, int32, int64, uint16; others are floats.
WIDTHS = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 8: 2}
LOOKED_AT = 1 << 20  # sequences whose places are looked at together


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


def check_made_for(prefix: Path, model_vocab: int | None) -> None:
    """Refuse an index that says it was made with more tokens than the embedding has."""
    note = Path(f"{prefix}.json")
    try:
        said = json.loads(note.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return  # there is none, or it is about something else
    if not isinstance(said, dict) or "vocab" not in said:
        return
    vocab = said["vocab"]
    if type(vocab) is not int or vocab < 1:
        raise DataError(
            f"{note} says vocab={str(vocab)[:40]!r}, which is no number of tokens. Remove the file,"
            " or make the index again."
        )
    tokenizers.check_vocab(vocab, model_vocab, f"The tokenizer of the index {prefix}")


def num_samples(prefix: Path, seq_len: int) -> int:
    """How many samples of seq_len (and a token after) an index holds. DataError when damaged."""
    size = os.path.getsize(f"{prefix}.idx")
    with open(f"{prefix}.idx", "rb") as file:
        head = file.read(HEADER.size)
    if len(head) < HEADER.size or not head.startswith(MAGIC):
        raise DataError(f"{prefix}.idx is not a Megatron index, or is cut short: make it again.")
    _, version, code, num_sequences, num_documents = HEADER.unpack(head)
    if version != VERSION:
        raise DataError(
            f"{prefix}.idx is of version {version}, and {VERSION} is what is read: make it again."
        )
    if code not in WIDTHS:
        raise DataError(
            f"{prefix}.idx has tokens of an unknown or fractional type (code {code}; there are"
            f" {', '.join(map(str, WIDTHS))}): make it again."
        )
    if size < HEADER.size + num_sequences * 12 + num_documents * 8:
        raise DataError(f"{prefix}.idx is cut short: make it again.")
    if num_sequences == 0:
        raise DataError(f"{prefix} has no document: index something.")
    lengths = np.memmap(f"{prefix}.idx", np.int32, "r", offset=HEADER.size, shape=(num_sequences,))
    _check_documents(prefix, num_sequences, num_documents)
    num_tokens, width = int(lengths.sum(dtype=np.int64)), WIDTHS[code]
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


def _check_places(prefix: Path, lengths: NDArray[np.int32], width: int) -> None:
    """Refuse an index that points outside of its .bin: it would be found in mid-training."""
    size, num = os.path.getsize(f"{prefix}.bin"), len(lengths)
    place = HEADER.size + num * 4
    starts = np.memmap(f"{prefix}.idx", np.int64, "r", offset=place, shape=(num,))
    for first in range(0, num, LOOKED_AT):
        own = starts[first : first + LOOKED_AT]
        ends = own + lengths[first : first + LOOKED_AT].astype(np.int64) * width
        # A sum that is too large for an int64 turns negative.
        wrong = (own < 0) | (ends < own) | (ends > size)
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
