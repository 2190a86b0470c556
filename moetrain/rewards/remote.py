"""Requests to a server that can be slow, busy or wrong."""

import asyncio
import json
import os
import random
import zlib
from collections.abc import Coroutine, Iterable, Iterator
from typing import Any

import httpx

RETRIED = frozenset({408, 425, 429, 500, 502, 503, 504})
LONGEST_WAIT = 30.0  # seconds between two tries
MOST_BYTES = 16 << 20  # of an answer, as it travels and when it is unpacked


class RemoteError(Exception):
    """It gave no answer; `fault` is "timeout" or "error"."""

    def __init__(self, fault: str, detail: str):
        super().__init__(detail)
        self.fault = fault


class Remote:
    """A server's address and how to ask it: seconds for one try, in all, and further tries; most:
    bytes of an answer.
    """

    def __init__(
        self, url: str, key: str | None, seconds: float, retries: int, most: int = MOST_BYTES
    ):
        self.url = url.rstrip("/")
        self.most = most
        self.seconds, self.retries = seconds, retries
        self.headers = {"Accept-Encoding": "gzip"}  # what is unpacked here, within bounds
        if key is not None:
            self.headers["Authorization"] = f"Bearer {key}"

    @property
    def longest(self) -> float:
        """Seconds that `post` can take."""
        return (self.retries + 1) * self.seconds + self.retries * LONGEST_WAIT

    async def post(self, client: httpx.AsyncClient, path: str, body: object) -> Any:
        """The JSON it answers. Raises RemoteError; what will not pass is not tried again."""
        return await self._ask(client, "POST", path, body)

    async def get(self, client: httpx.AsyncClient, path: str) -> Any:
        """As `post`, of a page."""
        return await self._ask(client, "GET", path, None)

    async def _ask(self, client: httpx.AsyncClient, how: str, path: str, body: object) -> Any:
        trouble = RemoteError("error", "")
        wait = 0.0
        for attempt in range(self.retries + 1):
            if attempt:
                # Further apart each time, and not all at once.
                delay = max(wait, 0.5 * 2 ** (attempt - 1) * random.uniform(1.0, 1.5))
                await asyncio.sleep(min(delay, LONGEST_WAIT))
            wait = 0.0
            try:
                async with (
                    asyncio.timeout(self.seconds),
                    client.stream(
                        how, f"{self.url}/{path}", json=body, headers=self.headers
                    ) as answer,
                ):
                    content = await _content(answer, self.most)
                if answer.status_code < 300:
                    return json.loads(content)
            except _TooLarge as error:
                trouble = RemoteError("error", f"{self.url}: {error}")
                break
            except TimeoutError:
                trouble = RemoteError("timeout", f"{self.url}: no answer in {self.seconds:g} s")
                continue
            except (httpx.HTTPError, httpx.InvalidURL) as error:
                message = str(error) or type(error).__name__
                trouble = RemoteError("error", f"{self.url}: {message}")
                continue
            except (ValueError, RecursionError):
                trouble = RemoteError("error", f"{self.url}: its answer is not JSON")
                continue
            message = " ".join(content[:200].decode(errors="replace").split())
            trouble = RemoteError("error", f"{self.url}: {answer.status_code} {message}")
            if answer.status_code not in RETRIED:
                break
            given = answer.headers.get("Retry-After", "")
            wait = float(given) if given.isdecimal() else 0.0
        raise trouble


class _TooLarge(Exception):
    """An answer that nobody needs whole."""


async def _content(answer: httpx.Response, most: int) -> bytes:
    """What came, unpacked. httpx itself would unpack a block of 64 kB to 64 MB, and go on."""
    kind = answer.headers.get("Content-Encoding", "identity").strip().lower()
    if kind not in ("identity", "gzip"):
        raise _TooLarge(f"its answer is packed by {kind!r:.40}, which was not asked for")
    unpack = None if kind == "identity" else zlib.decompressobj(zlib.MAX_WBITS | 32)
    content = bytearray()
    travelled = 0
    async for block in answer.aiter_raw():
        travelled += len(block)
        try:
            room = most + 1 - len(content)
            content += block if unpack is None else unpack.decompress(block, room)
        except zlib.error as error:
            raise ValueError(str(error)) from None
        if max(travelled, len(content)) > most:
            raise _TooLarge(f"its answer is longer than {most >> 20} MiB")
    return bytes(content)


def as_they_come[T](runner: asyncio.Runner, asked: Iterable[Coroutine[Any, Any, T]]) -> Iterator[T]:
    """What all of `asked` return, what is first there first."""
    pending = {runner.get_loop().create_task(one) for one in asked}

    async def first() -> tuple[set[asyncio.Task[T]], set[asyncio.Task[T]]]:
        return await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)

    while pending:
        done, pending = runner.run(first())
        for task in done:
            yield task.result()


def about_key(name: str) -> str:
    """Where a server's key is read, for who could not reach it."""
    state = "is set" if os.environ.get(name) else "is not set"
    return f"key is read from the environment variable {name}, which {state}"


def models_in(listed: Any, where: str) -> dict[str, int | None]:
    """Name -> longest prompt of the models that a server lists. Raises RemoteError."""
    try:
        lengths = {str(one["id"]): one.get("max_model_len") for one in listed["data"]}
    except (KeyError, TypeError, AttributeError):
        raise RemoteError("error", f"{where}: {str(listed)[:100]} is no list of models") from None
    return {name: most if isinstance(most, int) else None for name, most in lengths.items()}
