"""From records to groups of token sequences, a chunk at a time, in this or in worker processes.

A group is what stands side by side in one pack: one sequence of instruction data, the two answers
of a pair.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from moetrain.data.chat import Chat, ChatOptions, Encoded, Marked
from moetrain.data.formats import Conversation
from moetrain.data.messages import FormatError, MissingError
from moetrain.data.rejects import Reject
from moetrain.data.selection import Selection
from moetrain.data.sources import Record

Extras = Mapping[str, tuple[float, ...]]  # name -> a value per sequence of a group
Texts = tuple[tuple[Marked, ...], ...]  # of each conversation, the texts that it is rendered to


@dataclass(frozen=True)
class Spec:
    """All that decides what a set holds, and nothing else; equal content makes an equal folder."""

    inputs: tuple[str, ...]  # files or folders, builtin names already resolved
    tokenizer: Path
    seq_len: int
    too_long: str  # "truncate" | "keep_end" | "reject"
    seed: int
    pack: bool = True
    share_prompt: bool = True
    chat: ChatOptions = field(default_factory=ChatOptions)
    model_vocab: int | None = None
    held_out: bool = False  # of inputs that are folders with splits
    selection: Selection | None = None  # None: every record
    num_workers: int | None = 0  # decides how fast, not what; None: as many as it is worth


@dataclass(frozen=True)
class Draft:
    """What a record says, before tokens: conversations, and values of their sequences."""

    conversations: tuple[Conversation, ...]
    extras: Extras = field(default_factory=dict[str, tuple[float, ...]])
    notes: tuple[str, ...] = ()  # on what of the record is not read


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
    notes: tuple[str, ...] = ()  # on what of the record is not learned or not read
    texts: Texts = ()  # what was rendered, where it is to be seen


@dataclass(frozen=True)
class SetKind:
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
    """Records to tokens. Worker processes get the tokenizer as it is: to find out how to load one,
    transformers 5.19 imports torch, which takes five seconds of processor time and 300 MB.
    """

    def __init__(self, kind: SetKind, spec: Spec, keep_texts: bool = False) -> None:
        self.kind, self.spec, self.keep_texts = kind, spec, keep_texts

    @cached_property
    def chat(self) -> Chat:
        return self.spec.chat.open(self.spec.tokenizer)

    def __call__(self, rows: Sequence[Record | Reject]) -> list[Result]:
        """Encode a chunk of rows, in order."""
        read = [self._read(row) for row in rows]
        texts = [text for one in read if isinstance(one, _Read) for text in one.texts]
        encoded = iter(self.chat.encode([marked for text in texts for marked in text]))
        results: list[Result] = []
        for row, one in zip(rows, read, strict=True):
            if isinstance(one, Result):
                results.append(one)
                continue
            sequences = [[next(encoded) for _ in text] for text in one.texts]
            kept = one.texts if self.keep_texts else ()
            try:
                groups = self.kind.group(sequences, one.draft.extras, self.spec)
            except FormatError as error:
                results.append(replace(_refused(row, error), texts=kept))
            else:
                results.append(Result(row.file, row.line, groups, notes=one.notes, texts=kept))
        return results

    def _read(self, row: Record | Reject) -> "_Read | Result":
        """A row rendered, or refused."""
        if isinstance(row, Reject):
            return Result(row.file, row.line, reason=row.reason)
        try:
            draft = self.kind.read(row.value)
            texts: list[tuple[Marked, ...]] = []
            notes: list[str] = []
            for one in draft.conversations:
                message = one.messages, one.template_kwargs, list(one.rendered or ())
                self.chat.refuse_long(self.spec.seq_len, *message)
                guarded, more = self.chat.controls.guarded(one)
                texts.append(tuple(self.chat.mark(guarded)))
                notes += more
            return _Read(replace(draft, notes=(*draft.notes, *notes)), tuple(texts))
        except FormatError as error:
            return _refused(row, error)


@dataclass(frozen=True)
class _Read:
    draft: Draft
    texts: Texts

    @property
    def notes(self) -> tuple[str, ...]:
        text_notes = (note for text in self.texts for marked in text for note in marked.notes)
        return tuple(dict.fromkeys((*self.draft.notes, *text_notes)))


def _refused(row: Record | Reject, error: FormatError) -> Result:
    lacks = error.keys if isinstance(error, MissingError) else None
    return Result(row.file, row.line, reason=str(error), lacks=lacks)
