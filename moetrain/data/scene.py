"""What an environment adds to prompts."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from moetrain.data.chat import Chat
from moetrain.data.formats import TEMPLATED, name_of, template_kwargs_of
from moetrain.data.messages import FormatError, Message
from moetrain.data.samples import Prompt
from moetrain.data.thoughts import opened_by


@dataclass(frozen=True)
class Scene:
    """What an environment adds to prompts: the tools on offer, and what it says first."""

    tools: tuple[Mapping[str, Any], ...] = ()
    # To a record's columns, `prompt` its messages. FormatError where it cannot begin.
    opening: Callable[[Mapping[str, Any]], list[Message]] | None = None
    has_turns: bool = False  # it replies, which takes messages

    def begin(self, prompt: Prompt, chat: Chat, max_tokens: int | None = None) -> Prompt:
        """The prompt as it is given to the model, `messages_of` it with what is said first. Raises
        FormatError where it cannot be, or has more than `max_tokens`.
        """
        if self.has_turns and prompt.columns.get(TEMPLATED):
            raise FormatError("it is templated already, and the environment replies to messages")
        first = [] if self.opening is None else self.opening(prompt.columns)
        messages = [*messages_of(prompt), *first]
        text = chat.prompt(messages, **self.kwargs_of(prompt.columns))
        tokens = tuple(chat.ids(text))
        if max_tokens is not None and len(tokens) > max_tokens:
            raise FormatError(
                f"the prompt has {len(tokens)} tokens with what the environment says, of"
                f" {max_tokens} that there are for it"
            )
        columns = prompt.columns | {"prompt": messages}
        return replace(prompt, tokens=tokens, columns=columns, opened=opened_by(text))

    def kwargs_of(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """What the chat template is given for a record. A record's own `tools` choose, by their
        names, among those of the environment. FormatError where one is not there.
        """
        kwargs = template_kwargs_of(record)
        if not self.has_turns or not (self.tools or kwargs.get("tools")):
            return kwargs
        known = {str(name_of(tool)): tool for tool in self.tools}
        given = [str(name_of(tool)) for tool in kwargs.get("tools", ())]
        names = given or list(known)
        lacking = [name for name in names if name not in known]
        if lacking:
            raise FormatError(
                f"tools has {', '.join(lacking)}, and the environment {', '.join(known) or 'none'}"
            )
        return kwargs | {"tools": [known[name] for name in names]}


def messages_of(prompt: Prompt) -> list[Message]:
    """The messages of a prompt's record."""
    asked: Any = prompt.columns["prompt"]
    return [{"role": "user", "content": asked}] if isinstance(asked, str) else list(asked)
