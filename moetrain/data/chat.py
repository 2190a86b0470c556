"""A conversation becomes text with marked spans, then tokens with a loss mask.

Only what the assistant said is learned: each trained turn from where it begins up to and with its
end-of-turn token. What a turn says is found in the text, or the record is refused; what the
template drops by design is noted.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from moetrain.data import byte_spans
from moetrain.data import tokenizer as tokenizers
from moetrain.data.byte_spans import ByteSpans
from moetrain.data.contract import TrainedTurn, appears_in
from moetrain.data.controls import Controls, How, cut
from moetrain.data.formats import Conversation, name_of
from moetrain.data.messages import FormatError, Message, shown, split_thought
from moetrain.data.template import Span, Template, template_text
from moetrain.errors import DataError

MANY = 1 << 21  # characters, from which on a faster tokenizer is worth a second of comparing
LONG_TOKEN = 100  # characters; of a vocabulary without a longer one

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from moetrain.config.data import DataConfig


@dataclass(frozen=True)
class Marked:
    """A rendered text, the character spans in it that the assistant said, and notes on what of the
    record is not in it.
    """

    text: str
    spans: tuple[Span, ...]
    notes: tuple[str, ...] = ()
    cuts: tuple[int, ...] = ()  # where the tokenizer must not see what stands on both sides as one

    @property
    def learned(self) -> tuple[str, ...]:
        """The text of each span."""
        return tuple(self.text[start:end] for start, end in self.spans)


@dataclass(frozen=True)
class Encoded:
    """tokens [t] int32 and, aligned with them, mask [t] bool.

    This token is one to learn to produce.
    """

    tokens: NDArray[np.int32]
    mask: NDArray[np.bool_]


@dataclass(frozen=True)
class ChatOptions:
    """What a recipe says of how conversations are rendered."""

    template: str | None = None  # in place of the tokenizer's
    kwargs: Mapping[str, Any] = field(default_factory=dict[str, Any])  # of the template
    system: str | None = None  # the message that opens a conversation without one
    empty_thoughts: bool = True  # learned where the template writes them
    special_tokens: How = "reject"  # in texts of records

    @classmethod
    def of(cls, data: "DataConfig") -> "ChatOptions":
        """What a recipe's `data` section says, a template's file read."""
        return cls(
            template_text(data.chat_template),
            data.chat_template_kwargs,
            data.system,
            data.empty_thoughts,
            data.special_tokens_in_text,
        )

    def open(self, folder: Path) -> "Chat":
        """The chat of the tokenizer in `folder`. DataError where it has no template."""
        return Chat(
            tokenizers.load(folder),
            self.template,
            kwargs=self.kwargs,
            system=self.system,
            empty_thoughts=self.empty_thoughts,
            special_tokens=self.special_tokens,
        )


class Chat:
    """A tokenizer and its chat template (or one given as text, or as a file's path)."""

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerFast",
        template: str | None = None,
        *,
        kwargs: Mapping[str, Any] | None = None,
        system: str | None = None,
        empty_thoughts: bool = True,
        special_tokens: How = "reject",
    ) -> None:
        self.tokenizer, self.system, self.empty_thoughts = tokenizer, system, empty_thoughts
        text = template_text(template) or tokenizer.chat_template
        if isinstance(text, dict):
            text = text.get("default")
        if not text:
            raise DataError(
                f"The tokenizer {tokenizer.name_or_path} has no chat template: set"
                " data.chat_template."
            )
        specials = {k: v for k, v in tokenizer.special_tokens_map.items() if isinstance(v, str)}
        added = (token.content for token in tokenizer.added_tokens_decoder.values())
        self.template = Template(text, specials, added, kwargs)
        self._special_tokens: How = special_tokens
        self._num_chars = 0  # that were tokenised, or will be
        self._spans: ByteSpans | None = None

    @cached_property
    def controls(self) -> Controls:
        """What is done about control tokens in the text of records."""
        return Controls(self.tokenizer, self.template, self._special_tokens)

    @cached_property
    def own_words(self) -> Controls:
        """The same of what the model said: no reason to refuse it."""
        how = "keep" if self._special_tokens == "keep" else "escape"
        return Controls(self.tokenizer, self.template, how)

    @cached_property
    def _longest(self) -> int:
        """Characters of the longest token."""
        return max(LONG_TOKEN, *map(len, self.tokenizer.get_vocab()))

    def refuse_long(self, num_tokens: int, *values: Any) -> None:
        """FormatError for what is far over what `num_tokens` can hold, which would take the
        tokenizer minutes and gigabytes to find out.
        """
        num_chars, most = sum(map(_num_chars, values)), num_tokens * self._longest
        if num_chars > most:
            raise FormatError(
                f"{num_chars:,} characters are far over what there is room for: {num_tokens} tokens"
                f" have at most {most:,}"
            )

    def _with_system(self, messages: list[Message]) -> list[Message]:
        """The messages after the recipe's system message, where they have none."""
        if self.system is None or (messages and messages[0]["role"] in ("system", "developer")):
            return messages
        return [{"role": "system", "content": self.system}, *messages]

    def notes(self) -> list[str]:
        """What a user should know of this template before training with it."""
        ends, notes = self.template.ends, list[str]()
        vocab = self.tokenizer.get_vocab()
        if ends.text is not None:
            notes.append(
                f"the chat template ends a turn with {shown(ends.text)}, which is not one token of"
                " this tokenizer: nothing can stop at it; add it to the tokenizer, or set"
                " data.chat_template"
            )
        elif not ends.tokens:
            stops = " or ".join(token for token in ends.next_role if token in vocab)
            notes.append(
                "the chat template ends an assistant's turn with no token, so no end is learned:"
                f" what stops an answer is {stops or 'the limit of its length'}"
            )
        if self.template.reads.reasoning is None and not self.template.reads.inline:
            notes.append(
                "the chat template strips <think>…</think> of every turn: it is not learned"
            )
        return notes

    def prompt(self, messages: list[Message], /, **kwargs: Any) -> str:
        """The text that asks for the next turn, for `ids`. FormatError where it lacks what the
        record says.
        """
        messages, kwargs, _ = self.controls.guard(messages, kwargs)
        text = self.template.text_of(self.spoken(messages), add_generation_prompt=True, **kwargs)
        self._asked(messages, text)
        return text

    def spoken(self, messages: list[Message]) -> list[Message]:
        """Messages that `controls` has guarded, as the template takes them."""
        return [self._spoken(message) for message in self._with_system(messages)]

    def prompt_notes(self, messages: list[Message], text: str, /, **kwargs: Any) -> tuple[str, ...]:
        """What of a prompt the template does not render."""
        messages, kwargs, notes = self.controls.guard(messages, kwargs)
        return notes + self._context_notes(self._with_system(messages), text, kwargs)

    def ids(self, text: str) -> list[int]:
        """The tokens of a text that `prompt` made."""
        pieces = cut(text).parts()
        ids = self.tokenizer(pieces, add_special_tokens=False, verbose=False)["input_ids"]
        return [token for piece in ids for token in piece]

    def mark(self, conversation: Conversation) -> list[Marked]:
        """Render a conversation: several texts when the template rewrites earlier turns.

        Each text is a prefix of the conversation as the model would have seen it when it said the
        last of the text's assistant turns; a turn is marked in exactly one of them. FormatError
        when the template refuses, reorders, or changes what a trained turn says.
        """
        if conversation.rendered is not None:
            context, answer = conversation.rendered
            return [Marked(context + answer, ((len(context), len(context + answer)),))]
        messages = self._with_system(conversation.messages)
        shift = len(messages) - len(conversation.messages)
        trained = [False] * shift + conversation.trained
        kwargs = conversation.template_kwargs
        spoken = [self._spoken(message) for message in messages]
        done: list[Marked] = []
        current = Marked("", ())
        for turn, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            text, marks = self.template.render(spoken[: turn + 1], **kwargs)
            spans: tuple[Span, ...] = ()
            notes: list[str] = []
            if trained[turn]:
                whole = self._unthought(message)
                trained_turn = TrainedTurn(
                    self.template, spoken[:turn], whole, (text, marks), kwargs
                )
                spans = trained_turn.spans(turn - shift, self.empty_thoughts)
                text, notes = trained_turn.text, trained_turn.notes
            if not text.startswith(current.text):
                done.append(current)
                current = Marked("", ())
            more = tuple(note for note in notes if note not in current.notes)
            current = Marked(text, current.spans + spans, current.notes + more)
        done.append(current)
        learned = [marked for marked in done if marked.spans]
        if learned:
            last = learned[-1]
            learned[-1] = replace(
                last, notes=last.notes + self._context_notes(messages, last.text, kwargs)
            )
        return [_without_joints(marked) for marked in learned]

    def _spoken(self, message: Message) -> Message:
        return self.template.speaks(self._unthought(message))

    def _unthought(self, message: Message) -> Message:
        """A thought in the content moved to where this template looks for one."""
        reads = self.template.reads
        if message["role"] != "assistant" or (reads.reasoning is None and reads.inline):
            return message
        thought, answer = split_thought(message["content"] or "")
        if thought is None or message.get("reasoning_content"):
            return message
        moved = {"reasoning_content": thought} if thought.strip() else {}
        return message | {"content": answer} | moved

    def _asked(self, messages: Sequence[Message], text: str) -> None:
        """FormatError where a user's words are not in the text."""
        for i, message in enumerate(messages):
            line = (message["content"] or "").strip()
            if message["role"] == "user" and line not in text:
                raise FormatError(f"the chat template does not render the user turn {i} as it is")

    def _context_notes(
        self, messages: Sequence[Message], text: str, kwargs: Mapping[str, Any]
    ) -> tuple[str, ...]:
        notes: list[str] = []
        systems = [m["content"] for m in messages if m["role"] in ("system", "developer")]
        if any(message.strip() not in text for message in systems):
            notes.append("the chat template does not render the system message")
        offered = kwargs.get("tools")
        names = [name_of(tool) for tool in offered] if isinstance(offered, list) else []
        names = [name for name in names if isinstance(name, str)]
        # A call's name stands in the text also where the tool does not.
        if names and not (self.template.reads.tools and all(name in text for name in names)):
            notes.append("the chat template does not render the tools on offer")
        results = [m["content"] for m in messages if m["role"] == "tool"]
        if not all(appears_in((message or "").strip(), text) for message in results):
            notes.append("the chat template does not render the tools' results")
        return tuple(notes)

    def encode(self, marked: list[Marked]) -> list[Encoded]:
        """Tokenise texts together (in parallel threads inside `tokenizers`).

        A token counts when it begins in a span.
        """
        if not marked:
            return []
        if (spans := self._byte_spans(marked)) is not None:
            return self._quickly(marked, spans)
        return self._slowly(marked)

    def _slowly(self, marked: list[Marked]) -> list[Encoded]:
        batch = self._tokens([m.text for m in marked])
        encoded: list[Encoded] = []
        for text, ids, offsets in zip(
            marked, batch["input_ids"], batch["offset_mapping"], strict=True
        ):
            encoding = _masked(ids, offsets, text.spans)
            if text.cuts or _straddles(offsets, text.spans):
                encoding = self._apart(text) or encoding
            encoded.append(encoding)
        return encoded

    def _byte_spans(self, marked: list[Marked]) -> ByteSpans | None:
        """What is faster than the tokenizer, once there is text enough to be worth comparing."""
        if self._num_chars < MANY:
            self.expect(sum(len(m.text) for m in marked))
        return self._spans

    def expect(self, num_chars: int) -> None:
        """That many characters are to be tokenised, more than those before."""
        is_new, self._num_chars = self._num_chars < MANY, self._num_chars + num_chars
        if is_new and self._num_chars >= MANY:
            self._spans = byte_spans.of(self.tokenizer)

    def _quickly(self, marked: list[Marked], spans: ByteSpans) -> list[Encoded]:
        """The same as by `encode`'s slower way."""
        encoded: list[Encoded] = []
        for text, ids in zip(marked, spans.ids([m.text for m in marked]), strict=True):
            masked = spans.mask(text.text, ids, text.spans)
            if masked is None:
                (encoding,) = self._slowly([text])
            else:
                encoding = Encoded(ids.astype(np.int32), masked[0])
                if text.cuts or masked[1]:
                    encoding = self._apart(text) or encoding
            encoded.append(encoding)
        return encoded

    def _tokens(self, texts: list[str]) -> Any:
        return self.tokenizer(
            texts,
            add_special_tokens=False,  # the template writes them
            return_offsets_mapping=True,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )

    def _apart(self, marked: Marked) -> Encoded | None:
        """What is learned tokenised by itself, as it is when an answer follows a prompt. None for
        tokenizers that put something in front of every text.
        """
        edges = (edge for span in marked.spans for edge in span)
        cuts = sorted({0, *edges, *marked.cuts, len(marked.text)})
        parts = [marked.text[a:b] for a, b in pairwise(cuts)]
        if self._spans is not None:
            ids = [part.tolist() for part in self._spans.ids(parts)]
        else:
            ids = self._tokens(parts)["input_ids"]
        joined = [token for part in ids for token in part]
        if not marked.cuts and self.tokenizer.decode(joined) != marked.text:
            return None
        learned = [any(a <= cut < b for a, b in marked.spans) for cut in cuts]
        mask = [is_learned for is_learned, part in zip(learned, ids, strict=False) for _ in part]
        return Encoded(np.array(joined, dtype=np.int32), np.array(mask, dtype=np.bool_))


