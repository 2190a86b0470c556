"""Control tokens in the text of records: `<|im_end|>` among a user's words would end the turn there
and let the rest speak for whomever it likes.

Text in which one is to be spelled has a JOINT behind its first character while it goes through the
chat template. Where a joint comes out, the text is cut for the tokenizer, which then sees no token
but its letters; the joints themselves are taken out again.
"""

import re
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

from moetrain.data.formats import Conversation
from moetrain.data.messages import FormatError, Message, shown
from moetrain.data.template import THINK, Template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

How = Literal["keep", "escape", "reject"]
FEW = 8  # beginnings of control tokens that are looked for one by one
JOINT = "\U0010fffd"  # for nobody's use but ours; texts that hold it are refused
_WRITTEN_OUT = re.compile(r"\\u[dD][bB][fF][fF]\\u[dD][fF][fF][dD]")
KEPT = "control tokens in a text are taken as control tokens (data.special_tokens_in_text is keep)"
SPELLED = "control tokens in a text are spelled in letters (data.special_tokens_in_text is escape)"


class Controls:
    """What is done about the control tokens in a record's own text.

    They are the tokenizer's special tokens and what the template writes around turns.
    """

    def __init__(
        self, tokenizer: "PreTrainedTokenizerFast", template: Template, how: How = "reject"
    ) -> None:
        self.how = how
        self._tokens = {token.content for token in tokenizer.added_tokens_decoder.values()}
        self._pattern = _any_of(_special_tokens(tokenizer) | template.turn_marks)
        self._spells = how != "escape" or _spells(tokenizer)

    def guarded(self, conversation: Conversation) -> tuple[Conversation, tuple[str, ...]]:
        """The conversation as it goes to the template, and a note where that is worth one. What is
        templated already is taken as it is. FormatError where it is refused.
        """
        if conversation.rendered is not None:
            return conversation, ()
        messages, kwargs, notes = self.guard(conversation.messages, conversation.template_kwargs)
        return replace(conversation, messages=messages, template_kwargs=kwargs), notes

    def guard(
        self, messages: list[Message], kwargs: Mapping[str, Any]
    ) -> tuple[list[Message], dict[str, Any], tuple[str, ...]]:
        """The same of a conversation's parts."""
        done: list[str] = []
        made: list[Message] = []
        for i, message in enumerate(messages):
            where = f"the {message['role']} turn {i}"
            made.append(
                {
                    key: value if key == "role" else self._treated(value, where, done)
                    for key, value in message.items()
                }
            )
        given = {
            key: self._treated(value, "tools" if key == "tools" else f"the template's {key}", done)
            for key, value in kwargs.items()
        }
        notes = (KEPT if self.how == "keep" else SPELLED,) if done else ()
        return made, given, notes

    def _treated(self, value: Any, where: str, done: list[str]) -> Any:
        def treat(text: str) -> str:
            if JOINT in text:
                raise FormatError(f"{where} holds {shown(JOINT)}, which stands for no character")
            first = self._pattern.search(text)
            if first is None:
                return text
            done.append(first[0])
            if self.how == "keep":
                return text
            return self._pattern.sub(lambda match: self._spelled(match[0], where), text)

        return _each_text(value, treat)

    def _spelled(self, token: str, where: str) -> str:
        if self.how == "escape" and self._spells and token in self._tokens:
            return f"{token[0]}{JOINT}{token[1:]}"
        why = ""
        if self.how == "escape":
            why = " that the tokenizer cannot spell otherwise"
        raise FormatError(
            f"{where} has {shown(token)} in its text, a control token or a mark of the chat"
            f' template{why}: give texts that are not templated, or "templated": true beside prompt'
            " and completion that are to be taken as they are, or set data.special_tokens_in_text"
        )


