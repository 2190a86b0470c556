"""Instruction data, tokenised and packed once, on disk, outside the process group.

Legend: n sequences of a set, t tokens of all of them. A set is a folder:
  tokens.bin [t] int32, mask.bin [t] uint8 (learn to produce this token), starts.npy [n+1] int64,
  lines.npy [n] int64 and files.npy [n] int32 (where a sequence came from), pack_items.npy [n] int64
  and pack_starts.npy [packs+1] int64 (which sequences share a pack), meta.json, rejected.jsonl.
"""

import json
import multiprocessing
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import batched
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from moetrain.data import packing, tokenizer
from moetrain.data.cache import build_once, digest_files, key_of
from moetrain.data.chat import Chat, Encoded, template_text
from moetrain.data.formats import FormatError, to_conversation
from moetrain.data.rejects import Reject, read_rejects, write_rejects
from moetrain.data.sources import Row, find_sources, read_rows
from moetrain.errors import DataError
from moetrain.ops.packed import Packed, concat, pack_one, pad_to

# Raise it when the same inputs come to give other arrays.
VERSION = 1
CHUNK = 256  # records tokenised together


@dataclass(frozen=True)
class SftSpec:
    """All that decides what a set holds, and nothing else; equal content makes an equal folder."""

    inputs: tuple[str, ...]  # files or folders, builtin names already resolved
    tokenizer: Path
    seq_len: int
    too_long: str  # "truncate" | "reject"
    seed: int
    pack: bool = True
    chat_template: str | None = None
    model_vocab: int | None = None
    num_workers: int = 0  # decides how fast, not what


@dataclass(frozen=True)
class SftStats:
    """What happened to the records of a set."""

    num_records: int
    num_rejected: int
    num_truncated: int
    num_sequences: int
    num_tokens: int
    num_packs: int
    fill: float
    vocab: int


@dataclass(frozen=True)
class _Result:
    """What came of one record: sequences, or the reason why none."""

    file: str
    line: int
    sequences: tuple[Encoded, ...] = ()
    truncated: bool = False
    reason: str | None = None


class Encoder:
    """Records to tokens; picklable, so that each worker process loads its own tokenizer."""

    def __init__(self, folder: Path, template: str | None, seq_len: int, too_long: str) -> None:
        self.folder, self.template, self.seq_len, self.too_long = (
            folder,
            template,
            seq_len,
            too_long,
        )

    def __getstate__(self) -> tuple[Any, ...]:
        return self.folder, self.template, self.seq_len, self.too_long

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.folder, self.template, self.seq_len, self.too_long = state

    @cached_property
    def chat(self) -> Chat:
        return Chat(tokenizer.load(self.folder), self.template)

    def __call__(self, rows: Sequence[Row | Reject]) -> list[_Result]:
        """Encode a chunk of rows, in order."""
        marked: list[Any] = []
        counts: list[int | str] = []
        for row in rows:
            if isinstance(row, Reject):
                counts.append(row.reason)
                continue
            try:
                texts = self.chat.mark(to_conversation(row.value))
            except FormatError as error:
                counts.append(str(error))
                continue
            counts.append(len(texts))
            marked.extend(texts)
        encoded = iter(self.chat.encode(marked))
        results: list[_Result] = []
        for row, count in zip(rows, counts, strict=True):
            if isinstance(count, str):
                results.append(_Result(row.file, row.line, reason=count))
            else:
                results.append(self._fit(row, [next(encoded) for _ in range(count)]))
        return results

    def _fit(self, row: Row | Reject, sequences: list[Encoded]) -> _Result:
        """Apply data.too_long; drop what has nothing left to learn (token 0 never counts)."""
        longest = max((s.tokens.size for s in sequences), default=0)
        if longest > self.seq_len and self.too_long == "reject":
            reason = (
                f"{longest} tokens, more than data.seq_len {self.seq_len} (data.too_long is reject)"
            )
            return _Result(row.file, row.line, reason=reason)
        cut = [Encoded(s.tokens[: self.seq_len], s.mask[: self.seq_len]) for s in sequences]
        kept = tuple(s for s in cut if s.mask[1:].any())
        if not kept:
            reason = "no token to learn from"
            if longest > self.seq_len:
                reason = (
                    f"{longest} tokens: no part of the answer is within data.seq_len {self.seq_len}"
                )
            return _Result(row.file, row.line, reason=reason)
        return _Result(row.file, row.line, kept, truncated=longest > self.seq_len)


def build(spec: SftSpec, root: Path) -> Path:
    """The folder of the set under the cache `root`, built when it is not there.

    DataError: an input is missing, no record is usable, the tokenizer is larger than the model's
    vocabulary.
    """
    sources = find_sources(spec.inputs)
    template = template_text(spec.chat_template)
    content = {
        "version": VERSION,
        "files": digest_files([f for source in sources for f in source.files], root),
        "tokenizer": [
            (Path(p).name, digest)
            for p, digest in digest_files(tokenizer.tokenizer_files(spec.tokenizer), root)
        ],
        "template": template,
        "spec": [spec.seq_len, spec.too_long, spec.seed, spec.pack],
    }
    folder = root / "sft" / key_of(content)
    build_once(folder, lambda tmp: _write(spec, template, tmp))
    tokenizer.check_vocab(
        SftSet(folder).stats.vocab, spec.model_vocab, f"The tokenizer {spec.tokenizer}"
    )
    return folder


