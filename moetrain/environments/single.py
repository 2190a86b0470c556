"""No environment: an answer is one turn."""

from collections.abc import Mapping, Sequence
from typing import Any

from moetrain.data.messages import Message
from moetrain.environments.base import Silent, Tool


class Single(Silent):
    """Replies nothing."""

    tools: Sequence[Tool] = ()

    def reply(self, record: Mapping[str, Any], messages: Sequence[Message]) -> None:
        return None
