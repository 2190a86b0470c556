"""Replies by tokens: what comes behind a turn that a model has sampled, up to where it speaks next.

What was sampled is never tokenised again: of the conversation as the template renders it, only what
follows the turn's end is. What the turn says does not matter for that, so that words stand in its
place, and the same rendering shows whether the template keeps the turn as the model wrote it.
"""

import re
import secrets
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moetrain.data.chat import Chat
from moetrain.data.contract import appears_in
from moetrain.data.messages import FormatError, Message
from moetrain.data.thoughts import opened_by

REFUSED = "Error: the output holds a control token, and was left out."


@dataclass(frozen=True)
class Continuation:
    """How a conversation goes on."""

    messages: tuple[Message, ...]  # the turn and the reply, as they stand in the conversation now
    # What comes behind the sampled tokens, up to and with the prompt for the next turn. None where
    # the template does not end the turn as the model did; then it `rewrites`.
    tokens: tuple[int, ...] | None
    # The template renders what was before the reply otherwise than the model saw and wrote it:
    # thoughts are left out, a call is written in another way.
    rewrites: bool
    whole: tuple[int, ...] | None  # where it rewrites: all tokens of the prompt for the next turn
    opened: str  # the thought that the prompt for the next turn begins
    # A token that stops a turn and is not the one that the template ends it with; `tokens` then
    # begin with the template's.
    stopped_at: str
    num_refused: int  # messages of the reply that were replaced: control tokens in them


class Continuer:
    """Goes on with conversations of one chat.

    Args:
        stop_ids: tokens that stop an answer (`data/turns.py: stop_ids`).
        kwargs: of the template: tools, and what else was given for the conversation's prompt.
    """

    def __init__(self, chat: Chat, stop_ids: Collection[int], **kwargs: Any):
        self.chat, self.stop_ids = chat, frozenset(stop_ids)
        _, self.kwargs, _ = chat.controls.guard([], kwargs)

    def after(
        self,
        messages: Sequence[Message],
        turn: Message,
        text: str,
        tokens: Sequence[int],
        reply: Sequence[Message],
    ) -> Continuation:
        """What comes behind a turn. Raises FormatError where the template cannot render it.

        Args:
            messages: before the turn: the record's, and of each turn since `Continuation.messages`.
            turn: what was read in its text (`environments/calls.py: TurnReader.read`).
            text: of its tokens, special ones too, but for those that ended it.
            tokens: as sampled, with the one that ended it.
        """
        reply, num_refused = self._allowed(reply)
        before = self._guarded(messages)
        prompt = self._render(before)
        reason = FormatError("the chat template renders no reply")
        for own_turn, own_reply in _ways(turn, text, reply):
            try:
                placed = self._placed(before, prompt, own_turn, text, self._guarded(own_reply))
            except FormatError as error:
                reason = error
                continue
            behind, stopped_at = self._behind(placed, text, tokens)
            turn_messages = (own_turn, *own_reply)
            whole = None
            if rewrites := placed.rewrites or behind is None:
                whole = tuple(self.chat.ids(self._render([*before, *self._guarded(turn_messages)])))
            return Continuation(
                turn_messages, behind, rewrites, whole, placed.opened, stopped_at, num_refused
            )
        raise reason

    def _allowed(self, reply: Sequence[Message]) -> tuple[list[Message], int]:
        """The reply without what would forge turns, and how many messages were replaced."""
        guarded, num = list[Message](), 0
        for message in reply:
            try:
                self.chat.controls.guard([message], {})
            except FormatError:
                message, num = message | {"content": REFUSED}, num + 1
            guarded.append(message)
        return guarded, num

    def _guarded(self, messages: Sequence[Message]) -> list[Message]:
        guarded: list[Message] = []
        for message in messages:
            plain = {key: value for key, value in message.items() if key != "malformed"}
            is_model = message["role"] == "assistant"
            controls = self.chat.own_words if is_model else self.chat.controls
            guarded += controls.guard([plain], {})[0]
        return guarded

    def _render(self, guarded: list[Message]) -> str:
        return self.chat.template.text_of(
            self.chat.spoken(guarded), add_generation_prompt=True, **self.kwargs
        )

    def _placed(
        self,
        before: list[Message],
        prompt: str,
        turn: Message,
        text: str,
        reply: list[Message],
    ) -> "_Placed":
        """The conversation with words in place of what the turn says."""
        words = _Words(turn)
        rendered = self._render([*before, words.message, *reply])
        start = len(prompt) if rendered.startswith(prompt) else 0
        last = words.last_in(rendered, start)
        if last is None:
            raise FormatError("the chat template renders nothing for an assistant turn")
        end, mark = self._end(rendered, last)
        behind = words.named(rendered[last if end is None else end :])
        for message in reply:
            if not appears_in((message["content"] or "").strip(), behind):
                raise FormatError(f"the chat template does not render a {message['role']}'s reply")
        rewrites = not start or not words.says(rendered[start:last], text)
        opened = opened_by(rendered)
        return _Placed(None if end is None else behind, mark, rewrites, opened)

    def _end(self, rendered: str, place: int) -> tuple[int | None, str]:
        """(where the turn's end is behind a place, what it is)."""
        ends = self.chat.template.ends
        marks = [*ends.tokens, *([ends.text] if ends.text else [])] or ends.next_role
        positions = [(at, mark) for mark in marks if (at := rendered.find(mark, place)) >= 0]
        return min(positions, default=(None, ""))

    def _behind(
        self, placed: "_Placed", text: str, tokens: Sequence[int]
    ) -> tuple[tuple[int, ...] | None, str]:
        """(the tokens behind the sampled ones, what else stopped the turn)."""
        if placed.behind is None:
            return None, ""
        tokenizer, last = self.chat.tokenizer, tokens[-1] if tokens else None
        number = tokenizer.convert_tokens_to_ids(placed.mark)
        is_token = number is not None and tokenizer.convert_ids_to_tokens(number) == placed.mark
        if not is_token and text.rstrip().endswith(placed.mark):
            return tuple(self.chat.ids(placed.behind.removeprefix(placed.mark))), ""
        # With the mark, since some tokenizers put a blank in front of a text.
        ids = self.chat.ids(placed.behind)
        if is_token and last == number:
            assert ids[0] == last
            return tuple(ids[1:]), ""
        stopped_at = last in self.stop_ids and tokenizer.convert_ids_to_tokens(last)
        return tuple(ids), str(stopped_at or "")


