"""The documents of a corpus: read from records and text files, with what is done about control
tokens in them.
"""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moetrain.data.controls import How, Spelling
from moetrain.data.messages import FormatError
from moetrain.data.rejects import NOTHING_THERE, Reject, check_rejects
from moetrain.data.sources import Record, find_sources, read_rows
from moetrain.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class Documents:
    """The texts of all records in order, each in the pieces that are tokenised one by one.

    What is not a document is collected in `rejects` while they are read.
    """

    def __init__(
        self,
        inputs: Iterable[str | Path],
        text_key: str,
        tokenizer: "PreTrainedTokenizerFast",
        special_tokens: How = "reject",
    ) -> None:
        self.sources, self.text_key = find_sources(inputs), text_key
        self.rejects: list[Reject] = []
        self.num_empty = 0
        self.num_special = 0  # documents with control tokens that are kept or spelled
        self._how: How = special_tokens
        self._spelling = Spelling(tokenizer)

    def __iter__(self) -> Iterator[list[str]]:
        for row in (row for source in self.sources for row in read_rows(source)):
            if isinstance(row, Reject) and row.reason not in NOTHING_THERE:
                self.rejects.append(row)
            elif isinstance(row, Reject) or self._is_empty(row):
                self.num_empty += 1
            elif isinstance(text := row.value.get(self.text_key), str):
                try:
                    yield self._pieces(text)
                except FormatError as error:
                    self.rejects.append(Reject(row.file, row.line, str(error)))
            else:
                keys = sorted(map(str, row.value))
                reason = f"no text under {self.text_key!r}; the keys are {keys}"
                self.rejects.append(Reject(row.file, row.line, reason))

    def check_rejects(self, num_documents: int, most: float, whole: Path | None = None) -> None:
        """DataError when more than the share `most` of the records read were rejected; it says
        where the index of the others is, once that is written.
        """
        num_records = num_documents + len(self.rejects)
        try:
            check_rejects(self.rejects, num_records, most, "--max-rejected")
        except DataError as error:
            if whole is None:
                raise
            raise DataError(
                f"{error} The index of the other {num_documents} documents is whole, in {whole}."
            ) from None

    def _pieces(self, text: str) -> list[str]:
        """The text whole, or cut where a control token is to be spelled in letters."""
        token = self._spelling.first(text)
        if token is None:
            return [text]
        if self._how == "reject" or (self._how == "escape" and not self._spelling.possible):
            why = " that the tokenizer cannot spell" if self._how == "escape" else ""
            raise FormatError(
                f"the document has {token!r} in its text, a control token{why}: set"
                " --special-tokens"
            )
        self.num_special += 1
        return [text] if self._how == "keep" else self._spelling.pieces(text)

    def _is_empty(self, row: Record) -> bool:
        if self.text_key not in row.value:
            return self.text_key in row.nulls
        text = row.value[self.text_key]
        return text is None or (isinstance(text, str) and not text.strip())


def tokenise(
    tokenizer: "PreTrainedTokenizerFast", documents: Sequence[Sequence[str]]
) -> Iterator[list[int]]:
    """The token ids of each document; all pieces go to the tokenizer in one batch."""
    pieces = [piece for document in documents for piece in document]
    how: dict[str, Any] = dict(add_special_tokens=False, return_attention_mask=False, verbose=False)
    # transformers 5.19 raises IndexError for a batch of no texts.
    ids = iter(tokenizer(pieces, **how)["input_ids"] if pieces else [])
    for document in documents:
        yield [token for _ in document for token in next(ids)]
