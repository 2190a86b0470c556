"""Pretraining corpora in Megatron's own format; the only file here that imports megatron.

Legend: t = data.seq_len, the tokens of a sample. A prefix names two files, prefix.bin (tokens) and
prefix.idx (documents).
"""

import json
import os
import struct
import uuid
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import batched
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moetrain.data import tokenizer as tokenizers
from moetrain.data.cache import build_once, digest_files, key_of, write_text
from moetrain.data.rejects import Reject, check_rejects, write_rejects
from moetrain.data.sources import Row, find_sources, read_rows
from moetrain.errors import DataError
from moetrain.ops.packed import Packed, pack_one

CHUNK = 128  # documents tokenised together
MAGIC = b"MMIDIDX\x00\x00"
# Magic, version, dtype's code, sequences, documents; then a length (int32) and a pointer (int64)
# for each sequence and an int64 for each document.
HEADER = struct.Struct("<9sQBQQ")


@dataclass(frozen=True)
class IndexStats:
    """What `index` wrote; stored beside the index as PREFIX.json."""

    num_documents: int
    num_tokens: int
    num_rejected: int
    vocab: int
    tokenizer: str


def index(
    inputs: Iterable[str | Path],
    tokenizer: str | Path,
    out: str | Path,
    *,
    text_key: str = "text",
    max_rejected: float = 0.05,
) -> IndexStats:
    """Tokenise documents into `out`.bin and `out`.idx, each ended by the end-of-document token.

    A document is a text file or the `text_key` of a record. Skipped ones go to
    `out`.rejected.jsonl. The files appear only when both are complete. DataError when an input is
    missing, nothing is left or too much is rejected.
    """
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    loaded = tokenizers.load(tokenizer)
    eod = tokenizers.end_of_document(loaded)
    vocab = tokenizers.vocab_of(loaded)
    prefix = _prefix(out)
    rejects: list[Reject] = []
    num_documents = num_tokens = 0
    scratch = f"{prefix}.tmp-{uuid.uuid4().hex[:8]}"
    builder: Any = None
    try:
        prefix.parent.mkdir(parents=True, exist_ok=True)
        builder = IndexedDatasetBuilder(f"{scratch}.bin", dtype=DType.optimal_dtype(vocab))
        for texts in batched(_documents(inputs, text_key, rejects), CHUNK):
            batch = loaded(
                list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False
            )
            for ids in batch["input_ids"]:
                builder.add_item(torch.tensor([*ids, eod]))
                builder.end_document()
                num_documents += 1
                num_tokens += len(ids) + 1
        if rejects:
            write_rejects(Path(f"{prefix}.rejected.jsonl"), rejects)
        check_rejects(rejects, num_documents + len(rejects), max_rejected, "--max-rejected")
        if num_documents == 0:
            names = ", ".join(map(str, inputs))
            raise DataError(f"There is no document in {names}: each record needs {text_key!r}.")
        builder.finalize(f"{scratch}.idx")
        stats = IndexStats(num_documents, num_tokens, len(rejects), vocab, str(tokenizer))
        write_text(Path(f"{prefix}.json"), json.dumps(asdict(stats), indent=1))
        # Data first, index last, and none between: an index of other data would be believed.
        Path(f"{prefix}.idx").unlink(missing_ok=True)
        os.replace(f"{scratch}.bin", f"{prefix}.bin")
        os.replace(f"{scratch}.idx", f"{prefix}.idx")
    except OSError as error:
        raise DataError(f"{prefix} cannot be written: {error.strerror or error}.") from error
    finally:
        if builder is not None:
            builder.data_file.close()
        for suffix in (".bin", ".idx"):
            Path(scratch + suffix).unlink(missing_ok=True)
    return stats


def _documents(inputs: Iterable[str | Path], text_key: str, rejects: list[Reject]) -> Iterator[str]:
    for source in find_sources(inputs):
        for row in read_rows(source):
            found = _document(row, text_key)
            if isinstance(found, Reject):
                rejects.append(found)
            else:
                yield found


