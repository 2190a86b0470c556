"""The documents of a corpus: made of records and text files, with what is done about control tokens
in them.
"""

from collections.abc import Iterable, Iterator

from moetrain.data.controls import How, Spelling
from moetrain.data.messages import FormatError
from moetrain.data.rejects import NOTHING_THERE, Reject
from moetrain.data.sources import Record


class Documents:
    """The texts of some records in order, each in the pieces that are tokenised one by one.

    What is not a document is collected in `rejects` while they are read.
    """

    def __init__(
        self,
        rows: Iterable[Record | Reject],
        text_key: str,
        spelling: Spelling,
        special_tokens: How = "reject",
    ) -> None:
        self.text_key = text_key
        self.rejects: list[Reject] = []
        self.num_rows = self.num_empty = 0
        self.num_special = 0  # documents with control tokens that are kept or spelled
        self._rows, self._how, self._spelling = rows, special_tokens, spelling

    def __iter__(self) -> Iterator[list[str]]:
        for row in self._rows:
            self.num_rows += 1
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
        return text is None or (isinstance(text, str) and (not text or text.isspace()))
