"""A set of packed sequences on disk: tokenised and packed once, outside the process group.

Legend: n sequences of a set, g groups of them, t tokens of all sequences. A group is what stands
side by side in one pack: one sequence of instruction data, the two answers of a pair. A set is a
folder:
  tokens.bin [t] int32, mask.bin [t] uint8 (learn to produce this token), starts.npy [n+1] int64,
  group_starts.npy [g+1] int64 (sequences), shared.npy [g] int64 (first tokens that a group's
  sequences have in common and a pack has once), lines.npy [g] int64 and files.npy [g] int32 (where
  a group came from), pack_groups.npy [g] int64 and pack_starts.npy [packs+1] int64 (which groups
  share a pack), extras/NAME.npy [n] (a value per sequence), meta.json, rejected.jsonl.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from itertools import batched
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from moetrain.data import packing, tokenizer
from moetrain.data.cache import build_once, digest_files, key_of
from moetrain.data.encode import Encoder, Group, Result, SetKind, Spec
from moetrain.data.pieces import total_bytes
from moetrain.data.rejects import Reject, read_rejects, write_rejects
from moetrain.data.selection import rows_of
from moetrain.data.sources import find_sources
from moetrain.data.template import template_text
from moetrain.data.tokenizer_files import tokenizer_files
from moetrain.data.words import Words
from moetrain.data.workers import in_order, worth
from moetrain.errors import DataError
from moetrain.ops.packed import Packed, concat, pack_one, pad_to

# Raise it when the same inputs come to give other arrays.
VERSION = 5
CHUNK = 256  # records tokenised together
# The type of each value per sequence that a set can have.
EXTRAS: dict[str, type[np.generic]] = {"role": np.int64, "margin": np.float32}


@dataclass(frozen=True)
class Stats:
    """What happened to the records of a set."""

    num_records: int
    num_rejected: int
    num_truncated: int
    num_sequences: int
    num_groups: int
    num_tokens: int  # in packs
    num_shared: int  # tokens that stand in a pack once and not once per sequence
    num_packs: int
    fill: float
    vocab: int
    notes: dict[str, int]  # on records, and how many of them


def build(kind: SetKind, spec: Spec, root: Path) -> Path:
    """The folder of the set under the cache `root`, built when it is not there.

    DataError: an input is missing, no record is usable, the tokenizer is larger than the model's
    vocabulary.
    """
    sources = find_sources(spec.inputs, held_out=spec.held_out)
    content: dict[str, Any] = {
        "version": VERSION,
        "files": digest_files([f for source in sources for f in source.files], root),
        "tokenizer": [
            (Path(p).name, digest)
            for p, digest in digest_files(tokenizer_files(spec.tokenizer), root)
        ],
        "chat": asdict(spec.chat) | {"template": template_text(spec.chat.template)},
        "spec": [spec.seq_len, spec.too_long, spec.seed, spec.pack, spec.share_prompt],
    }
    if spec.selection is not None:
        content["selection"] = spec.selection.key()
    folder = root / kind.name / key_of(content)
    build_once(folder, lambda tmp: _write(kind, spec, tmp))
    tokenizer.check_vocab(
        PackedSet(folder).stats.vocab, spec.model_vocab, f"The tokenizer {spec.tokenizer}"
    )
    return folder


def _results(spec: Spec, encoder: Encoder) -> Iterator[Result]:
    """Encode every record, in input order whatever the number of workers."""
    sources = find_sources(spec.inputs, held_out=spec.held_out)
    num_bytes = total_bytes(sources)
    encoder.chat.expect(num_bytes)
    num_workers = worth(num_bytes) if spec.num_workers is None else spec.num_workers
    rows = rows_of(spec.inputs, spec.selection, held_out=spec.held_out)
    chunks = batched(rows, CHUNK)
    for results in in_order(encoder, chunks, num_workers, "data.num_workers"):
        yield from results


class _Writer:
    """The arrays of a set as groups come in; memory holds a few numbers per sequence."""

    def __init__(self, folder: Path, files: ExitStack) -> None:
        self.folder = folder
        self._tokens = files.enter_context((folder / "tokens.bin").open("wb"))
        self._mask = files.enter_context((folder / "mask.bin").open("wb"))
        self._hash = hashlib.sha256()
        self.files: dict[str, int] = {}
        self.lengths: list[int] = []  # of sequences
        self.sizes: list[int] = []  # of groups, in sequences
        self.shared: list[int] = []
        self.origins: list[tuple[int, int]] = []
        self.room: list[int] = []  # of groups, in tokens
        self.extras: dict[str, list[float]] = {}

    def add(self, file: str, line: int, group: Group) -> None:
        for name in group.extras.keys() - self.extras.keys():
            self.extras[name] = [0.0] * len(self.lengths)
        for name, values in self.extras.items():
            values.extend(group.extras.get(name, (0.0,) * len(group.sequences)))
        for sequence in group.sequences:
            tokens, mask = sequence.tokens.tobytes(), sequence.mask.astype(np.uint8).tobytes()
            self._tokens.write(tokens)
            self._mask.write(mask)
            for part in (len(mask).to_bytes(8, "little"), tokens, mask):
                self._hash.update(part)
            self.lengths.append(sequence.tokens.size)
        self.sizes.append(len(group.sequences))
        self.shared.append(group.shared)
        self.room.append(group.num_tokens)
        self.origins.append((self.files.setdefault(file, len(self.files)), line))

    def close(self, packs: list[list[int]]) -> str:
        """Write the small arrays; the digest of all sequences."""
        arrays: dict[str, NDArray[Any]] = {
            "starts": _offsets(self.lengths),
            "group_starts": _offsets(self.sizes),
            "shared": np.array(self.shared, dtype=np.int64),
            "files": np.array([file for file, _ in self.origins], dtype=np.int32),
            "lines": np.array([line for _, line in self.origins], dtype=np.int64),
            "pack_groups": np.array([i for p in packs for i in p], dtype=np.int64),
            "pack_starts": _offsets([len(p) for p in packs]),
        }
        for name, values in arrays.items():
            np.save(self.folder / f"{name}.npy", values)
        (self.folder / "extras").mkdir()
        for name, values in self.extras.items():
            np.save(self.folder / "extras" / f"{name}.npy", np.array(values, dtype=EXTRAS[name]))
        return self._hash.hexdigest()[:24]


def _offsets(lengths: Iterable[int]) -> NDArray[np.int64]:
    """[n+1] running sums, from 0."""
    return np.concatenate(
        [np.zeros(1, dtype=np.int64), np.cumsum(np.array(list(lengths), dtype=np.int64))]
    )


def _write(kind: SetKind, spec: Spec, folder: Path) -> None:
    """Fill `folder` with the set."""
    encoder = Encoder(kind, spec)
    vocab = tokenizer.vocab_of(encoder.chat.tokenizer)
    tokenizer.check_vocab(vocab, spec.model_vocab, f"The tokenizer {spec.tokenizer}")
    rejects: list[Reject] = []
    lacking: list[tuple[str, ...]] = []
    notes: Counter[str] = Counter()
    num_records = num_truncated = 0
    with ExitStack() as stack:
        writer = _Writer(folder, stack)
        results = _results(spec, encoder)
        for result in results if kind.join is None else kind.join(results, spec):
            num_records += 1
            notes.update(result.notes)
            num_truncated += any(group.truncated for group in result.groups)
            if result.reason is not None:
                rejects.append(Reject(result.file, result.line, result.reason))
            if result.lacks is not None:
                lacking.append(result.lacks)
            for group in result.groups:
                writer.add(result.file, result.line, group)
    if not writer.lengths:
        raise DataError(_nothing(kind, spec, num_records, rejects, lacking))
    packs = [[i] for i in range(len(writer.room))]
    if spec.pack:
        packs = packing.pack(writer.room, spec.seq_len, spec.seed)
    sequences = writer.close(packs)
    write_rejects(folder / "rejected.jsonl", rejects)
    stats = Stats(
        num_records=num_records,
        num_rejected=len(rejects),
        num_truncated=num_truncated,
        num_sequences=len(writer.lengths),
        num_groups=len(writer.room),
        num_tokens=sum(writer.room),
        num_shared=sum(writer.lengths) - sum(writer.room),
        num_packs=len(packs),
        fill=packing.fill(writer.room, packs, spec.seq_len),
        vocab=vocab,
        notes=dict(notes),
    )
    meta = {
        "stats": asdict(stats),
        "files": list(writer.files),
        "seq_len": spec.seq_len,
        "unit": kind.unit,
        "sequences": sequences,
    }
    (folder / "meta.json").write_text(json.dumps(meta, indent=1))


def _nothing(
    kind: SetKind,
    spec: Spec,
    num_records: int,
    rejects: list[Reject],
    lacking: list[tuple[str, ...]],
) -> str:
    """Why a set would be empty, in one line."""
    inputs = ", ".join(spec.inputs)
    if lacking and len(lacking) == num_records:
        keys = ", ".join(sorted({key for keys in lacking for key in keys}))
        return (
            f"None of the {num_records} records in {inputs} has {kind.lacking}; their keys are"
            f" {keys}. {kind.advice}"
        )
    first = (
        f" The first: {rejects[0].file}:{rejects[0].line}: {rejects[0].reason}." if rejects else ""
    )
    return f"None of the {num_records} records in {inputs} can be used.{first}"


class PackedSet:
    """A set on disk, memory-mapped: `len` packs, each a `Packed` of exactly seq_len tokens."""

    def __init__(self, folder: Path) -> None:
        meta = json.loads((folder / "meta.json").read_text())
        self.folder = folder
        self.stats = Stats(**meta["stats"])
        self.seq_len: int = meta["seq_len"]
        self.unit: str = meta["unit"]
        # Equal for the same sequences in the same order, however they are packed: what values per
        # sequence that a model computed belong to.
        self.sequences_fingerprint: str = meta["sequences"]
        self._names: list[str] = meta["files"]
        self._tokens = np.memmap(folder / "tokens.bin", dtype=np.int32, mode="r")
        self._mask = np.memmap(folder / "mask.bin", dtype=np.uint8, mode="r")
        self._arrays: dict[str, NDArray[Any]] = {
            path.stem: np.load(path, mmap_mode="r") for path in folder.glob("*.npy")
        }
        self.extras: dict[str, NDArray[Any]] = {
            path.stem: np.load(path, mmap_mode="r") for path in (folder / "extras").glob("*.npy")
        }
        self.words: Words | None = None

    @property
    def fingerprint(self) -> str:
        """Equal for equal content, tokenizer, template and packing."""
        return self.folder.name

    @property
    def num_items(self) -> int:
        """Sequences; `item` of a pack's extras counts them."""
        return self.stats.num_sequences

    def rejects(self) -> list[Reject]:
        """The records that were skipped when the set was built."""
        return read_rejects(self.folder / "rejected.jsonl")

    def with_reference(self, path: Path) -> "PackedSet":
        """The same set whose packs also have extras["ref_logp"], from a file [num_items] float32.

        DataError when the file is not one, or of another set.
        """
        try:
            values = np.load(path, mmap_mode="r")
        except (OSError, ValueError, EOFError) as error:
            raise DataError(
                f"The reference log-probs in {path} cannot be read ({error}): remove the file."
            ) from error
        if values.shape != (self.num_items,) or values.dtype != np.float32:
            raise DataError(
                f"The reference log-probs in {path} are {values.dtype} {list(values.shape)} but the"
                f" set has {self.num_items} answers (float32): remove the file."
            )
        other = PackedSet(self.folder)
        other.extras["ref_logp"] = values
        return other

    @property
    def num_learned(self) -> NDArray[np.int64]:
        """[num_items] tokens of each sequence that are learned: its first has nothing before it."""
        starts = self._arrays["starts"]
        sums = np.concatenate([np.zeros(1, np.int64), np.cumsum(self._mask, dtype=np.int64)])
        return sums[starts[1:]] - sums[starts[:-1]] - self._mask[starts[:-1]]

    def with_words(self, folder: Path) -> "PackedSet":
        """The same set whose packs also have per_token["teacher_ids"] and ["teacher_top"]."""
        other = PackedSet(self.folder)
        other.words = Words(folder, self.num_learned)
        return other

    def items(self, index: int) -> list[int]:
        """The sequences of pack `index`, in their order in it."""
        start, end = self._arrays["pack_starts"][index : index + 2]
        groups = self._arrays["pack_groups"][start:end]
        bounds = self._arrays["group_starts"]
        return [item for g in groups for item in range(int(bounds[g]), int(bounds[g + 1]))]

    def sequence(self, item: int) -> NDArray[np.int32]:
        """[its tokens] of sequence `item`."""
        begin, stop = map(int, self._arrays["starts"][item : item + 2])
        return np.array(self._tokens[begin:stop])

    def learned(self, item: int) -> NDArray[np.int64]:
        """The places of a sequence's learned tokens."""
        begin, stop = map(int, self._arrays["starts"][item : item + 2])
        return np.flatnonzero(self._mask[begin + 1 : stop]) + 1

    def __len__(self) -> int:
        return self.stats.num_packs

    def __getitem__(self, index: int) -> Packed:
        start, end = self._arrays["pack_starts"][index : index + 2]
        groups = self._arrays["pack_groups"][start:end]
        return pad_to(concat([self._group(int(group)) for group in groups]), self.seq_len)

    def _group(self, group: int) -> Packed:
        """A group's sequences, after what they share as a sequence of its own."""
        first, end = map(int, self._arrays["group_starts"][group : group + 2])
        shared = int(self._arrays["shared"][group])
        name = f"{self._names[self._arrays['files'][group]]}:{self._arrays['lines'][group]}"
        parts = [self._part(first, 0, shared, name)] if shared else []
        parts += [self._part(item, shared, None, name) for item in range(first, end)]
        pack = concat(parts)
        if shared:
            prefix = torch.zeros(len(parts), dtype=torch.int32)
            prefix[0] = -1
            pack = replace(pack, prefix=prefix)
        if not self.extras:
            return pack
        num_before = len(parts) - (end - first)
        extras = {"item": torch.arange(first - num_before, end)}
        extras["item"][:num_before] = -1
        for key, values in self.extras.items():
            part = torch.from_numpy(np.array(values[first:end]))
            extras[key] = torch.cat([part.new_zeros(num_before), part])
        return replace(pack, extras=extras)

    def _part(self, item: int, start: int, end: int | None, name: str) -> Packed:
        """Tokens [start:end] of a sequence: labels[i] is tokens[i+1], and counts when the assistant
        said that token.
        """
        begin, stop = map(int, self._arrays["starts"][item : item + 2])
        begin, stop = begin + start, stop if end is None else begin + end
        tokens = torch.from_numpy(self._tokens[begin:stop].astype(np.int64))
        mask = torch.from_numpy(self._mask[begin:stop].astype(np.float32))
        part = pack_one(
            tokens,
            torch.cat([tokens[1:], tokens.new_zeros(1)]),
            torch.cat([mask[1:], mask.new_zeros(1)]),
            id=name,
        )
        if self.words is not None:
            before = int(self._mask[begin - start + 1 : begin + 1].sum())
            per_token = self.words.of(item, before, part.loss_mask)
            part = replace(part, per_token=per_token)
        return replace(part, position_ids=part.position_ids + start)