def _results(spec: SftSpec, encoder: Encoder) -> Iterator[_Result]:
    """Encode every record, in input order whatever the number of workers."""
    rows = (row for source in find_sources(spec.inputs) for row in read_rows(source))
    chunks = batched(rows, CHUNK)
    if spec.num_workers < 1:
        for chunk in chunks:
            yield from encoder(chunk)
        return
    # Spawned: a fork after torch or tokenizers started threads can hang.
    with ProcessPoolExecutor(
        spec.num_workers, mp_context=multiprocessing.get_context("spawn")
    ) as pool:
        # A bounded number of chunks in flight, so that memory does not grow with the file.
        for group in batched(chunks, 8 * spec.num_workers):
            for results in pool.map(encoder, group):
                yield from results


def _write(spec: SftSpec, template: str | None, folder: Path) -> None:
    """Fill `folder` with the set.

    Memory holds one chunk of tokens and a few numbers per sequence.
    """
    encoder = Encoder(spec.tokenizer, template, spec.seq_len, spec.too_long)
    vocab = tokenizer.vocab_of(encoder.chat.tokenizer)
    tokenizer.check_vocab(vocab, spec.model_vocab, f"The tokenizer {spec.tokenizer}")
    files: dict[str, int] = {}
    lengths: list[int] = []
    origins: list[tuple[int, int]] = []
    rejects: list[Reject] = []
    num_records = num_truncated = 0
    with ExitStack() as stack:
        tokens = stack.enter_context((folder / "tokens.bin").open("wb"))
        mask = stack.enter_context((folder / "mask.bin").open("wb"))
        for result in _results(spec, encoder):
            num_records += 1
            num_truncated += result.truncated
            if result.reason is not None:
                rejects.append(Reject(result.file, result.line, result.reason))
            for sequence in result.sequences:
                tokens.write(sequence.tokens.tobytes())
                mask.write(sequence.mask.astype(np.uint8).tobytes())
                lengths.append(sequence.tokens.size)
                origins.append((files.setdefault(result.file, len(files)), result.line))
    if not lengths:
        first = (
            f" The first: {rejects[0].file}:{rejects[0].line}: {rejects[0].reason}."
            if rejects
            else ""
        )
        raise DataError(
            f"None of the {num_records} records in {', '.join(spec.inputs)} can be used.{first}"
        )
    packs = [[i] for i in range(len(lengths))]
    if spec.pack:
        packs = packing.pack(lengths, spec.seq_len, spec.seed)
    np.save(folder / "starts.npy", _offsets(lengths))
    np.save(folder / "files.npy", np.array([file for file, _ in origins], dtype=np.int32))
    np.save(folder / "lines.npy", np.array([line for _, line in origins], dtype=np.int64))
    np.save(folder / "pack_items.npy", np.array([i for p in packs for i in p], dtype=np.int64))
    np.save(folder / "pack_starts.npy", _offsets([len(p) for p in packs]))
    write_rejects(folder / "rejected.jsonl", rejects)
    stats = SftStats(
        num_records=num_records,
        num_rejected=len(rejects),
        num_truncated=num_truncated,
        num_sequences=len(lengths),
        num_tokens=sum(lengths),
        num_packs=len(packs),
        fill=packing.fill(lengths, packs, spec.seq_len),
        vocab=vocab,
    )
    meta = {"stats": asdict(stats), "files": list(files), "seq_len": spec.seq_len}
    (folder / "meta.json").write_text(json.dumps(meta, indent=1))


def _offsets(lengths: Iterable[int]) -> NDArray[np.int64]:
    """[n+1] running sums, from 0."""
    return np.concatenate(
        [np.zeros(1, dtype=np.int64), np.cumsum(np.array(list(lengths), dtype=np.int64))]
    )


class SftSet:
    """A set on disk, memory-mapped: `len` packs, each a `Packed` of exactly seq_len tokens."""

    def __init__(self, folder: Path) -> None:
        meta = json.loads((folder / "meta.json").read_text())
        self.folder = folder
        self.stats = SftStats(**meta["stats"])
        self.seq_len: int = meta["seq_len"]
        self._names: list[str] = meta["files"]
        self._tokens = np.memmap(folder / "tokens.bin", dtype=np.int32, mode="r")
        self._mask = np.memmap(folder / "mask.bin", dtype=np.uint8, mode="r")
        self._starts, self._files, self._lines, self._items, self._packs = (
            np.load(folder / f"{name}.npy", mmap_mode="r")
            for name in ("starts", "files", "lines", "pack_items", "pack_starts")
        )

    @property
    def fingerprint(self) -> str:
        """Equal for equal content."""
        return self.folder.name

    def rejects(self) -> list[Reject]:
        """The records that were skipped when the set was built."""
        return read_rejects(self.folder / "rejected.jsonl")

    def __len__(self) -> int:
        return self.stats.num_packs

    def __getitem__(self, index: int) -> Packed:
        items = self._items[self._packs[index] : self._packs[index + 1]]
        return pad_to(concat([self._sequence(int(i)) for i in items]), self.seq_len)

    def _sequence(self, index: int) -> Packed:
        """One sequence: labels[i] is tokens[i+1], and counts when the assistant said that token."""
        start, end = int(self._starts[index]), int(self._starts[index + 1])
        tokens = torch.from_numpy(self._tokens[start:end].astype(np.int64))
        mask = torch.from_numpy(self._mask[start:end].astype(np.float32))
        labels = torch.cat([tokens[1:], tokens.new_zeros(1)])
        return pack_one(
            tokens,
            labels,
            torch.cat([mask[1:], mask.new_zeros(1)]),
            id=f"{self._names[self._files[index]]}:{self._lines[index]}",
        )
