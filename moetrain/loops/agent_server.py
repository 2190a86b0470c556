"""The endpoint in OpenAI's form through which agents speak to the model, on this machine alone.

POST /v1/chat/completions   a turn (`agent_api.py`); the session is named by the API key, or by
                            the header X-Session-Id
POST /v1/reward             {"reward": number}: of the session; the last one counts
POST /v1/end                the same, and the session has ended (`moetrain serve --agents`)
GET  /v1/models             the one that is served
"""

import json
import threading
from collections.abc import Iterable, Mapping
from typing import Any, Protocol, cast

from moetrain.loops.agent_api import Refused, chunks_of, wants_usage
from moetrain.loops.json_server import JsonHandler, JsonServer

MODEL = "moetrain"
HEADER = "X-Session-Id"


class Door(Protocol):
    """What is behind the endpoint. Called by many threads; raises Refused."""

    def session_of(self, given: Mapping[str, str]) -> str:
        """The session that a request's headers name."""
        ...

    def chat(self, session: str, body: Any) -> Mapping[str, Any]:
        """The answer to a request for a turn, when it is drawn."""
        ...

    def reward(self, session: str, body: Any, *, ends: bool) -> None:
        """Take a session's reward, and its end."""
        ...


class AgentServer:
    """Serves `door` at `base_url` until `close`. Raises OSError where the port is taken."""

    def __init__(self, door: Door, port: int = 0):
        self._server = _Server(("127.0.0.1", port), _Handler)
        self._server.door = door
        self.base_url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.1,), daemon=True, name="agents"
        )
        self._thread.start()

    def close(self) -> None:
        """Take no more requests."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Server(JsonServer):
    door: Door


class _Handler(JsonHandler):
    def do_GET(self) -> None:
        if self.path.rstrip("/") == "/v1/models":
            model = {"id": MODEL, "object": "model", "created": 0, "owned_by": MODEL}
            self.say(200, {"object": "list", "data": [model]})
        else:
            self.refuse(Refused(404, f"there is no {self.path[:100]}", "not_found"))

    def do_POST(self) -> None:
        door = cast(_Server, self.server).door
        try:
            body = self.body()
            what = self.path.partition("?")[0].rstrip("/")
            if what not in ("/v1/chat/completions", "/v1/reward", "/v1/end"):
                raise Refused(404, f"there is no {self.path[:100]}", "not_found")
            session = door.session_of({name: str(self.headers[name]) for name in self.headers})
            if what == "/v1/chat/completions":
                answer = door.chat(session, body)
                if body.get("stream"):
                    self._stream(chunks_of(answer, with_usage=wants_usage(body)))
                else:
                    self.say(200, answer)
            else:
                door.reward(session, body, ends=what == "/v1/end")
                self.say(200, {})
        except Refused as refused:
            self.refuse(refused)

    def _stream(self, chunks: Iterable[Any]) -> None:
        """All events at once: an answer that is drawn has a status, and one that is not is told
        why.
        """
        events = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks)
        self.send(200, "text/event-stream", f"{events}data: [DONE]\n\n".encode())


def named_sessions(given: Mapping[str, str]) -> tuple[str, ...]:
    """What headers may name as a session: X-Session-Id, then the API key. Raises Refused where
    there is neither.
    """
    lower = {name.lower(): value for name, value in given.items()}
    scheme, _, key = lower.get("authorization", "").partition(" ")
    named = (lower.get(HEADER.lower(), ""), key.strip() if scheme.lower() == "bearer" else "")
    if not any(named):
        raise Refused(401, f"which session? Give it as API key, or as {HEADER}", "no_session")
    return tuple(filter(None, named))