def _document(row: Row | Reject, text_key: str) -> str | Reject:
    if isinstance(row, Reject):
        return row
    text = row.value.get(text_key)
    if not isinstance(text, str):
        return Reject(
            row.file, row.line, f"no text under {text_key!r}; the keys are {sorted(row.value)}"
        )
    return text if text.strip() else Reject(row.file, row.line, f"{text_key} is empty")


def _prefix(path: str | Path) -> Path:
    """An index is named by its prefix; one of its files is taken to mean it."""
    path = Path(path).expanduser()
    return path.with_suffix("") if path.suffix in (".bin", ".idx") else path


class _Ids:
    """All that GPTDataset asks of a tokenizer. It has no pad.

    No token of a corpus is left out of the loss.
    """

    vocab_size = None
    eod = -2  # no token's id, and not what GPTDataset takes for a missing pad
    unique_identifiers = "moetrain"


class CorpusSet:
    """One or several indexed corpora, blended: epochs of `len` samples, each a `Packed` of [t].

    Every epoch is a GPTDataset (a BlendedDataset of several) of its own with the seed `seed` +
    epoch, so that what comes when does not depend on how long the run is. With `weights`, an epoch
    has as many samples as the corpora together, drawn in these shares; without, each sample once.
    """

    def __init__(
        self,
        prefixes: Sequence[str],
        weights: Sequence[float] | None,
        *,
        seq_len: int,
        seed: int,
        root: Path,
        held_out: bool = False,
        model_vocab: int | None = None,
    ) -> None:
        self.prefixes = [_prefix(p) for p in prefixes]
        self.seq_len, self.seed, self.held_out, self.model_vocab = (
            seq_len,
            seed,
            held_out,
            model_vocab,
        )
        self._epochs: dict[int, Any] = {}
        files = [_existing(p, suffix) for p in self.prefixes for suffix in (".idx", ".bin")]
        for prefix in self.prefixes:
            _check_made_for(prefix, model_vocab)
        self.num_samples = [_num_samples(p, seq_len) for p in self.prefixes]
        if weights is not None and len(weights) != len(prefixes):
            raise DataError(
                f"data.weights has {len(weights)} entries for {len(prefixes)} corpora: give one"
                " for each."
            )
        self.weights = list(weights) if weights is not None and len(prefixes) > 1 else None
        # Megatron names its cached orders by path, not by content: a folder per content keeps a re-
        # made index from being read in the order of the old one.
        content = [digest for _, digest in digest_files(files[::2], root)] + [
            f.stat().st_size for f in files[1::2]
        ]
        self.fingerprint = key_of([content, self.weights, seq_len, seed, held_out])
        self._cache = root / "corpus" / self.fingerprint

    def __len__(self) -> int:
        return len(self.epoch(0))

    def epoch(self, number: int) -> Any:
        """The dataset of one epoch.

        In a process group every rank must come here together (Megatron's barrier).
        """
        if number not in self._epochs:
            folder = self._cache / f"epoch-{number}"
            if not torch.distributed.is_initialized():
                build_once(folder, lambda tmp: self._build(number, tmp))
            elif not folder.is_dir():
                # Nobody called `prepare`: Megatron's rank 0 writes and the others wait. A write
                # that is cut short would be believed later, so it is kept apart.
                folder = self._cache / "unprepared"
            self._epochs = {number: self._build(number, folder)} | {
                k: v for k, v in self._epochs.items() if k == 0
            }
        return self._epochs[number]

    def _build(self, number: int, cache: Path) -> Any:
        from megatron.core.datasets.blended_megatron_dataset_builder import (
            BlendedMegatronDatasetBuilder,
        )
        from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
        from megatron.core.datasets.utils import Split

        split = Split.valid if self.held_out else Split.train
        blends: list[Any] = [None] * len(Split)
        blends[split.value] = ([str(p) for p in self.prefixes], self.weights)
        sizes: list[Any] = [0] * len(Split)
        total = sum(self.num_samples)
        sizes[split.value] = total if self.weights else None
        # Rounding to whole samples can ask a corpus for a few more than its share: leave room for
        # one per corpus.
        smallest = min((w for w in self.weights or [1.0] if w > 0), default=1.0) / sum(
            self.weights or [1.0]
        )
        config = GPTDatasetConfig(
            random_seed=(self.seed + number) % 2**32,
            sequence_length=self.seq_len,
            blend_per_split=blends,
            path_to_cache=str(cache),
            tokenizer=_Ids(),  # pyright: ignore[reportArgumentType]
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=False,
            create_attention_mask=False,
            mid_level_dataset_surplus=max(
                0.005, (len(self.prefixes) + 1) / max(1.0, total * smallest)
            ),
        )
        return BlendedMegatronDatasetBuilder(GPTDataset, sizes, lambda: True, config).build()[
            split.value
        ]

    def get(self, epoch: int, number: int) -> Packed:
        """Sample `number` of an epoch: one sequence of t tokens, all of them scored."""
        sample = self.epoch(epoch)[number]
        tokens, labels = sample["tokens"], sample["labels"]
        largest = int(max(tokens.max(), labels.max()))
        where = f"{', '.join(map(str, self.prefixes))} epoch {epoch} sample {number}"
        tokenizers.check_vocab(largest + 1, self.model_vocab, f"The index behind {where}")
        return pack_one(tokens, labels, torch.ones(self.seq_len), id=where)


