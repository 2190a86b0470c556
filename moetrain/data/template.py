"""A chat template: rendering, and what one finds out about it by rendering probes.

A template is a program. What it makes of a message is learned by giving it words that occur nowhere
else and looking where they come out, never by reading its source.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from moetrain.data.limits import OverMemory, OverTime, limited
from moetrain.data.messages import REASONING_FIELDS, FormatError, Message, arguments_of
from moetrain.errors import DataError

GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
# Words that no text has. Letters and digits alone, so that no template escapes them.
CONTENT, THOUGHT, QUESTION, ARGUMENT = "Qz7ContentqZ", "Qz7ThoughtqZ", "Qz7QuestionqZ", "Qz7ValueqZ"
# What a template's own marks of turns look like, where the tokenizer does not know them as tokens.
TAG = re.compile(r"<[|\uff5c]?[\w\u2581/ .:-]{1,40}[|\uff5c]?>|\[/?[A-Z_]{2,20}\]")
THINK = re.compile("think", re.IGNORECASE)
SECONDS = 5.0  # of the processor, for one text
ROOM = 1 << 28  # bytes, the same

Span = tuple[int, int]


@dataclass(frozen=True)
class Reads:
    """What a template takes of an assistant's turn."""

    reasoning: str | None  # the field of a message that it renders as the turn's thought
    inline: bool  # whether <think>…</think> in the content stays there
    calls: bool  # whether it renders tool calls
    mapping: bool  # whether it takes a call's arguments as an object
    text: bool  # whether it takes them as JSON text
    null: bool  # whether a turn of calls may have the content None
    system: bool  # whether it renders a system message
    developer: bool  # whether it knows that role
    tools: bool  # whether it renders the tools on offer


@dataclass(frozen=True)
class Ends:
    """What ends an assistant's turn."""

    tokens: tuple[str, ...]  # of the turn itself, each one token
    text: str | None  # what it writes there, when that is not one token
    next_role: tuple[str, ...]  # without either: the tokens that begin what follows

    @property
    def stops(self) -> tuple[str, ...]:
        """The tokens at which to stop sampling."""
        return self.tokens or self.next_role


def template_text(template: str | None) -> str | None:
    """The text of a template that was given as text or as the path of a file."""
    if template is None or "{" in template:
        return template
    try:
        return Path(template).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise DataError(
            f"data.chat_template: {template} is neither a template nor a readable file ({reason})."
        ) from error


