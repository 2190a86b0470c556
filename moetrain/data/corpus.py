"""Pretraining corpora in Megatron's own format; the only file here that imports megatron.

Legend: t = data.seq_len, the tokens of a sample. A prefix names two files, prefix.bin (tokens) and
prefix.idx (documents).
"""

import contextlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import batched
from pathlib import Path
from typing import Any

import torch

from moetrain import files
from moetrain.data import index_files
from moetrain.data import tokenizer as tokenizers
from moetrain.data.boundaries import Boundaries
from moetrain.data.cache import build_once, digest_files, key_of
from moetrain.data.controls import How
from moetrain.data.documents import Documents, tokenise
from moetrain.data.rejects import write_rejects
from moetrain.errors import DataError, plural
from moetrain.ops.packed import Packed, pack_one
from moetrain.ops.quiet import hush

CHUNK = 128  # documents tokenised together
# Up to so many records a share of bad ones stops the work; what took longer is kept all the same.
EARLY = 10_000
FEWEST = 1000  # that a share is of


@dataclass(frozen=True)
class IndexStats:
    """What `index` wrote; stored beside the index as PREFIX.json."""

    num_documents: int
    num_tokens: int
    num_rejected: int
    vocab: int
    tokenizer: str
    num_empty: int = 0  # documents without text, which are nobody's fault
    num_special: int = 0  # documents with control tokens in their text, kept or spelled
    special_tokens: How = "reject"

    def summary(self, prefix: Path) -> str:
        """In words."""
        line = (
            f"wrote {prefix}.bin and {prefix}.idx: {plural(self.num_documents, 'document')},"
            f" {plural(self.num_tokens, 'token')}"
        )
        if self.num_empty:
            line += f"; {plural(self.num_empty, 'empty one')} skipped"
        if self.num_special:
            done = "taken as such" if self.special_tokens == "keep" else "spelled in letters"
            line += f"; control tokens in {self.num_special} of them are {done}"
        if self.num_rejected:
            rejected = plural(self.num_rejected, "record")
            line += f"; {rejected} rejected, see {prefix}.rejected.jsonl"
        return f"{line}. Train on it with data.train={prefix}"


def index(
    inputs: Iterable[str | Path],
    tokenizer: Path,
    out: str | Path,
    *,
    text_key: str = "text",
    max_rejected: float = 0.05,
    special_tokens: How = "reject",
) -> IndexStats:
    """Tokenise documents into `out`.bin and `out`.idx, each ended by the end-of-document token.

    A document is a text file or the `text_key` of a record; empty ones are counted and skipped.
    Records that are none go to `out`.rejected.jsonl, and, unless `special_tokens` says otherwise,
    documents with control tokens in them. The files appear only when both are complete.

    Raises DataError when an input is missing, nothing is left or too much is rejected: within the
    first EARLY records before anything is written, later with the files written all the same.
    """
    loaded = tokenizers.load(tokenizer)
    eod = tokenizers.end_of_document(loaded)
    found = Documents(inputs, text_key, loaded, special_tokens)
    prefix, vocab = _prefix(out), tokenizers.vocab_of(loaded)
    num_documents = num_tokens = 0
    early = True
    with _written(prefix, vocab) as (builder, finish):
        for texts in batched(found, CHUNK):
            for ids in tokenise(loaded, texts):
                builder.add_item(torch.tensor([*ids, eod]))
                builder.end_document()
                num_documents += 1
                num_tokens += len(ids) + 1
            early = num_documents + len(found.rejects) <= EARLY
            if early and num_documents + len(found.rejects) >= FEWEST:
                found.check_rejects(num_documents, max_rejected)
        rejected = Path(f"{prefix}.rejected.jsonl")
        if found.rejects:
            write_rejects(rejected, found.rejects)
        if early:
            found.check_rejects(num_documents, max_rejected)
        if num_documents == 0:
            names = ", ".join(map(str, inputs))
            raise DataError(f"There is no document in {names}: each record needs {text_key!r}.")
        stats = IndexStats(
            num_documents,
            num_tokens,
            len(found.rejects),
            vocab,
            str(tokenizer),
            found.num_empty,
            found.num_special,
            special_tokens,
        )
        finish(stats)
    if not found.rejects:  # those of an earlier index say nothing of this one
        write_rejects(rejected, ())
    found.check_rejects(num_documents, max_rejected, whole=prefix)
    return stats


@contextmanager
def _written(prefix: Path, vocab: int) -> Iterator[tuple[Any, Callable[[IndexStats], None]]]:
    """(what documents are added to, what gives the files their names when all are there). DataError
    when they cannot be written.
    """
    hush()
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    # Data first, index last, and none between: an index of other data would be believed.
    paths = [Path(f"{prefix}{suffix}") for suffix in (".bin", ".json", ".idx")]
    try:
        with files.publish(*paths) as (data, note, end):
            builder: Any = IndexedDatasetBuilder(str(data), dtype=DType.optimal_dtype(vocab))

            def finish(stats: IndexStats) -> None:
                builder.finalize(str(end))
                note.write_text(json.dumps(asdict(stats), indent=1))

            try:
                yield builder, finish
            finally:
                with contextlib.suppress(OSError):  # a full disk refuses what is in its buffer
                    builder.data_file.close()
    except OSError as error:
        raise DataError(f"{prefix} cannot be written: {error.strerror or error}.") from error


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
        boundaries: Boundaries | None = None,
    ) -> None:
        self.boundaries = boundaries
        self.prefixes = [_prefix(p) for p in prefixes]
        self.seq_len, self.seed, self.held_out, self.model_vocab = (
            seq_len,
            seed,
            held_out,
            model_vocab,
        )
        self._epochs: dict[int, Any] = {}
        files = [
            index_files.existing(p, suffix) for p in self.prefixes for suffix in (".idx", ".bin")
        ]
        self.num_samples = [index_files.num_samples(p, seq_len) for p in self.prefixes]
        for prefix in self.prefixes:
            index_files.check_tokens(prefix, model_vocab, root)
        indexes = [digest for _, digest in digest_files(files[::2], root)]
        index_files.check_once(self.prefixes, indexes)
        if weights is not None and len(weights) != len(prefixes):
            raise DataError(
                f"data.weights has {len(weights)} entries for {len(prefixes)} corpora: give one"
                " for each."
            )
        self.weights = list(weights) if weights is not None and len(prefixes) > 1 else None
        # Megatron names its cached orders by path, not by content: a folder per content keeps a re-
        # made index from being read in the order of the old one.
        content = [*indexes, *(f.stat().st_size for f in files[1::2])]
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
        hush()
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
        """Sample `number` of an epoch: t tokens, all of them scored and one sequence where
        `boundaries` does not say otherwise.
        """
        sample = self.epoch(epoch)[number]
        tokens, labels = sample["tokens"], sample["labels"]
        # The index was looked at; these are the bytes that came.
        smallest = int(min(tokens.min(), labels.min()))
        largest = int(max(tokens.max(), labels.max()))
        where = f"{', '.join(map(str, self.prefixes))} epoch {epoch} sample {number}"
        if smallest < 0:
            raise DataError(f"The index behind {where} has a token {smallest}: make it again.")
        tokenizers.check_vocab(largest + 1, self.model_vocab, f"The index behind {where}")
        if self.boundaries is not None:
            return self.boundaries.pack(tokens, labels, where)
        return pack_one(tokens, labels, torch.ones(self.seq_len), id=where)
