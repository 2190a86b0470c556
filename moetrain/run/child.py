"""A process of our own that is told to stop when we are, and does not outlive us. No torch."""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from types import FrameType
from typing import IO, Any

from moetrain.parent import die_with

POLL_SECONDS = 0.1


class Children:
    """Runs one child after another. While it is entered, SIGTERM, SIGHUP and SIGUSR1 are handed on
    to the child in hand, and SIGINT as a SIGTERM, so that it saves and leaves; a second SIGINT
    kills it. `asked` lists what came.
    """

    def __init__(self) -> None:
        self.asked: list[int] = []
        self._child: subprocess.Popen[bytes] | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Children":
        numbers = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup
            numbers.append(signal.SIGHUP)
        self._before = {number: signal.signal(number, self._forward) for number in numbers}
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @property
    def exit_code(self) -> int:
        """Of a command that was told to stop: 130 for a Ctrl-C, else 143."""
        return 128 + (signal.SIGINT if signal.SIGINT in self.asked else signal.SIGTERM)

    def run(self, command: Sequence[str], log: IO[bytes], tick: Callable[[], None]) -> int:
        """Run `command` with its output in `log`, calling `tick` while it lasts; its exit code,
        128 + number for a signal.
        """
        self._child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a Ctrl-C in the terminal comes through us alone
            preexec_fn=die_with(os.getpid()),
        )
        if self.asked:  # between the last child and this one
            self._child.terminate()
        while (code := self._child.poll()) is None:
            time.sleep(POLL_SECONDS)
            tick()
        self._child = None
        return 128 - code if code < 0 else code

    def _forward(self, number: int, frame: FrameType | None) -> None:
        self.asked.append(number)
        child = self._child
        if child is None or child.poll() is not None:
            return
        gentle = signal.SIGTERM if number in (signal.SIGINT, signal.SIGHUP) else number
        child.send_signal(signal.SIGKILL if self.asked.count(signal.SIGINT) > 1 else gentle)
