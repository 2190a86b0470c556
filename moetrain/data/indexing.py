"""Text to an indexed corpus in Megatron's own format, by all cores, without torch."""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np

from moetrain.data import index_parts, same_tokens, text_tokenizer
from moetrain.data.cache import key_of
from moetrain.data.controls import How
from moetrain.data.documents import Documents
from moetrain.data.index_files import prefix_of
from moetrain.data.index_parts import Block, Parts, State
from moetrain.data.pieces import LARGEST, SAMPLE, Piece, pieces, sample, total_bytes
from moetrain.data.rejects import Reject, check_share
from moetrain.data.sources import Source, find_sources
from moetrain.data.text_tokenizer import FAST, SLOW, Engine, Ids, TextTokenizer
from moetrain.data.workers import in_order, num_cores
from moetrain.errors import DataError, plural

VERSION = 1  # raise it when the same inputs come to give other files
# Up to so many records a share of bad ones stops the work; what took longer is kept all the same.
EARLY = 10_000
FEWEST = 1000  # that a share is of
WORTH = 4 * LARGEST  # bytes: for fewer neither processes nor another tokenizer are looked for
SAMPLED = 100_000  # characters of a document that is sampled

type Report = Callable[[int, int], None]
"""(bytes of the input that are done, bytes of the input)."""


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
    engine: str = SLOW  # what made the tokens

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


@dataclass(frozen=True)
class Options:
    """How a corpus is made."""

    text_key: str = "text"
    max_rejected: float = 0.05
    special_tokens: How = "reject"
    workers: int | None = None  # None: one for each core


class Indexer:
    """Pieces of a corpus to tokens; picklable, so that each process opens the tokenizer once."""

    def __init__(self, tokenizer: TextTokenizer, engine: str, options: Options) -> None:
        self.tokenizer, self.engine, self.options = tokenizer, engine, options
        self._engine: Engine | None = None

    def __call__(self, piece: Piece) -> Block:
        """Read and tokenise a piece."""
        if self._engine is None:
            self._engine = self.tokenizer.open(self.engine)
        documents = self.documents(piece)
        texts = list(documents)
        ids = iter(self._engine([text for pieces in texts for text in pieces]))
        end = np.array([self.tokenizer.end], dtype=np.uint32)
        parts: list[Ids] = []
        lengths = np.zeros(len(texts), dtype=np.int32)
        for i, document in enumerate(texts):
            made = [next(ids) for _ in document]
            parts += [*made, end]
            lengths[i] = sum(map(len, made)) + 1
        tokens = (
            np.concatenate(parts, dtype=index_parts.type_of(self.tokenizer.vocab), casting="unsafe")
            if parts
            else np.zeros(0, np.uint16)
        )
        return Block(
            tokens,
            lengths,
            documents.rejects,
            documents.num_rows,
            documents.num_empty,
            documents.num_special,
        )

    def documents(self, piece: Piece) -> Documents:
        return Documents(
            piece.read(),
            self.options.text_key,
            self.tokenizer.spelling,
            self.options.special_tokens,
        )


def index(
    inputs: Iterable[str | Path],
    tokenizer: Path,
    out: str | Path,
    options: Options = Options(),
    *,
    report: Report | None = None,
    say: Callable[[str], None] | None = None,
) -> IndexStats:
    """Tokenise documents into `out`.bin and `out`.idx, each ended by the end-of-document token.

    A document is a text file or the text of a record; empty ones are counted and skipped. Records
    that are none go to `out`.rejected.jsonl, and, unless `special_tokens` says otherwise, documents
    with control tokens in them. The files appear only when both are complete; a build that was
    killed goes on where it was.

    Raises DataError when an input is missing, nothing is left or too much is rejected: within the
    first EARLY records before anything is written, later with the files written all the same.
    """
    inputs = list(inputs)
    sources, prefix = find_sources(inputs), prefix_of(out)
    made = text_tokenizer.read(tokenizer)
    try:
        total = total_bytes(sources)
        indexer = Indexer(made, SLOW, options)
        if total >= WORTH:
            indexer = _fastest(indexer, sources, say)
        with index_parts.parts_of(prefix, _key(sources, indexer)) as parts:
            state = _write(parts, indexer, sources, total, report)
            parts.publish_rejects(Path(f"{prefix}.rejected.jsonl"))
            first = parts.first_reject()
            if _is_early(state):
                _check(state, first, options)
            if state.num_documents == 0:
                names = ", ".join(map(str, inputs))
                raise DataError(
                    f"There is no document in {names}: each record needs {options.text_key!r}."
                )
            stats = IndexStats(
                state.num_documents,
                state.num_tokens,
                state.num_rejected,
                made.vocab,
                str(tokenizer),
                state.num_empty,
                state.num_special,
                options.special_tokens,
                indexer.engine,
            )
            note = json.dumps(asdict(stats), indent=1)
            parts.publish(prefix, index_parts.type_of(made.vocab), note)
    except OSError as error:
        raise DataError(f"{prefix} cannot be written: {error.strerror or error}.") from error
    _check(state, first, options, whole=prefix)
    return stats