def _without_joints(marked: Marked) -> Marked:
    whole = cut(marked.text)
    spans = tuple((whole.moved(start), whole.moved(end)) for start, end in marked.spans)
    return replace(marked, text=whole.text, spans=spans, cuts=whole.at)


def _num_chars(value: Any) -> int:
    """Of all texts in a value."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, Mapping):
        return sum(len(str(key)) + _num_chars(item) for key, item in value.items())
    return sum(map(_num_chars, value)) if isinstance(value, list) else 0


def _masked(ids: list[int], offsets: list[Span], spans: Sequence[Span]) -> Encoded:
    starts = np.array([start for start, _ in offsets], dtype=np.int64)
    mask = np.zeros(len(ids), dtype=np.bool_)
    for start, end in spans:
        mask |= (starts >= start) & (starts < end)
    return Encoded(np.array(ids, dtype=np.int32), mask)


def _straddles(offsets: list[Span], spans: Sequence[Span]) -> bool:
    """Whether a token lies on both sides of an edge of a span."""
    edges = np.array([edge for span in spans for edge in span], dtype=np.int64)
    pairs = np.array(offsets, dtype=np.int64).reshape(-1, 2)
    at = np.searchsorted(pairs[:, 1], edges, side="right")  # the first token that ends past an edge
    inside = at < len(pairs)
    return bool((pairs[at[inside], 0] < edges[inside]).any())
