"""The endpoint of `moetrain serve --reward-model`, which says what vLLM 0.32 says of such a model:

POST /classify    {"input": [[ids], ...], "use_activation": false}: the scalar of each row, or its
                  sigmoid, which is vLLM's default
POST /tokenize    {"prompt": text, "add_special_tokens": false}: its ids
GET  /v1/models   the one that is served, and the longest row
GET  /health      for whoever has no token; all other pages want it
"""

import hmac
import math
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from socketserver import TCPServer
from typing import Any, Protocol, cast

from moetrain.loops.agent_api import Refused
from moetrain.loops.json_server import JsonHandler, JsonServer

MODEL = "moetrain"
MOST_BYTES = 16 << 20  # of a body
MOST_ROWS = 1024  # of a request
MOST_CONNECTIONS = 512
REQUEST_SECONDS = 30.0  # until a request has come whole
LONGEST_TEXT = 10_000  # characters, of a text to tokenise


class Scorer(Protocol):
    """What is behind the endpoint. Called by many threads."""

    @property
    def longest(self) -> int: ...

    @property
    def vocab(self) -> int: ...

    def tokenize(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Its ids. Raises Refused without a tokenizer."""
        ...

    def ask(self, rows: Sequence[Sequence[int]]) -> list[float]:
        """The scalar of each row, when it is computed. Raises Refused."""
        ...


class RewardServer:
    """Serves `scorer` at `address` until `close`. Raises OSError where it cannot listen."""

    def __init__(self, scorer: Scorer, host: str, port: int, token: str):
        self._server = _Server(host, port)
        self._server.scorer, self._server.token = scorer, token
        name = f"[{host}]" if ":" in host else host
        self.address = f"http://{name}:{self._server.server_address[1]}"
        self._is_over = threading.Event()
        self._threads = [
            threading.Thread(target=target, args=args, daemon=True, name="reward model")
            for target, args in ((self._server.serve_forever, (0.1,)), (self._reap, ()))
        ]
        for thread in self._threads:
            thread.start()

    def _reap(self) -> None:
        """Let connections go whose request has not come in time, however slowly it trickles."""
        while not self._is_over.wait(1.0):
            self._server.reap(time.monotonic())

    def close(self) -> None:
        """Take no more requests."""
        self._is_over.set()
        self._server.shutdown()
        self._server.server_close()
        for thread in self._threads:
            thread.join()


class _Server(JsonServer):
    scorer: Scorer
    token: str

    def __init__(self, host: str, port: int):
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.lock = threading.Lock()
        self.expected: dict[socket.socket, float] = {}  # a request, until then
        self.num_open = 0
        super().__init__((host, port), _Handler)

    def server_bind(self) -> None:
        """Without looking up the host's name, which takes seconds where no DNS answers."""
        TCPServer.server_bind(self)

    def verify_request(self, request: Any, client_address: Any) -> bool:
        with self.lock:
            is_room = self.num_open < MOST_CONNECTIONS
            self.num_open += is_room
        return is_room

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            with self.lock:
                self.num_open -= 1
                self.expected.pop(request, None)

    def expect(self, connection: socket.socket, until: float | None) -> None:
        """A request has to be there by then; None: it is."""
        with self.lock:
            if until is None:
                self.expected.pop(connection, None)
            else:
                self.expected[connection] = until

    def reap(self, now: float) -> None:
        """Close what is late."""
        with self.lock:
            for connection in [one for one, until in self.expected.items() if until < now]:
                del self.expected[connection]
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)