def _fastest(
    slow: Indexer, sources: Sequence[Source], say: Callable[[str], None] | None
) -> Indexer:
    """With gigatoken where it gives the same tokens for all that can be tried beforehand."""
    texts: list[str] = []
    for piece in sample(sources):
        held = 0
        for document in islice(slow.documents(piece), 1000):
            texts += [text[:SAMPLED] for text in document]
            held += sum(map(len, document))
            if held >= SAMPLE:
                break
    compared = same_tokens.compared(slow.tokenizer, texts)
    if isinstance(compared, TextTokenizer):
        return Indexer(compared, FAST, slow.options)
    if say is not None:
        say(f"note: Hugging Face's tokenizers are used, some 20 times slower: {compared}")
    return slow


def _key(sources: Sequence[Source], indexer: Indexer) -> str:
    """What a build can go on from: equal inputs, as far as sizes and times tell."""
    known = [
        (str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for s in sources for f in s.files
    ]
    options = indexer.options
    return key_of([VERSION, known, asdict(indexer.tokenizer), indexer.engine, options.text_key,
                   options.special_tokens])  # fmt: skip


def _write(
    parts: Parts, indexer: Indexer, sources: Sequence[Source], total: int, report: Report | None
) -> State:
    """Tokenise what is left, block by block."""
    num_workers = 1 if total < WORTH else indexer.options.workers or num_cores()
    todo: list[Piece] = []
    if report is not None:
        report(parts.state.num_bytes, total)

    def rest() -> Iterable[Piece]:
        for piece in pieces(sources, parts.state.place):
            todo.append(piece)
            yield piece

    for block in in_order(indexer, rest(), num_workers, "--workers"):
        piece, before = todo.pop(0), parts.state
        row = before.row if before.source == piece.number else 0
        rejects = block.rejects
        if piece.is_counted:
            rejects = [Reject(r.file, r.line + row, r.reason) for r in rejects]
            row += block.num_rows
        state = replace(
            before,
            source=piece.end.source,
            offset=piece.end.offset,
            row=row if piece.end.source == piece.number else 0,
            num_documents=before.num_documents + len(block.lengths),
            num_tokens=before.num_tokens + len(block.tokens),
            num_rejected=before.num_rejected + len(rejects),
            num_empty=before.num_empty + block.num_empty,
            num_special=before.num_special + block.num_special,
            num_bytes=piece.num_bytes,
        )
        parts.add(replace(block, rejects=rejects), state)
        if report is not None:
            report(state.num_bytes, total)
        if _is_early(state) and state.num_documents + state.num_rejected >= FEWEST:
            _check(state, parts.first_reject(), indexer.options)
    return parts.state


def _is_early(state: State) -> bool:
    return state.num_documents + state.num_rejected <= EARLY


def _check(state: State, first: Reject | None, options: Options, whole: Path | None = None) -> None:
    """DataError when more than the share allowed of the records read were rejected; it says where
    the index of the others is, once that is written.
    """
    if first is None:
        return
    num_records = state.num_documents + state.num_rejected
    try:
        check_share(state.num_rejected, first, num_records, options.max_rejected, "--max-rejected")
    except DataError as error:
        if whole is None:
            raise
        raise DataError(
            f"{error} The index of the other {state.num_documents} documents is whole, in {whole}."
        ) from None
