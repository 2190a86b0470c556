"""Requests that come while others are drawn: further turns of trajectories that an environment has
replied to.
"""

import threading
from collections.abc import Callable

from moetrain.rollout.base import Request


class FollowUps:
    """Between who replies and the engine that draws; for use by several threads.

    What is drawn and waits for a reply is `asked` for, and then `settled`: with a request for the
    next turn, or with None.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._num_asked = 0
        self._requests: list[Request] = []
        self._problem: BaseException | None = None
        self.listener: Callable[[], None] = lambda: None  # called after whatever has changed

    def ask(self) -> None:
        """An answer that was drawn may go on."""
        with self._changed:
            self._num_asked += 1

    def settle(self, request: Request | None) -> None:
        """It goes on with `request`, or has ended."""
        with self._changed:
            self._num_asked -= 1
            if request is not None:
                self._requests.append(request)
            self._changed.notify_all()
        self.listener()

    def fail(self, problem: BaseException) -> None:
        """There are no replies any more."""
        with self._changed:
            self._problem = problem
            self._changed.notify_all()
        self.listener()

    @property
    def is_open(self) -> bool:
        """Whether a request is there, or may come without anything further being drawn."""
        with self._changed:
            return bool(self._num_asked or self._requests or self._problem)

    def take(self) -> list[Request]:
        """The requests that have come by now. Raises what `fail` was given."""
        with self._changed:
            if self._problem is not None:
                raise self._problem
            taken, self._requests = self._requests, []
            return taken

    def take_round(self) -> list[Request]:
        """All requests of the answers so far, once none waits for a reply; in the order of their
        prompts and indexes, whatever came first. Empty where none goes on.
        """
        with self._changed:
            self._changed.wait_for(lambda: not self._num_asked or self._problem is not None)
        return sorted(self.take(), key=lambda request: (request.prompt.id, request.index))