@dataclass(frozen=True)
class _Placed:
    """A conversation with words in place of what a turn says."""

    behind: str | None  # from the mark on that ends the turn; None: there is none
    mark: str
    rewrites: bool
    opened: str


class _Words:
    """A turn with words in place of what it says, that no tool can know and say."""

    def __init__(self, turn: Message):
        self.turn = turn
        mark = f"Qz{secrets.token_hex(8)}"
        self.content, self.thought = f"{mark}cqZ", f"{mark}tqZ"
        calls = turn.get("tool_calls") or ()
        self.names = {f"{mark}n{i}qZ": str(c["function"]["name"]) for i, c in enumerate(calls)}
        # All in one pass: a turn may have thousands of calls.
        self._name = re.compile(rf"{mark}n\d+qZ")
        self.message: Message = {"role": "assistant", "content": self.content}
        if calls:
            self.message["content"] = self.content if turn["content"] else turn["content"]
            self.message["tool_calls"] = [
                call | {"function": {"name": name, "arguments": {}}}
                for call, name in zip(calls, self.names, strict=True)
            ]
        if turn.get("reasoning_content"):
            self.message["reasoning_content"] = self.thought

    def last_in(self, rendered: str, start: int) -> int | None:
        """Where the last of what the turn says ends."""
        words = [self.content, self.thought]
        ends = [at + len(word) for word in words if (at := rendered.find(word, start)) >= 0]
        first: dict[str, int] = {}  # headers of replies may hold names again
        for one in self._name.finditer(rendered, start):
            first.setdefault(one[0], one.end())
        return max([*ends, *first.values()], default=None)

    def says(self, rendered: str, text: str) -> bool:
        """Whether the turn in words is the one of `text`, white space aside: all of it, or up to
        the name of its first call. How its arguments are written is not compared.
        """
        calls = self._name.search(rendered)
        rendered = rendered[: calls.start()] if calls else rendered
        thought = str(self.turn.get("reasoning_content") or "")
        content = str(self.turn["content"] or "")
        if thought and self.thought not in rendered:
            return False
        rendered = "".join(
            rendered.replace(self.thought, thought).replace(self.content, content).split()
        )
        spoken = "".join(text.split())
        return spoken.startswith(rendered) if calls else spoken == rendered

    def named(self, behind: str) -> str:
        """What is behind the turn: with the calls' own names, which headers of replies may hold."""
        return self._name.sub(lambda match: self.names[match[0]], behind)


def _ways(
    turn: Message, text: str, reply: list[Message]
) -> Iterator[tuple[Message, list[Message]]]:
    """A turn and its reply, and what to make of them where a template takes no such."""
    yield turn, reply
    if turn.get("tool_calls"):  # some take one call alone
        bare: Message = {"role": "assistant", "content": text}
        yield bare, reply
        turn = bare
    if any(message["role"] == "tool" for message in reply):
        yield turn, [_as_user(message) for message in reply]


def _as_user(message: Mapping[str, Any]) -> Message:
    return {"role": "user", "content": message["content"]}