def _existing(prefix: Path, suffix: str) -> Path:
    file = Path(f"{prefix}{suffix}")
    if not file.is_file():
        raise DataError(
            f"{file} does not exist: pretraining reads index prefixes. Make one with"
            f" `moetrain data index INPUT --tokenizer FOLDER --out {prefix}`."
        )
    return file


def _check_made_for(prefix: Path, model_vocab: int | None) -> None:
    """Refuse an index that says it was made with more tokens than the embedding has."""
    note = Path(f"{prefix}.json")
    if note.is_file():
        stats = json.loads(note.read_text())
        tokenizers.check_vocab(
            int(stats.get("vocab", 0)), model_vocab, f"The tokenizer of the index {prefix}"
        )


def _num_samples(prefix: Path, seq_len: int) -> int:
    """How many samples of seq_len (and a token after) an index holds. DataError when damaged.

    Read here and not by IndexedDataset, which says nothing clear of a damaged file.
    """
    from megatron.core.datasets.indexed_dataset import DType

    size = os.path.getsize(f"{prefix}.idx")
    with open(f"{prefix}.idx", "rb") as file:
        head = file.read(HEADER.size)
    if len(head) < HEADER.size or not head.startswith(MAGIC):
        raise DataError(f"{prefix}.idx is not a Megatron index, or is cut short: make it again.")
    _, _, code, num_sequences, num_documents = HEADER.unpack(head)
    if size < HEADER.size + num_sequences * 12 + num_documents * 8:
        raise DataError(f"{prefix}.idx is cut short: make it again.")
    lengths = np.memmap(f"{prefix}.idx", np.int32, "r", offset=HEADER.size, shape=(num_sequences,))
    num_tokens, width = int(lengths.sum(dtype=np.int64)), DType.size(DType.dtype_from_code(code))
    if os.path.getsize(f"{prefix}.bin") < num_tokens * width:
        raise DataError(
            f"{prefix}.bin is cut short: the index counts {num_tokens} tokens of {width} bytes."
        )
    if num_tokens <= seq_len:
        raise DataError(
            f"{prefix} has {num_tokens} tokens: too few for a sample of data.seq_len {seq_len} + 1."
        )
    return (num_tokens - 1) // seq_len
