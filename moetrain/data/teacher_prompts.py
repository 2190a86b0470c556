"""A prompt as a teacher is given it: with a system message that the student does not see."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

from moetrain.data.chat import Chat
from moetrain.data.formats import template_kwargs_of
from moetrain.data.messages import FormatError, Message
from moetrain.data.samples import Prompt
from moetrain.errors import DataError

_FIELD = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True)
class TeacherPrompts:
    """`system` with {COLUMN} filled in, before a prompt's messages.

    room: tokens that a prompt may have then.
    """

    system: str
    chat: Chat
    room: int

    def check(self, prompts: Iterable[Prompt]) -> None:
        """Raise DataError for the first prompt that it cannot be said before."""
        for prompt in prompts:
            self._messages(prompt)

    def of(self, prompt: Prompt) -> Prompt:
        """The same with the teacher's tokens. Raises DataError."""
        messages = self._messages(prompt)
        try:
            text = self.chat.prompt(messages, **template_kwargs_of(prompt.columns))
        except FormatError as error:
            raise DataError(f"teacher.system: {prompt.source}: {error}") from None
        ids = tuple(self.chat.ids(text))
        if len(ids) > self.room:
            raise DataError(
                f"teacher.system: a prompt of {prompt.source} has {len(ids)} tokens with it, and"
                f" data.seq_len leaves {self.room} beside an answer. Raise data.seq_len, or tell"
                " less"
            )
        return replace(prompt, tokens=ids)

    def _messages(self, prompt: Prompt) -> list[Message]:
        given = prompt.columns.get("prompt")
        if not isinstance(given, list):
            raise DataError(
                f"teacher.system: {prompt.source} has a prompt that is rendered already, and no"
                " system message goes before it. Give messages"
            )
        messages: list[Message] = list(given)
        before = ""
        if messages and messages[0]["role"] == "system":
            before, messages = f"{messages[0]['content']}\n\n", messages[1:]
        return [{"role": "system", "content": before + self._filled(prompt)}, *messages]

    def _filled(self, prompt: Prompt) -> str:
        def put(match: re.Match[str]) -> str:
            value = prompt.columns.get(match[1])
            if value is None:
                raise DataError(
                    f"teacher.system names {match[0]}, and a record of {prompt.source} has no such"
                    f" column; it has {', '.join(sorted(prompt.columns))}."
                )
            return str(value)

        return _FIELD.sub(put, self.system)
