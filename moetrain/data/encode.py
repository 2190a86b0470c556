"""From records to groups of token sequences, a chunk at a time, in this or in worker processes.

A group is what stands side by side in one pack: one sequence of instruction data, the two answers
of a pair.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from moetrain.data import tokenizer
from moetrain.data.chat import Chat, Encoded
from moetrain.data.formats import Conversation, FormatError, MissingError
from moetrain.data.rejects import Reject
from moetrain.data.selection import Selection
from moetrain.data.sources import Row

Extras = Mapping[str, tuple[float, ...]]  # name -> a value per sequence of a group


@dataclass(frozen=True)
class Spec:
    """All that decides what a set holds, and nothing else; equal content makes an equal folder."""

    inputs: tuple[str, ...]  # files or folders, builtin names already resolved
    tokenizer: Path
    seq_len: int
    too_long: str  # "truncate" | "reject"
    seed: int
    pack: bool = True
    share_prompt: bool = True
    chat_template: str | None = None
    model_vocab: int | None = None
    held_out: bool = False  # of inputs that are folders with splits
    selection: Selection | None = None  # None: every record
    num_workers: int = 0  # decides how fast, not what


@dataclass(frozen=True)
class Draft:
    """What a record says, before tokens: conversations, and values of their sequences."""

    conversations: tuple[Conversation, ...]
    extras: Extras = field(default_factory=dict[str, tuple[float, ...]])


@dataclass(frozen=True)
class Group:
    """Sequences for one pack, whole; the first `shared` tokens of all are the same."""

    sequences: tuple[Encoded, ...]
    shared: int = 0
    extras: Extras = field(default_factory=dict[str, tuple[float, ...]])
    truncated: bool = False

    @property
    def num_tokens(self) -> int:
        """Tokens that it takes in a pack."""
        return sum(s.tokens.size for s in self.sequences) - self.shared * (len(self.sequences) - 1)


@dataclass(frozen=True)
class Result:
    """What came of one record: groups, or the reason why none."""

    file: str
    line: int
    groups: tuple[Group, ...] = ()
    reason: str | None = None
    lacks: tuple[str, ...] | None = None  # the keys of a record of another kind


@dataclass(frozen=True)
class Kind:
    """What one kind of set does in its own way. Functions of modules: worker processes get them by
    their names.
    """

    name: str  # of its folder in the cache
    unit: str  # what a group is called
    read: Callable[[Mapping[str, Any]], Draft]  # FormatError
    group: Callable[[list[list[Encoded]], Extras, Spec], tuple[Group, ...]]  # FormatError
    # After a record by itself, what it takes of its neighbours in the file; in file order.
    join: Callable[[Iterable[Result], Spec], Iterator[Result]] | None = None
    lacking: str = ""  # what records of another kind do not have
    advice: str = ""  # for data of which all records are of another kind


class Encoder:
    """Records to tokens; picklable, so that each worker process loads its own tokenizer."""

    def __init__(self, kind: Kind, spec: Spec) -> None:
        self.kind, self.spec = kind, spec

    def __getstate__(self) -> tuple[Kind, Spec]:
        return self.kind, self.spec

    def __setstate__(self, state: tuple[Kind, Spec]) -> None:
        self.kind, self.spec = state

    @cached_property
    def chat(self) -> Chat:
        return Chat(tokenizer.load(self.spec.tokenizer), self.spec.chat_template)

    def __call__(self, rows: Sequence[Row | Reject]) -> list[Result]:
        """Encode a chunk of rows, in order."""
        marked: list[Any] = []
        found: list[tuple[Extras, list[int]] | Result] = []
        for row in rows:
            if isinstance(row, Reject):
                found.append(Result(row.file, row.line, reason=row.reason))
                continue
            try:
                draft = self.kind.read(row.value)
                texts = [self.chat.mark(one) for one in draft.conversations]
            except FormatError as error:
                found.append(_refused(row, error))
                continue
            found.append((draft.extras, [len(one) for one in texts]))
            marked.extend(text for one in texts for text in one)
        encoded = iter(self.chat.encode(marked))
        results: list[Result] = []
        for row, one in zip(rows, found, strict=True):
            if isinstance(one, Result):
                results.append(one)
                continue
            extras, counts = one
            sequences = [[next(encoded) for _ in range(count)] for count in counts]
            try:
                groups = self.kind.group(sequences, extras, self.spec)
                results.append(Result(row.file, row.line, groups))
            except FormatError as error:
                results.append(_refused(row, error))
        return results


def _refused(row: Row | Reject, error: FormatError) -> Result:
    lacks = error.keys if isinstance(error, MissingError) else None
    return Result(row.file, row.line, reason=str(error), lacks=lacks)
