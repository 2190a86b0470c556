"""Requests dealt out to servers, and dealt out again when one is lost; an answer that has come is
never asked for again.
"""

import math
import secrets
import threading
from collections import deque
from collections.abc import Sequence
from itertools import groupby
from typing import Any

from moetrain.rollout.base import Request


class Deal:
    """The requests of one call, shared by a thread a server. Answers to one prompt stay together,
    since its keys and values are then computed once.
    """

    def __init__(
        self, requests: Sequence[Request], num_servers: int, *, more_may_come: bool = False
    ):
        self.name = secrets.token_hex(8)  # by which servers know what belongs together
        self.requests = list(requests)
        numbers = range(len(requests))
        groups = [list(group) for _, group in groupby(numbers, lambda i: requests[i].prompt.id)]
        self._share = max(1, math.ceil(len(groups) / num_servers))
        self._open = deque(groups)
        self._left = set(numbers)
        self._over = False
        self.is_stopped = False  # what is being drawn comes as far as it is
        self._more_may_come = more_may_come  # it ends when it is told to
        self._num_idle = 0  # threads that wait for something to do
        self._changed = threading.Condition(threading.RLock())

    def add(self, requests: Sequence[Request]) -> bool:
        """Further requests; whether a thread waits that takes them."""
        with self._changed:
            first = len(self.requests)
            self.requests += requests
            self._left.update(range(first, len(self.requests)))
            self._open.extend([number] for number in range(first, len(self.requests)))
            self._changed.notify_all()
            return self._num_idle > 0

    def take(self, room: int | None = None) -> list[int]:
        """A server's next requests, at most `room`; waits while others hold all that is left. Empty
        at the end.
        """
        with self._changed:
            self._num_idle += 1
            self._changed.wait_for(lambda: self._over or bool(self._open))
            self._num_idle -= 1
            if self._over:
                return []
            taken = [self._open.popleft() for _ in range(min(self._share, len(self._open)))]
            numbers = [number for group in taken for number in group]
            self.give_back(numbers[room:] if room is not None else [])
            return numbers[:room]

    def give_back(self, numbers: Sequence[int]) -> None:
        """Those of `numbers` that have no answer yet; another server, or the same, takes them."""
        with self._changed:
            left = [number for number in numbers if number in self._left]
            groups = groupby(left, lambda i: self.requests[i].prompt.id)
            self._open.extendleft([list(group) for _, group in groups][::-1])
            self._changed.notify_all()

    def finish(self, number: int) -> bool:
        """Whether this is the first answer to a request."""
        with self._changed:
            first = number in self._left
            self._left.discard(number)
            if not self._left and not self._more_may_come:
                self.end()
            return first

    def end(self) -> None:
        """Nothing more is taken."""
        with self._changed:
            self._over = True
            self._changed.notify_all()

    def stop(self) -> None:
        """As `end`; what has been taken still comes, as far as it is."""
        self.is_stopped = True
        self.end()

    @property
    def over(self) -> bool:
        return self._over


def as_json(number: int, request: Request) -> dict[str, Any]:
    """A request as the server reads it."""
    sampling = request.sampling
    return {
        "number": number,
        "tokens": request.given,
        "seed": request.seed,
        "max_tokens": request.room,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p,
        "repetition_penalty": sampling.repetition_penalty,
        "stop_ids": sampling.stop_ids,
        "stop": sampling.stop,
        "routes": sampling.routes,
        "kept": sampling.kept,
    }