class _Handler(JsonHandler):
    timeout = REQUEST_SECONDS
    most_bytes = MOST_BYTES

    @property
    def own(self) -> _Server:
        return cast(_Server, self.server)

    def handle_one_request(self) -> None:
        self.own.expect(self.connection, time.monotonic() + REQUEST_SECONDS)
        super().handle_one_request()

    def do_GET(self) -> None:
        self._answer(lambda: self._page(self.path.partition("?")[0]))

    def do_POST(self) -> None:
        page = {"/classify": classify, "/tokenize": tokenize}.get(self.path.partition("?")[0])
        self._answer(lambda: self._asked(page))

    def _answer(self, found: Callable[[], Mapping[str, Any]]) -> None:
        try:
            content = found()
        except Refused as refused:
            return self.refuse(refused)
        return self.say(200, content)

    def _page(self, path: str) -> Mapping[str, Any]:
        self.own.expect(self.connection, None)
        if path == "/health":
            return {}
        self._check_token()
        if path != "/v1/models":
            raise Refused(404, f"there is no {self.path[:100]}", "not_found")
        model = {"id": MODEL, "object": "model", "created": 0, "owned_by": MODEL}
        model["max_model_len"] = self.own.scorer.longest
        return {"object": "list", "data": [model]}

    def _asked(
        self, page: "Callable[[Scorer, Any], Mapping[str, Any]] | None"
    ) -> Mapping[str, Any]:
        self._check_token()
        if page is None:
            self.close_connection = True  # its body is not read
            raise Refused(404, f"there is no {self.path[:100]}", "not_found")
        body = self.body()
        self.own.expect(self.connection, None)
        return page(self.own.scorer, body)

    def _check_token(self) -> None:
        given = self.headers.get("Authorization", "").encode(errors="replace")
        if not hmac.compare_digest(given, f"Bearer {self.own.token}".encode()):
            self.close_connection = True
            raise Refused(401, "the token is missing or wrong", "no_token")


def classify(scorer: Scorer, body: Any) -> Mapping[str, Any]:
    """The answer to a body of /classify. Raises Refused."""
    rows = rows_of(scorer, _object(body))
    raw = body.get("use_activation") is False
    scores = scorer.ask(rows)
    shown = [score if raw else _sigmoid(score) for score in scores]
    data = [
        {"index": i, "label": "LABEL_0", "probs": [one], "num_classes": 1}
        for i, one in enumerate(shown)
    ]
    num = sum(map(len, rows))
    usage = {"prompt_tokens": num, "total_tokens": num}
    return {"object": "list", "model": MODEL, "data": data, "usage": usage}


def rows_of(scorer: Scorer, body: Mapping[str, Any]) -> list[list[int]]:
    """What is to be scored. Raises Refused where that cannot be."""
    if body.get("model") not in (None, MODEL):
        raise Refused(404, f"the model {body['model']!s:.100} is not here, {MODEL} is")
    odd = next((key for key in ("truncate_prompt_tokens", "messages") if body.get(key)), None)
    if odd is not None:
        raise Refused(400, f"{odd} is not known here: give rows of token ids as `input`")
    rows: Any = body.get("input")
    if isinstance(rows, list) and rows and not isinstance(rows[0], list):
        rows = [rows]
    if not isinstance(rows, list) or not rows:
        raise Refused(400, "`input` has to be rows of token ids")
    if len(rows) > MOST_ROWS:
        raise Refused(413, f"{len(rows)} rows, and a request may have {MOST_ROWS}", "too_large")
    for row in rows:
        if not isinstance(row, list) or not row or not all(type(token) is int for token in row):
            raise Refused(400, "`input` has to be rows of token ids, none of them empty")
        if len(row) > scorer.longest:
            raise Refused(
                400, f"a row of {len(row)} tokens, and {scorer.longest} are the most (data.seq_len)"
            )
        bad = next((token for token in row if not 0 <= token < scorer.vocab), None)
        if bad is not None:
            raise Refused(400, f"token {bad} is not in the vocabulary of {scorer.vocab}")
    return rows


def tokenize(scorer: Scorer, body: Any) -> Mapping[str, Any]:
    """The answer to a body of /tokenize. Raises Refused."""
    text = _object(body).get("prompt")
    if not isinstance(text, str) or len(text) > LONGEST_TEXT:
        raise Refused(400, f"`prompt` has to be a text of at most {LONGEST_TEXT} characters")
    special = body.get("add_special_tokens", True) is not False
    tokens = scorer.tokenize(text, add_special_tokens=special)
    return {"count": len(tokens), "max_model_len": scorer.longest, "tokens": tokens}


def _object(body: Any) -> Mapping[str, Any]:
    if not isinstance(body, Mapping):
        raise Refused(400, str(body)[:200] if isinstance(body, str) else "the body is no object")
    return cast(Mapping[str, Any], body)


def _sigmoid(score: float) -> float:
    if score < 0:
        return math.exp(score) / (1 + math.exp(score))
    return 1 / (1 + math.exp(-score))
