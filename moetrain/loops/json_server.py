"""What the project's HTTP endpoints in OpenAI's form share: JSON in and out, refusals, limits."""

import json
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from moetrain.data.parsing import parse_json
from moetrain.loops.agent_api import Refused

MOST_BYTES = 32 << 20  # of a body
READ_SECONDS = 30.0  # without a byte of a request; an answer may take as long as it does


class JsonServer(ThreadingHTTPServer):
    """A thread for each connection, which may be kept."""

    daemon_threads = True
    block_on_close = False  # a client may keep a connection open
    request_queue_size = 1024

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A connection that its client has dropped is no news."""


class JsonHandler(BaseHTTPRequestHandler):
    """Reads and writes JSON."""

    protocol_version = "HTTP/1.1"  # connections are kept
    timeout = READ_SECONDS
    disable_nagle_algorithm = True
    most_bytes = MOST_BYTES

    def body(self) -> Any:
        """What the body says; its text where that is no JSON. Raises Refused."""
        length = self.headers.get("Content-Length", "")[:20]
        if not length.isdecimal() or int(length) > self.most_bytes:
            self.close_connection = True  # what is left of it is not read
        if not length.isdecimal():
            raise Refused(411, "a body's Content-Length is wanted")
        if int(length) > self.most_bytes:
            raise Refused(413, f"a body of more than {self.most_bytes >> 20} MiB", "too_large")
        raw = self.rfile.read(int(length))
        try:
            return parse_json(raw) if raw else {}
        except ValueError as error:
            return f"the body is {error}"

    def refuse(self, refused: Refused) -> None:
        """Say why not."""
        error = {"message": str(refused), "type": "invalid_request_error", "code": refused.code}
        self.say(refused.status, {"error": error})

    def say(self, status: int, content: Mapping[str, Any]) -> None:
        """Answer."""
        self.send(status, "application/json", json.dumps(content).encode())

    def send(self, status: int, kind: str, raw: bytes) -> None:
        """Answer with content of `kind`."""
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(raw)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(raw)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: a run's output is not a server's log."""
