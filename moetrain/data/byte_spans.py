"""Tokens of texts and where they lie, by gigatoken, which gives ids alone: where a tokenizer is
byte-level the bytes of its tokens are those of the text, so that their lengths are the places.
"""

import contextlib
from collections.abc import Sequence
from itertools import islice, pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from moetrain.data import same_tokens, text_tokenizer
from moetrain.data.text_tokenizer import Fast, Ids, TextTokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Span = tuple[int, int]
Places = NDArray[np.int64]
CHECKED = 300  # texts, of which the places are compared
SAME = "the same places"


class ByteSpans:
    """Ids of texts, and which of them lie in spans of characters."""

    def __init__(self, engine: Fast) -> None:
        self._engine = engine
        self._lengths = engine.token_lengths()

    def ids(self, texts: Sequence[str]) -> list[Ids]:
        return self._engine(texts)

    def ends(self, text: str, ids: Ids) -> Places | None:
        """[t] where each token ends, in bytes; None where their bytes are not the text's."""
        ends = np.cumsum(self._lengths[ids], dtype=np.int64)
        raw = text.encode()
        size = int(ends[-1]) if len(ends) else 0
        return ends if size == len(raw) and self._engine.decode(ids) == raw else None

    def mask(
        self, text: str, ids: Ids, spans: Sequence[Span]
    ) -> tuple[NDArray[np.bool_], bool] | None:
        """(which tokens begin in a span, whether one lies on both sides of an edge of a span)."""
        ends = self.ends(text, ids)
        if ends is None:
            return None
        starts = ends - self._lengths[ids]
        edges = np.array([edge for span in spans for edge in span], dtype=np.int64)
        if not text.isascii():
            edges = in_bytes(text, edges)
        mask = np.zeros(len(ids), dtype=np.bool_)
        first = np.searchsorted(starts, edges, side="left")
        for low, high in first.reshape(-1, 2):
            mask[low:high] = True
        at = np.searchsorted(ends, edges, side="right")  # the first token that ends past an edge
        inside = at < len(ids)
        return mask, bool((starts[at[inside]] < edges[inside]).any())


def in_bytes(text: str, places: Places) -> Places:
    """Where characters begin in the text's UTF-8."""
    known, size = {0: 0}, 0
    for a, b in pairwise(sorted({0, *places.tolist()})):
        size += len(text[a:b].encode())
        known[b] = size
    return np.array([known[place] for place in places.tolist()], dtype=np.int64)


def of(tokenizer: "PreTrainedTokenizerFast") -> ByteSpans | None:
    """None where gigatoken does not give the ids and the places that the tokenizer gives."""
    read = same_tokens.compared(text_tokenizer.of(tokenizer))
    if isinstance(read, str):
        return None
    made = ByteSpans(Fast(read))
    known = same_tokens.verdict(read, "places", CHECKED)
    with contextlib.suppress(OSError):
        return made if known.read_text(encoding="utf-8") == SAME else None
    same = _same_places(tokenizer, read, made)
    text_tokenizer.remember(known, SAME if same else "other places")
    return made if same else None


def _same_places(
    tokenizer: "PreTrainedTokenizerFast", read: TextTokenizer, made: ByteSpans
) -> bool:
    """Whether tokens of some texts lie where the tokenizer says."""
    for text in islice(same_tokens.special_cases(read), CHECKED):
        right: Any = tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        (ids,) = made.ids([text])
        ends = made.ends(text, ids)
        if ends is not None and not _same(text, right["offset_mapping"], ids, ends, made):
            return False
    return True


def _same(text: str, offsets: list[Span], ids: Ids, ends: Places, made: ByteSpans) -> bool:
    """Whether tokens lie where the tokenizer says. Of a character that is cut it says the whole."""
    first = [0]  # the byte at which each character begins
    for char in text:
        first.append(first[-1] + len(char.encode()))
    edges = np.array(first, dtype=np.int64)
    starts = ends - made._lengths[ids]
    pairs = np.array(offsets, dtype=np.int64).reshape(-1, 2)
    begins = np.searchsorted(edges, starts, side="right") - 1
    stops = np.searchsorted(edges, ends, side="left")
    return np.array_equal(pairs[:, 0], begins) and np.array_equal(pairs[:, 1], stops)