class Template:
    """A template's text, the tokens of its tokenizer, and the arguments that a recipe gives it."""

    def __init__(
        self,
        text: str,
        specials: Mapping[str, str],
        tokens: Iterable[str],
        kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        self.text = text
        self.has_marks = GENERATION.search(text) is not None
        self.kwargs = dict(kwargs or {})
        self._specials = dict(specials)
        # Longest first: one token may begin with another.
        self._tokens = sorted({t for t in tokens if t.strip()}, key=len, reverse=True)
        self._token = re.compile("|".join(map(re.escape, self._tokens)) or r"(?!)")

    def render(self, messages: Sequence[Message], /, **kwargs: Any) -> tuple[str, list[Span]]:
        """The text, and the spans of {% generation %} blocks where the template has them.

        FormatError when the template refuses.
        """
        return self._run(messages, kwargs, self.has_marks)

    def text_of(self, messages: Sequence[Message], /, **kwargs: Any) -> str:
        """The text alone, which takes half the time where the template has marks."""
        return self._run(messages, kwargs, False)[0]

    def _run(
        self, messages: Sequence[Message], kwargs: Mapping[str, Any], with_marks: bool
    ) -> tuple[str, list[Span]]:
        from transformers.utils import chat_template_utils

        # Its annotations say less than it takes and returns (transformers 5.19).
        render: Any = chat_template_utils.render_jinja_template
        try:
            with limited(SECONDS, ROOM):
                texts, marks = render(
                    conversations=[list(messages)],
                    chat_template=self.text,
                    return_assistant_tokens_mask=with_marks,
                    **{**self._specials, **self.kwargs, **kwargs},
                )
        except OverTime as error:
            raise FormatError(f"the chat template works on it for over {SECONDS:g} s") from error
        except OverMemory as error:
            raise FormatError(
                f"the chat template takes over {ROOM >> 20} MiB of memory for it"
            ) from error
        except Exception as error:  # a template is a program: it raises what it likes
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise FormatError(f"the chat template refuses it: {reason}") from error
        return str(texts[0]), list(marks[0]) if with_marks else []

    def speaks(self, message: Message) -> Message:
        """An assistant's message as this template takes it: the thought where it looks for one,
        the arguments of calls in the form that it writes.
        """
        if message["role"] == "developer" and not self.reads.developer:
            return message | {"role": "system"}  # OpenAI's later name for it
        if message["role"] != "assistant":
            return message
        made = {k: v for k, v in message.items() if k not in ("reasoning_content", "tool_calls")}
        thought = message.get("reasoning_content")
        if thought is not None and self.reads.reasoning is not None:
            made[self.reads.reasoning] = thought
        elif thought is not None and self.reads.inline and "<think>" in self.text:
            made["content"] = f"<think>\n{thought}\n</think>\n\n{message['content'] or ''}"
        if message.get("tool_calls"):
            made["tool_calls"] = [self._call(call) for call in message["tool_calls"]]
            if made["content"] is None and not self.reads.null:
                made["content"] = ""
        return made

    def _call(self, call: Message) -> Message:
        given = call["function"]["arguments"]
        is_text = isinstance(given, str)
        if is_text and not self.reads.text:
            given = arguments_of(call)
        elif not is_text and not self.reads.mapping:
            given = json.dumps(given, ensure_ascii=False)
        return call | {"function": call["function"] | {"arguments": given}}

    def _tries(self, *turns: Message, **kwargs: Any) -> str:
        """What comes out after a question, or nothing where the template refuses."""
        try:
            return self.text_of([{"role": "user", "content": QUESTION}, *turns], **kwargs)
        except FormatError:
            return ""

    @cached_property
    def reads(self) -> Reads:
        """Found out by probes."""
        fields = (
            field
            for field in REASONING_FIELDS
            if THOUGHT in self._tries(_assistant(CONTENT) | {field: THOUGHT})
        )
        inline = self._tries(_assistant(f"<think>\n{THOUGHT}\n</think>\n\n{CONTENT}"))
        mapping = self._calls_of({"k": ARGUMENT})
        text = self._calls_of(json.dumps({"k": ARGUMENT}))
        takes_mapping = bool(mapping) and f"'{ARGUMENT}'" not in mapping
        takes_text = bool(text) and '\\"' not in text
        arguments = {"k": ARGUMENT} if takes_mapping else json.dumps({"k": ARGUMENT})
        null = self._tries(_calls(arguments, content=None))
        empty = self._tries(_calls(arguments, content=""))
        tool = {"name": ARGUMENT, "description": "d", "parameters": {"type": "object"}}
        offered = self._tries(tools=[{"type": "function", "function": tool}])
        return Reads(
            reasoning=next(fields, None),
            inline=THOUGHT in inline and CONTENT in inline,
            calls=takes_mapping or takes_text,
            mapping=takes_mapping or not takes_text,
            text=takes_text,
            null=ARGUMENT in null and null.count("None") <= empty.count("None"),
            system=CONTENT in self._tries_first("system"),
            developer=CONTENT in self._tries_first("developer"),
            tools=ARGUMENT in offered,
        )

    def _calls_of(self, arguments: Any, number: int = 1) -> str:
        """A turn of calls, where it is rendered: some templates leave calls out beside a content,
        some fail without one.
        """
        tried = (self._tries(_calls(arguments, content, number)) for content in (None, ""))
        return next((text for text in tried if ARGUMENT in text), "")

    @cached_property
    def called(self) -> str:
        """A turn that calls f(k=ARGUMENT) and says nothing else, as the model would write it (where
        the prompt for one is another, with how a turn begins); "" where calls are not rendered.
        """
        arguments: Any = {"k": ARGUMENT} if self.reads.mapping else json.dumps({"k": ARGUMENT})
        text, prompt = self._calls_of(arguments), self._tries(add_generation_prompt=True)
        turn = text.removeprefix(prompt)
        if turn == text:  # such as a thought that is begun for answers alone
            turn = text[shared(text, self._tries()) :]
        end = self.end_of(turn)
        if end is not None:
            turn = turn[:end].rstrip()
            turn = turn.removesuffix(next((t for t in self.ends.tokens if turn.endswith(t)), ""))
        return turn

    def _tries_first(self, role: str) -> str:
        messages = [{"role": role, "content": CONTENT}, {"role": "user", "content": QUESTION}]
        try:
            return self.text_of(messages)
        except FormatError:
            return ""

    @cached_property
    def opening(self) -> str:
        """What an answer and the prompt for one both begin with."""
        asked, prompt = self._tries(), self._tries(add_generation_prompt=True)
        answer = self._tries(_assistant(CONTENT)).partition(CONTENT)[0]
        both = shared(prompt, answer)
        return prompt[len(asked) : both] if prompt.startswith(asked) else ""

    @cached_property
    def ends(self) -> Ends:
        """What ends a turn: after an answer, and after calls where they end otherwise."""
        answered = self._tries(_assistant(CONTENT))
        tail = answered[answered.rfind(CONTENT) + len(CONTENT) :].strip()
        if CONTENT not in answered:
            return Ends((), None, ())
        last = self._token.match(tail)
        if last is None:
            return Ends((), tail or None, () if tail else self._next_role())
        last_tokens = [last.group()]
        arguments: Any = {"k": ARGUMENT} if self.reads.mapping else json.dumps({"k": ARGUMENT})
        # Some templates take one call alone.
        called = self._calls_of(arguments, number=2) or self._calls_of(arguments)
        turn = called[called.rfind(QUESTION) + len(QUESTION) :]
        tokens = self._last_tokens(turn)
        # One that a turn has twice is about calls, not about turns.
        if tokens and not set(tokens) & set(last_tokens) and turn.count(tokens[-1]) == 1:
            last_tokens.append(tokens[-1])
        return Ends(tuple(last_tokens), None, ())

    def _last_tokens(self, text: str) -> list[str]:
        """The tokens that a text ends with, with white space alone between them, in their order."""
        tokens: list[str] = []
        while token := next((t for t in self._tokens if text.rstrip().endswith(t)), None):
            tokens.insert(0, token)
            text = text.rstrip().removesuffix(token)
        return tokens

    def end_of(self, text: str) -> int | None:
        """Where a text ends with an end-of-turn token; None where it does not."""
        tokens = self._last_tokens(text)
        if (at := next((i for i, t in enumerate(tokens) if t in self.ends.tokens), None)) is None:
            return None
        for token in reversed(tokens[at + 1 :]):
            text = text.rstrip().removesuffix(token)
        return len(text.rstrip())

    def _next_role(self) -> tuple[str, ...]:
        """The tokens that begin what follows an answer."""
        tokens: list[str] = []
        for role in ("user", "tool"):
            text = self._tries(_assistant(CONTENT), {"role": role, "content": ARGUMENT})
            between = text[text.rfind(CONTENT) + len(CONTENT) : text.rfind(ARGUMENT)]
            if token := self._token.search(between):
                tokens.append(token.group())
        return tuple(dict.fromkeys(tokens))

    @cached_property
    def turn_marks(self) -> set[str]:
        """What this template writes around turns: a text should have none of it."""
        text = self._tries(
            _assistant(CONTENT), {"role": "user", "content": ARGUMENT}, add_generation_prompt=True
        )
        marks = set(self._token.findall(text)) | set(TAG.findall(text))
        return {mark for mark in marks if not THINK.search(mark)}


def _assistant(content: str | None) -> Message:
    return {"role": "assistant", "content": content}


def _calls(arguments: Any, content: str | None, number: int = 1) -> Message:
    function = {"name": "f", "arguments": arguments}
    calls = [
        {"type": "function", "id": f"call0000{i}", "function": function} for i in range(number)
    ]
    return _assistant(content) | {"tool_calls": calls}


def shared(a: str, b: str) -> int:
    """How many characters two texts begin with in common."""
    if b.startswith(a):
        return len(a)
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if a[:middle] == b[:middle] else (low, middle - 1)
    return low
