"""What an environment adds to prompts."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from moetrain.data.formats import name_of, template_kwargs_of
from moetrain.data.messages import FormatError, Message


@dataclass(frozen=True)
class Scene:
    """What an environment adds to prompts: the tools on offer, and what it says first."""

    tools: tuple[Mapping[str, Any], ...] = ()
    # To a record's columns, `prompt` its messages. FormatError where it cannot begin.
    opening: Callable[[Mapping[str, Any]], list[Message]] | None = None
    has_turns: bool = False  # it replies, which takes messages

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
