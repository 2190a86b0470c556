"""Requests to a server that can be slow, busy or wrong."""

import asyncio
import random
from typing import Any

import httpx

RETRIED = frozenset({408, 425, 429, 500, 502, 503, 504})
LONGEST_WAIT = 30.0  # seconds between two tries


class RemoteError(Exception):
    """It gave no answer; `fault` is "timeout" or "error"."""

    def __init__(self, fault: str, detail: str):
        super().__init__(detail)
        self.fault = fault


class Remote:
    """A server's address and how to ask it: seconds for one try, in all, and further tries."""

    def __init__(self, url: str, key: str | None, seconds: float, retries: int):
        self.url = url.rstrip("/")
        self.seconds, self.retries = seconds, retries
        self.headers = {} if key is None else {"Authorization": f"Bearer {key}"}

    @property
    def longest(self) -> float:
        """Seconds that `post` can take."""
        return (self.retries + 1) * self.seconds + self.retries * LONGEST_WAIT

    async def post(self, client: httpx.AsyncClient, path: str, body: object) -> Any:
        """The JSON it answers. Raises RemoteError; what will not pass is not tried again."""
        trouble = RemoteError("error", "")
        wait = 0.0
        for attempt in range(self.retries + 1):
            if attempt:
                # Further apart each time, and not all at once.
                delay = max(wait, 0.5 * 2 ** (attempt - 1) * random.uniform(1.0, 1.5))
                await asyncio.sleep(min(delay, LONGEST_WAIT))
            wait = 0.0
            try:
                async with asyncio.timeout(self.seconds):
                    answer = await client.post(
                        f"{self.url}/{path}", json=body, headers=self.headers
                    )
                if answer.status_code < 300:
                    return answer.json()
            except TimeoutError:
                trouble = RemoteError("timeout", f"{self.url}: no answer in {self.seconds:g} s")
                continue
            except (httpx.HTTPError, httpx.InvalidURL) as error:
                said = str(error) or type(error).__name__
                trouble = RemoteError("error", f"{self.url}: {said}")
                continue
            except ValueError:
                trouble = RemoteError("error", f"{self.url}: its answer is not JSON")
                continue
            said = " ".join(answer.text[:200].split())
            trouble = RemoteError("error", f"{self.url}: {answer.status_code} {said}")
            if answer.status_code not in RETRIED:
                break
            given = answer.headers.get("Retry-After", "")
            wait = float(given) if given.isdigit() else 0.0
        raise trouble
