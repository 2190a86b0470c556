"""Ports that are chosen before somebody listens there."""

import socket
from contextlib import ExitStack

import pytest

from moetrain import ports


def test_nobody_is_given_a_chosen_port() -> None:
    """A rank listens seconds after its port was chosen: meanwhile others ask the kernel for any."""
    chosen = {ports.free_port() for _ in range(20)}
    with ExitStack() as stack:
        for _ in range(2000):
            other = stack.enter_context(socket.socket())
            other.bind(("127.0.0.1", 0))
            assert other.getsockname()[1] not in chosen
        for port in chosen:
            listener = stack.enter_context(socket.socket())
            listener.bind(("127.0.0.1", port))


def test_one_that_is_taken_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ports, "FIRST", ports.free_port())
    monkeypatch.setattr(ports, "NUM", 1)
    assert ports.free_port() == ports.FIRST
    with socket.socket() as other:
        other.bind(("127.0.0.1", ports.FIRST))
        with pytest.raises(OSError, match="is free"):
            ports.free_port()
