"""The text contract: a trained turn in its rendered text, where it lies, and that it says what the
record says, no less and no more.
"""

import json
import re
from collections.abc import Mapping
from typing import Any

from moetrain.data.messages import FormatError, Message, arguments_of, leaves, shown
from moetrain.data.template import ARGUMENT, CONTENT, THOUGHT, Span, Template, shared

REWRITES = "the chat template rewrites the turns before an answer, so that it has no own span"
EMPTY_THOUGHT = re.compile(r"\s*(?:<think>\s*)?</think>\s*")


class TrainedTurn:
    """One trained turn in its rendered text: where it lies, and whether it says what it should."""

    def __init__(
        self,
        template: Template,
        before: list[Message],
        message: Message,
        rendered: tuple[str, list[Span]],
        kwargs: Mapping[str, Any],
    ) -> None:
        self.template, self.before, self.message = template, before, message
        self.text, self.marks = rendered
        self.kwargs = kwargs
        self.notes: list[str] = []

    def spans(self, turn: int, empty_thoughts: bool) -> tuple[Span, ...]:
        """What of `text` is learned; `turn` is its number in the record, for messages. Where the
        template shows earlier turns otherwise once this one is there, `text` becomes what the model
        had before it when it said this turn, and the turn.
        """
        start, skeleton = self._start()
        end, closed = self._end(start)
        if end <= start:
            raise FormatError("the chat template renders nothing for an assistant turn")
        spans = self._marks(start, end, closed) if self.template.has_marks else ((start, end),)
        self._check(turn, start, end, skeleton)
        return self._thoughtful(spans, empty_thoughts)

    def _render(self, *turns: Message, **kwargs: Any) -> str:
        return self.template.text_of([*self.before, *turns], **kwargs, **self.kwargs)

    def _words(self) -> Message:
        """The turn with words in place of what it says."""
        made: Message = {"role": "assistant", "content": CONTENT}
        if self.message.get("reasoning_content"):
            made["reasoning_content"] = THOUGHT
        return made

    def _skeleton(self) -> tuple[str, int]:
        """(The text with words in place of what the turn says, where the first of them is).

        Calls are words, too: a turn that calls may be shown otherwise than one that answers.
        """
        tried = [self._words()]
        if calls := self.message.get("tool_calls"):
            named = {"function": {"name": ARGUMENT, "arguments": {}}}
            calling = self._words() | {"tool_calls": [call | named for call in calls]}
            if not self.message["content"]:  # some templates refuse one beside a thought
                calling["content"] = self.message["content"]
            tried.insert(0, calling)
        for words in tried:
            try:
                skeleton = self._render(self.template.speaks(words))
            except FormatError:
                continue  # of calls; without them it is the turn's own text that is judged
            places = [at for at in map(skeleton.find, (THOUGHT, CONTENT, ARGUMENT)) if at >= 0]
            if places:
                return skeleton, min(places)
        raise FormatError("the chat template renders nothing for an assistant turn")

    def _start(self) -> tuple[int, str]:
        """(Where the turn begins, what follows there with words in place of what it says).

        What a prompt for this turn and the turn itself begin with is the prompt's. It is compared
        on a turn of words, since what a real turn says can begin as a prompt goes on.
        """
        skeleton, first = self._skeleton()
        prompt = self._render(add_generation_prompt=True)
        start = at = shared(prompt, skeleton[:first])
        if len(prompt) > start:
            asked, opening = self._render(), self.template.opening
            opened = len(asked + opening) if prompt.startswith(asked + opening) else 0
            if len(asked) > start:
                # Of the turns before, some is shown in the prompt and not beside the answer.
                start, at = opened, skeleton.rfind(opening, 0, first) + len(opening)
                if not opening or not opened or at < len(opening):
                    raise FormatError(REWRITES)
            elif opened:  # a mark of calls can begin as the prompt goes on
                start = at = min(start, opened)
        if self.text[:at] != skeleton[:at]:
            raise FormatError(REWRITES)
        if at != start:
            self._move(prompt[:start], at)
        ahead = prompt[start:]
        if ahead and not self.text.startswith(ahead, start):
            self.notes.append(
                f"the prompt for an answer ends with {shown(ahead)}, which the trained text lacks"
            )
        return start, skeleton[at:]

    def _move(self, before: str, start: int) -> None:
        """Put the turn, which begins at `start` of the text, behind `before`."""
        moved = len(before) - start
        self.marks = [(a + moved, b + moved) for a, b in self.marks if b > start]
        self.text = before + self.text[start:]

    def _end(self, start: int) -> tuple[int, bool]:
        """(The end of the turn, whether something that ends a turn is there).

        White space after its end-of-turn token is the template's, not the model's.
        """
        ends, end = self.template.ends, len(self.text.rstrip())
        at = self.template.end_of(self.text[start:])
        if at is not None:
            return start + at, True
        if ends.text is not None and self.text.endswith(ends.text, start, end):
            return end, True
        if ends.tokens:
            self.notes.append("the chat template ends a trained turn without its end-of-turn token")
        return len(self.text), False

    def _marks(self, start: int, end: int, closed: bool) -> tuple[Span, ...]:
        """The template's own marks of this turn, as far as the turn goes."""
        marks = [(max(a, start), min(b, end)) for a, b in self.marks if b > start]
        marks = [(a, b) for a, b in marks if b > a]
        if not marks:
            raise FormatError("the chat template marks no {% generation %} for an assistant turn")
        first, last = marks[-1]
        if closed and self.text[last:end].strip() in (*self.template.ends.tokens, ""):
            marks[-1] = first, end  # the end-of-turn token stands outside of the mark
        return tuple(marks)

    def _check(self, turn: int, start: int, end: int, skeleton: str) -> None:
        """FormatError unless the text has all that the turn says, and nothing else."""
        message = self.text[start:end]
        thought, content = self.message.get("reasoning_content"), self.message["content"]
        for value, word, name in (
            (thought, THOUGHT, "reasoning"),
            (content, CONTENT, "content"),
        ):
            if not value or not value.strip() or value.strip() in message:
                continue
            if word in self._skeleton_of_all(skeleton):
                raise FormatError(
                    f"the chat template does not render the {name} of the assistant turn {turn} as"
                    " it is"
                )
            self.notes.append(f"the chat template drops the {name} of a trained turn")
        if "<think>" in (content or "").rpartition("</think>")[2]:
            self.notes.append("a trained turn begins a thought and never ends it")
        self._check_calls(turn, message)
        if content and content.strip() and not self.message.get("tool_calls"):
            whole = skeleton.replace(CONTENT, content).replace(THOUGHT, thought or "")
            if _squeezed(whole) != _squeezed(self.text[start:]):
                raise FormatError(
                    f"the chat template makes something else of the assistant turn {turn}"
                )

    def _skeleton_of_all(self, skeleton: str) -> str:
        """The turn of words with the turn's calls beside them."""
        if not self.message.get("tool_calls"):
            return skeleton
        words = self._words() | {"tool_calls": self.message["tool_calls"]}
        try:
            return self._render(self.template.speaks(words))
        except FormatError:
            return ""

    def _check_calls(self, turn: int, text: str) -> None:
        for call in self.message.get("tool_calls") or ():
            values = [call["function"]["name"], *leaves(arguments_of(call))]
            for value in values:
                if not appears_in(value, text):
                    if not self.template.reads.calls:
                        self.notes.append(
                            "the chat template drops the tool calls of a trained turn"
                        )
                        return
                    raise FormatError(
                        f"the chat template does not render {shown(value)} of a tool call in the"
                        f" assistant turn {turn}"
                    )

    def _thoughtful(self, spans: tuple[Span, ...], empty_thoughts: bool) -> tuple[Span, ...]:
        """The spans, without the empty thought that a template writes where there is none, unless
        that is to be learned.
        """
        (start, end), *rest = spans
        thought = EMPTY_THOUGHT.match(self.text, start, end)
        if thought is None or self.message.get("reasoning_content"):
            return spans
        if empty_thoughts:
            self.notes.append(
                "an empty thought is learned: the turn has no reasoning and the template writes one"
            )
            return spans
        return ((thought.end(), end), *rest)


def _squeezed(text: str) -> str:
    return "".join(text.split())


def appears_in(value: Any, text: str) -> bool:
    """Whether a value of a call or its result stands in a text, however it is escaped there."""
    if isinstance(value, str):
        ways = [value, json.dumps(value, ensure_ascii=False), json.dumps(value)]
        return any(way.strip('"') in text for way in ways)
    return json.dumps(value) in text or str(value) in text