class Spelling:
    """Finds a tokenizer's control tokens in texts that no template is put around, and cuts them so
    that they are spelled in letters.
    """

    def __init__(self, tokens: Iterable[str], possible: bool) -> None:
        self.tokens, self.possible = tuple(sorted(tokens)), possible
        self._pattern = _any_of(set(self.tokens))
        # Finding a text in a text is several times as fast as a pattern with alternatives.
        self._starts = {token[:2] for token in self.tokens}

    @classmethod
    def of(cls, tokenizer: "PreTrainedTokenizerFast") -> "Spelling":
        """That of a tokenizer."""
        return cls(_special_tokens(tokenizer), _spells(tokenizer))

    def first(self, text: str) -> str | None:
        """The first control token of a text."""
        if len(self._starts) <= FEW and not any(start in text for start in self._starts):
            return None
        match = self._pattern.search(text)
        return None if match is None else match[0]

    def pieces(self, text: str) -> list[str]:
        """The text cut behind the first character of each control token."""
        cuts = [0, *(match.start() + 1 for match in self._pattern.finditer(text)), len(text)]
        return [text[a:b] for a, b in pairwise(cuts) if a < b]


def _special_tokens(tokenizer: "PreTrainedTokenizerFast") -> set[str]:
    """Without those of thoughts, which belong in texts."""
    added = tokenizer.added_tokens_decoder.values()
    special = {token.content for token in added if token.special and token.content.strip()}
    return {token for token in special if not THINK.search(token)}


def _any_of(texts: set[str]) -> re.Pattern[str]:
    """Grouped by how they begin: most of what begins with `<` is HTML and none of hundreds of
    reserved tokens, which would be tried one by one.
    """
    longest = sorted(texts, key=len, reverse=True)  # one token may begin with another
    groups: dict[str, list[str]] = {}
    for text in longest:
        groups.setdefault(text[:2], []).append(re.escape(text[2:]))
    # One that is a character long comes last, behind all that begin with it.
    starts = sorted(groups, key=len, reverse=True)
    parts = [f"{re.escape(start)}(?:{'|'.join(groups[start])})" for start in starts]
    return re.compile("|".join(parts) or r"(?!)")


@dataclass(frozen=True)
class Cut:
    """A text without its joints, and where they stood."""

    text: str
    at: tuple[int, ...]

    def moved(self, place: int) -> int:
        """Where a place of the text with joints is in the one without."""
        return place - bisect_left(self._joints, place)

    @cached_property
    def _joints(self) -> list[int]:
        """Where they stood in the text with them; once for the thousand turns of a conversation."""
        return [cut + i for i, cut in enumerate(self.at)]

    def parts(self, *edges: int) -> list[str]:
        """The text in pieces, cut at its joints and at `edges`."""
        cuts = sorted({0, *self.at, *edges, len(self.text)})
        return [self.text[a:b] for a, b in pairwise(cuts)]


def cut(text: str) -> Cut:
    """Take the joints out. FormatError where the template has written one as something else."""
    if _WRITTEN_OUT.search(text):
        raise FormatError(
            "the chat template writes texts in a code of its own, so that a control token in them"
            " cannot be spelled: set data.special_tokens_in_text to reject or keep"
        )
    if JOINT not in text:
        return Cut(text, ())
    pieces = text.split(JOINT)
    at, place = list[int](), 0
    for piece in pieces[:-1]:
        place += len(piece)
        at.append(place)
    return Cut("".join(pieces), tuple(at))


def _each_text(value: Any, treat: Callable[[str], str]) -> Any:
    """A value with every text in it treated, keys of objects too."""
    if isinstance(value, str):
        return treat(value)
    if isinstance(value, Mapping):
        return {_each_text(key, treat): _each_text(item, treat) for key, item in value.items()}
    if isinstance(value, list):
        return [_each_text(item, treat) for item in value]
    return value


def _spells(tokenizer: "PreTrainedTokenizerFast") -> bool:
    """Whether pieces that are tokenised apart read the same as the whole: some tokenizers put a
    blank before each.
    """
    pieces = ["a <", "|b|> c"]
    ids = tokenizer(pieces, add_special_tokens=False, verbose=False)["input_ids"]
    joined = [token for piece in ids for token in piece]
    return tokenizer.decode(joined) == "".join(pieces)
