"""What stands between the network and the engine: a token, sizes, and times. Written for uvicorn
0.54, which has no limit on a body and none on how long a request may take to come.
"""

import asyncio
import hmac
import json
from typing import Any

HEAD_SECONDS = 10.0  # until a request's head has come whole
MOST_WAITING = 64  # connections whose head has not; of more the oldest goes
BODY_SECONDS = 300.0  # until its body has
MIB = 1 << 20


class Refused(Exception):
    """A request that cannot be served; the text and the status go to the caller."""

    def __init__(self, status: int, text: str, **more: Any):
        super().__init__(text)
        self.status, self.more = status, more


class Guard:
    """Lets nothing through without the token, paths that do not exist included."""

    def __init__(self, app: Any, token: str):
        self.app, self.wanted = app, f"Bearer {token}".encode()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        from starlette.responses import JSONResponse

        given = dict(scope.get("headers", [])).get(b"authorization", b"")
        if scope["type"] == "http" and hmac.compare_digest(given, self.wanted):
            await self.app(scope, receive, send)
        elif scope["type"] == "http":
            await JSONResponse({"error": "the token is missing or wrong"}, 401)(
                scope, receive, send
            )
        else:
            raise RuntimeError(f"no {scope['type']} here")


async def body_of(request: Any, most: int) -> dict[str, Any]:
    """The JSON object that a request brings, of at most so many bytes. Raises Refused."""
    packed = request.headers.get("content-encoding", "identity")
    if packed != "identity":
        raise Refused(415, f"bodies are not unpacked here (Content-Encoding: {packed:.40})")
    content = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for block in request.stream():
                content += block
                if len(content) > most:
                    raise Refused(413, f"a body of more than {most / MIB:.0f} MiB")
    except TimeoutError:
        raise Refused(408, f"a body that did not come within {BODY_SECONDS:g} s") from None
    try:
        body = json.loads(bytes(content))
    except (ValueError, RecursionError) as error:
        raise Refused(400, f"a body that is not JSON: {error}") from None
    if not isinstance(body, dict):
        raise Refused(400, "a body that is no JSON object")
    return body


def protocol() -> type[asyncio.Protocol]:
    """uvicorn's HTTP, which gives a connection so long, and so many of them room, to say what it
    wants. Each has one request.
    """
    from uvicorn.protocols.http.h11_impl import H11Protocol

    waiting: dict[Any, asyncio.TimerHandle] = {}

    class Brief(H11Protocol):
        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            if len(waiting) >= MOST_WAITING:
                next(iter(waiting)).drop()
            waiting[self] = self.loop.call_later(HEAD_SECONDS, self.drop)

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self.cycle is not None:
                self._said()

        def connection_lost(self, exc: Exception | None) -> None:
            super().connection_lost(exc)
            self._said()

        def drop(self) -> None:
            self._said()
            self.transport.abort()

        def _said(self) -> None:
            timer = waiting.pop(self, None)
            if timer is not None:
                timer.cancel()

    return Brief
