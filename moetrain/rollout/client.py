"""Calls to one rollout server: the token on each, a timeout on each, and errors that say whether
the server or the request is at fault.
"""

import http.client
import json
import select
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

from moetrain.errors import RolloutError

CONNECT_SECONDS = 10.0
MOST_BYTES = 256 << 20  # of an answer, and of a line of one: routes of 32,000 tokens are 30 MB


class ServerLost(Exception):
    """A server that is dead, hung, or not in its right mind; `fault` is what the ledger counts."""

    def __init__(self, fault: str, text: str):
        super().__init__(text)
        self.fault = fault


class QueueFull(Exception):
    """The server has more to do than it takes; `room` requests would be let in."""

    def __init__(self, room: int):
        super().__init__(f"room for {room}")
        self.room = room


class Client:
    """One server.

    Args:
        address: http://HOST:PORT.
        token: sent with every call.
        timeout: seconds between two signs of life.
    """

    def __init__(self, address: str, token: str, timeout: float):
        parts = urlsplit(address)
        try:
            port = parts.port
        except ValueError:  # no number, or too large a one
            port = None
        if parts.scheme != "http" or not parts.hostname or not port:
            raise RolloutError(f"rollout.address: {address!r} is not http://HOST:PORT.")
        self.address, self.timeout = address, timeout
        self.place = (parts.hostname, port)
        self._headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}

    def get(self, path: str, timeout: float | None = None) -> dict[str, Any]:
        """The answer to a GET."""
        return self._json("GET", path, None, timeout)

    def post(
        self, path: str, body: Mapping[str, Any] | None = None, timeout: float | None = None
    ) -> dict[str, Any]:
        """The answer to a POST. One that may take more seconds than `timeout` is waited for while
        the server says on /health that it lives.
        """
        return self._json("POST", path, body or {}, timeout)

    def stream(self, path: str, body: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """The lines of an answer as they come. Raises QueueFull, ServerLost, RolloutError."""
        with self._call("POST", path, body, None) as response:
            while line := response.readline(MOST_BYTES + 1):
                if line.strip() or len(line) > MOST_BYTES:
                    yield _object(line)

    def _json(
        self, method: str, path: str, body: Mapping[str, Any] | None, timeout: float | None
    ) -> dict[str, Any]:
        with self._call(method, path, body, timeout) as response:
            return _object(response.read(MOST_BYTES + 1))

    @contextmanager
    def _call(
        self, method: str, path: str, body: Mapping[str, Any] | None, timeout: float | None
    ) -> Iterator[http.client.HTTPResponse]:
        seconds = self.timeout if timeout is None else timeout
        connection = http.client.HTTPConnection(*self.place, timeout=min(seconds, CONNECT_SECONDS))
        try:
            connection.connect()
            assert connection.sock is not None
            connection.sock.settimeout(seconds)
            data = None if body is None else json.dumps(body)
            connection.request(method, path, body=data, headers=self._headers)
            self._wait_for_life(connection.sock, path, seconds)
            response = connection.getresponse()
            if response.status != 200:
                self._raise(path, response)
            yield response
        except TimeoutError as error:
            text = f"{self.address}{path}: no sign of life for {seconds:g} s"
            raise ServerLost("timeout", text) from error
        except (OSError, http.client.HTTPException, ValueError, TypeError) as error:
            text = f"{self.address}{path}: {type(error).__name__} {error}"
            raise ServerLost("dead", text) from error
        finally:
            connection.close()

    def _wait_for_life(self, sock: socket.socket, path: str, seconds: float) -> None:
        """Until there is something to read, or `seconds` are over. A server that hung since its
        last answer would otherwise keep a push for as long as a push may take.
        """
        end = time.monotonic() + seconds
        while time.monotonic() + self.timeout < end:
            if select.select([sock], [], [], self.timeout)[0]:
                return
            self.get("/health")

    def _raise(self, path: str, response: http.client.HTTPResponse) -> None:
        message = _object(response.read(MOST_BYTES + 1))
        text = f"{self.address}{path}: {message.get('error', response.status)}"
        match response.status:
            case 401:
                raise RolloutError(
                    f"{text}. Give the token that the server was started with, in"
                    " MOETRAIN_ROLLOUT_TOKEN or rollout.token_file."
                )
            case 429:
                raise QueueFull(int(message.get("room", 0)))
            case 409 | 422 | 500:
                raise ServerLost("refused", text)
            case _:
                raise RolloutError(f"{text}.")


def _object(content: bytes) -> dict[str, Any]:
    """The JSON object that a server says. ValueError for anything else: it is not ours."""
    if len(content) > MOST_BYTES:
        raise ValueError(f"an answer of more than {MOST_BYTES >> 20} MiB")
    try:
        message = json.loads(content)
    except RecursionError:
        raise ValueError("an answer that is nested too deep") from None
    if not isinstance(message, dict):
        raise ValueError(f"{str(message)[:80]} in place of an object")
    return message
