"""`moetrain data show`: what the model will see and learn, record by record, without the model."""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from moetrain.config.recipe import Recipe
from moetrain.data import assets, packing
from moetrain.data.cache import cache_root
from moetrain.data.chat import Chat, ChatOptions, Encoded, Marked
from moetrain.data.demonstrations import demonstration_recipe
from moetrain.data.encode import Encoder, Result, Spec
from moetrain.data.loader import kind_of
from moetrain.data.messages import FormatError
from moetrain.data.prompts import read_prompt
from moetrain.data.rejects import Reject
from moetrain.data.run_tokenizer import chat_of, model_vocab, tokenizer_of
from moetrain.data.selection import Selection, rows_of
from moetrain.data.sources import Record
from moetrain.errors import DataError

CHUNK = 64
ANSWERS = ("chosen", "rejected")


@dataclass(frozen=True)
class Shown:
    """One text of a record: `learned` are spans of its characters; or why there is none."""

    file: str
    line: int
    text: str = ""
    learned: tuple[tuple[int, int], ...] = ()
    tokens: int = 0
    learned_tokens: int = 0
    answer: str | None = None  # of a pair
    truncated: bool = False
    notes: tuple[str, ...] = ()
    reason: str | None = None

    def to_json(self) -> dict[str, Any]:
        """As one line of `--json`."""
        where: dict[str, Any] = {"file": self.file, "line": self.line}
        if self.reason is not None:
            return where | {"rejected": self.reason}
        more: dict[str, Any] = {"answer": self.answer} if self.answer else {}
        more |= {"truncated": True} if self.truncated else {}
        more |= {"notes": list(self.notes)} if self.notes else {}
        return where | {
            "text": self.text,
            "learned": [list(span) for span in self.learned],
            "learned_text": [self.text[start:end] for start, end in self.learned],
            "tokens": self.tokens,
            "learned_tokens": self.learned_tokens,
            **more,
        }


class View:
    """The records of a recipe as a run would read them, in the order of the data; `demonstrations`:
    those of data.demonstrations, in place of the prompts.

    Raises DataError: no data, no tokenizer, no template, a corpus.
    """

    def __init__(
        self, recipe: Recipe, *, held_out: bool = False, demonstrations: bool = False
    ) -> None:
        if demonstrations:
            demonstrated = demonstration_recipe(recipe)
            if demonstrated is None:
                raise DataError(
                    f"method {recipe.method.name} learns from no demonstrations (chord does): leave"
                    " --demonstrations out."
                )
            recipe = demonstrated
        self.recipe, self.held_out = recipe, held_out
        self.learns_from = recipe.method.learns_from
        if self.learns_from == "corpus":
            raise DataError(
                f"method {recipe.method.name} reads an indexed corpus, all of which is learned:"
                " data show is for methods that read records."
            )
        self.chat: Chat = chat_of(recipe)
        self.notes: Counter[str] = Counter()
        self.sizes: list[int] = []  # tokens of groups, for packs

    def rows(self, start: int, stop: int | None) -> Iterator[Record | Reject]:
        """Numbers [start, stop) of the records."""
        recipe, held_out = self.recipe, self.held_out
        given = recipe.data.eval if held_out else recipe.data.train
        selection = Selection.of(recipe)
        if held_out and not given and selection is not None and selection.share:
            given, selection, held_out = recipe.data.train, selection.other(), False
        elif held_out:
            selection = None
        if not given:
            raise DataError("data.eval is empty: there is nothing to show.")
        root = cache_root(recipe.data.cache)
        inputs = [str(assets.resolve(path, root)) for path in given]
        return islice(rows_of(inputs, selection, held_out=held_out), start, stop)

    def show(self, rows: Iterable[Record | Reject]) -> Iterator[Shown]:
        """What becomes of records."""
        if self.learns_from == "prompts":
            yield from (shown for row in rows for shown in [self._prompt(row)])
            return
        encoder = Encoder(kind_of(self.recipe.method), self.spec(), keep_texts=True)
        rows = iter(rows)
        while chunk := list(islice(rows, CHUNK)):
            for result in encoder(chunk):
                yield from self._result(result)

    def fill(self) -> tuple[int, float]:
        """(number of packs, share of them that is full) of the sequences shown so far."""
        data = self.recipe.data
        if not self.sizes:
            return 0, 0.0
        packs = [[i] for i in range(len(self.sizes))]
        if data.pack:
            packs = packing.pack(self.sizes, data.seq_len, self.recipe.seed)
        return len(packs), packing.fill(self.sizes, packs, data.seq_len)

    def spec(self) -> Spec:
        """All that decides what a record becomes."""
        data = self.recipe.data
        return Spec(
            inputs=(),
            tokenizer=tokenizer_of(self.recipe),
            seq_len=data.seq_len,
            too_long=data.too_long,
            seed=self.recipe.seed,
            share_prompt=data.share_prompt,
            chat=ChatOptions.of(data),
            model_vocab=model_vocab(self.recipe),
        )

    def _prompt(self, row: Record | Reject) -> Shown:
        if isinstance(row, Reject):
            return Shown(row.file, row.line, reason=row.reason)
        room = self.recipe.data.seq_len - self.recipe.sampling[1].max_tokens
        try:
            prompt, notes = read_prompt(row.value, self.chat, room)
        except FormatError as error:
            return Shown(row.file, row.line, reason=str(error))
        self.notes.update(notes)
        text = str(self.chat.tokenizer.decode(list(prompt.tokens), skip_special_tokens=False))
        return Shown(row.file, row.line, text, tokens=len(prompt.tokens), notes=notes)

    def _result(self, result: Result) -> Iterator[Shown]:
        if result.reason is not None:
            yield Shown(result.file, result.line, reason=result.reason)
            return
        self.notes.update(result.notes)
        self.sizes += [group.num_tokens for group in result.groups]
        sequences = [sequence for group in result.groups for sequence in group.sequences]
        texts = [marked for one in result.texts for marked in one]
        truncated = any(group.truncated for group in result.groups)
        pairs = self.learns_from == "pairs"
        for number, sequence in enumerate(sequences):
            marked, whole = self._text_of(sequence, texts)
            yield self._shown(
                result,
                marked,
                sequence,
                truncated and len(sequence.tokens) < whole,
                ANSWERS[number % 2] if pairs else None,
            )

    def _text_of(self, sequence: Encoded, texts: list[Marked]) -> tuple[Marked, int]:
        """(the text that a sequence was made from, the tokens of what of it is wanted)."""
        while True:
            marked = texts.pop(0)
            (whole,) = self.chat.encode([marked])
            size = len(sequence.tokens)
            if size <= len(whole.tokens) and (whole.tokens[:size] == sequence.tokens).all():
                return marked, int(whole.mask.nonzero()[0][-1]) + 1

    def _shown(
        self, result: Result, marked: Marked, sequence: Encoded, truncated: bool, answer: str | None
    ) -> Shown:
        text = marked.text
        if truncated:
            text = str(self.chat.tokenizer.decode(sequence.tokens, skip_special_tokens=False))
        elif self.learns_from != "chat":  # of a pair, what follows the answer is left out
            text = text[: marked.spans[-1][1]]
        spans = ((start, min(end, len(text))) for start, end in marked.spans)
        return Shown(
            result.file,
            result.line,
            text,
            tuple(span for span in spans if span[1] > span[0]),
            tokens=len(sequence.tokens),
            learned_tokens=int(sequence.mask[1:].sum()),
            answer=answer,
            truncated=truncated,
            notes=result.notes,
        )
