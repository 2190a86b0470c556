"""A model's turn, from the text of its tokens to a message: its thought, what it says, its calls.

vLLM and SGLang have such parsers; they import their engines, which are no part of this environment,
so these are our own, held to what the models' templates write.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from moetrain.data.messages import Message
from moetrain.data.template import ARGUMENT, Template
from moetrain.data.thoughts import MARKS
from moetrain.environments.base import Tool
from moetrain.environments.call_formats import READERS, Found, Types
from moetrain.errors import ConfigError


def format_of(template: Template, given: str = "auto") -> str | None:
    """How a model with this chat template writes calls: the name of a reader, the one that reads
    what the template writes. None where it writes none; `given` is `rollout.call_format`.
    """
    if given != "auto":
        return given
    turn = template.called
    for name, reader in READERS.items():
        if turn and reader(turn, {}).calls == [("f", {"k": ARGUMENT})]:
            return name
    return None


def check_format(template: Template, given: str, tools: Sequence[Tool]) -> None:
    """Raises ConfigError where tools are offered and there is no telling how they are called."""
    if tools and format_of(template, given) is None:
        raise ConfigError(
            "The chat template renders no tool calls, so how the model writes them is not known:"
            f" set rollout.call_format to one of {', '.join(READERS)}, or data.chat_template."
        )


class TurnReader:
    """Reads the turns of models that write calls in one format.

    Args:
        call_format: a key of READERS; None: the model writes no calls.
        tools: what is on offer, whose schemas say what a text in a call means.
        is_inline: the template has a thought in the content.
    """

    def __init__(
        self, call_format: str | None, tools: Iterable[Tool] = (), is_inline: bool = False
    ):
        self.is_inline = is_inline
        self.reader = READERS[call_format] if call_format else None
        self.types: Types = {
            str(own.get("name")): (own.get("parameters") or {}).get("properties") or {}
            for own in (tool.get("function", tool) for tool in tools)
        }

    @classmethod
    def of(cls, template: Template, tools: Iterable[Tool], given: str = "auto") -> "TurnReader":
        """That of a chat template; `given` is `rollout.call_format`."""
        reads = template.reads
        return cls(format_of(template, given), tools, reads.reasoning is None and reads.inline)

    def read(self, text: str, opened: str = "", num_calls: int = 0) -> Message:
        """The message that a turn's text says: special tokens in it, but for those that ended it.

        `content` (text, maybe empty), and where there are any `reasoning_content`, `tool_calls` in
        OpenAI's form with arguments as objects, `malformed`: a line on each call that cannot be
        read, which stays in the content. Takes any text.

        Args:
            opened: the thought that the prompt began for the turn (`data/thoughts.py: opened_by`).
            num_calls: calls in the conversation so far, for the names of these.
        """
        thought, said = _split(opened + text)
        before = (opened + text)[: len(opened + text) - len(said)] if self.is_inline else ""
        reading = Found(said.strip()) if self.reader is None else self.reader(said, self.types)
        message: Message = {"role": "assistant", "content": before + reading.content}
        if not before and (thought := thought or reading.thought):
            message["reasoning_content"] = thought
        if reading.calls:
            message["tool_calls"] = [
                _call(number, *call) for number, call in enumerate(reading.calls, num_calls)
            ]
        if reading.malformed:
            message["malformed"] = reading.malformed
        return message


def _call(number: int, name: str, arguments: Mapping[str, Any]) -> Message:
    # Mistral's templates take nine letters and digits and nothing else.
    function = {"name": name, "arguments": dict(arguments)}
    return {"type": "function", "id": f"call{number:05d}", "function": function}


def _split(whole: str) -> tuple[str, str]:
    """(the thought before what is said, what is said). A thought that was cut is all there is."""
    for begin, end in MARKS:
        if begin.startswith("<|channel|>"):
            continue  # by the reader of its channels
        before, mark, after = whole.partition(end)
        is_open = whole.lstrip().startswith(begin)
        if mark and (is_open or begin not in before):
            return before.lstrip().removeprefix(begin).strip(), after
        if is_open:
            return whole.lstrip().removeprefix(begin).strip(), ""
    return "", whole
