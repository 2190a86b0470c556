"""A conversation becomes text with marked spans, then tokens with a loss mask.

Only what the assistant said is learned.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from moetrain.data.formats import Conversation, FormatError, Message
from moetrain.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Span = tuple[int, int]
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class Marked:
    """A rendered text and the character spans in it that the assistant said."""

    text: str
    spans: tuple[Span, ...]


@dataclass(frozen=True)
class Encoded:
    """tokens [t] int32 and, aligned with them, mask [t] bool.

    This token is one to learn to produce.
    """

    tokens: NDArray[np.int32]
    mask: NDArray[np.bool_]


class Chat:
    """A tokenizer and its chat template (or one given as text, or as a file's path)."""

    def __init__(self, tokenizer: "PreTrainedTokenizerFast", template: str | None = None) -> None:
        self.tokenizer = tokenizer
        self.template = template_text(template) or tokenizer.chat_template
        if isinstance(self.template, dict):
            self.template = self.template.get("default")
        if not self.template:
            raise DataError(
                f"The tokenizer {tokenizer.name_or_path} has no chat template: set"
                " data.chat_template."
            )
        self.has_marks = GENERATION.search(self.template) is not None
        self._specials = {
            k: v for k, v in tokenizer.special_tokens_map.items() if isinstance(v, str)
        }

    def mark(self, conversation: Conversation) -> list[Marked]:
        """Render a conversation: several texts when the template rewrites earlier turns.

        Each text is a prefix of the conversation as the model would have seen it when it said the
        last of the text's assistant turns; a turn is marked in exactly one of them. FormatError
        when the template refuses or reorders.
        """
        done: list[Marked] = []
        current = Marked("", ())
        kwargs = conversation.template_kwargs
        for turn, message in enumerate(conversation.messages):
            if message["role"] != "assistant":
                continue
            text, marks = self._render(conversation.messages[: turn + 1], **kwargs)
            if not text.startswith(current.text):
                done.append(current)
                current = Marked("", ())
            spans: tuple[Span, ...] = ()
            if conversation.trained[turn]:
                spans = self._spans(conversation.messages[:turn], text, marks, **kwargs)
            current = Marked(text, (*current.spans, *spans))
        done.append(current)
        return [marked for marked in done if marked.spans]

    def _spans(
        self, before: list[Message], text: str, marks: list[Span], **kwargs: Any
    ) -> tuple[Span, ...]:
        """What the last turn of `text` said, by the template's marks or by the text without it."""
        shared = 0
        if before:
            plain, _ = self._render(before, **kwargs)
            shared = _shared(plain, text)
            # A template may end with what it adds after the last turn only; what matters is where
            # the turn begins.
            if shared < len(plain.rstrip()) and not self.has_marks:
                raise FormatError(
                    "the chat template rewrites the turns before an answer, so that it has no own"
                    " span"
                )
        if self.has_marks:
            spans = tuple((start, end) for start, end in marks if start >= shared and end > start)
            if not spans:
                raise FormatError(
                    "the chat template marks no {% generation %} for an assistant turn"
                )
            return spans
        prompt, _ = self._render(before, add_generation_prompt=True, **kwargs)
        start = max(shared, _shared(prompt, text))
        end = self._end(text, start)
        if end <= start:
            raise FormatError("the chat template renders nothing for an assistant turn")
        return ((start, end),)

    def _end(self, text: str, start: int) -> int:
        """The end of the last turn.

        White space after its end-of-sequence token is the template's, not the model's.
        """
        end = len(text.rstrip())
        eos = self._specials.get("eos_token")
        return end if eos and end > start and text.endswith(eos, start, end) else len(text)

    def _render(self, messages: list[Message], **kwargs: Any) -> tuple[str, list[Span]]:
        """The text, and the spans of {% generation %} blocks where the template has them."""
        from transformers.utils import chat_template_utils

        # Its annotations say less than it takes and returns (transformers 5.19).
        render: Any = chat_template_utils.render_jinja_template

        try:
            texts, marks = render(
                conversations=[messages],
                chat_template=self.template,
                return_assistant_tokens_mask=self.has_marks,
                **{**self._specials, **kwargs},
            )
        except Exception as error:  # a template is a program: it raises what it likes
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise FormatError(f"the chat template refuses it: {reason}") from error
        return str(texts[0]), list(marks[0]) if self.has_marks else []

    def encode(self, marked: list[Marked]) -> list[Encoded]:
        """Tokenise texts together (in parallel threads inside `tokenizers`).

        A token counts when it begins in a span.
        """
        if not marked:
            return []
        batch = self.tokenizer(
            [m.text for m in marked],
            add_special_tokens=False,  # the template writes them
            return_offsets_mapping=True,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        encoded: list[Encoded] = []
        for text, ids, offsets in zip(
            marked, batch["input_ids"], batch["offset_mapping"], strict=True
        ):
            starts = np.array([start for start, _ in offsets], dtype=np.int64)
            mask = np.zeros(len(ids), dtype=np.bool_)
            for start, end in text.spans:
                mask |= (starts >= start) & (starts < end)
            encoded.append(Encoded(np.array(ids, dtype=np.int32), mask))
        return encoded


def _shared(a: str, b: str) -> int:
    """How many characters two texts begin with in common."""
    if b.startswith(a):
        return len(a)
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if a[:middle] == b[:middle] else (low, middle - 1)
    return low


def template_text(template: str | None) -> str | None:
    """The text of a template that was given as text or as the path of a file."""
    if template is None or "{" in template:
        return template
    try:
        return Path(template).expanduser().read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(
            f"data.chat_template: {template} is neither a template nor a readable file"
            f" ({error.strerror})."
        ) from error
