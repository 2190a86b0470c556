"""One rollout server, started here or by `moetrain serve`: how to reach it, and how to make it
serve given weights from a fresh start.
"""

import sys
import time
from pathlib import Path
from typing import Protocol

from moetrain.errors import RolloutError
from moetrain.rollout.client import Client, ServerLost
from moetrain.rollout.process import Launch, ServerProcess

HEALTH_SECONDS = 10.0
POLL_SECONDS = 0.5


class Server(Protocol):
    """What a fleet is made of."""

    client: Client
    running: bool  # whether it can be pushed to as it is

    def begin(self) -> None:
        """Be there, without weights. Raises RolloutError."""
        ...

    def fresh(self, folder: Path, version: int) -> None:
        """Serve a Hugging Face folder by a process that has served nothing else. Raises
        RolloutError.
        """
        ...

    def close(self) -> None:
        """End what was started."""
        ...


class Started:
    """A server that is a process of ours."""

    def __init__(self, launch: Launch, timeout: float, start_timeout: float):
        self.launch, self.timeout, self.start_timeout = launch, timeout, start_timeout
        self.running = False
        self._process: ServerProcess | None = None

    def begin(self) -> None:
        self._begin(Path(self.launch.settings["base"]), None)

    def fresh(self, folder: Path, version: int) -> None:
        self._begin(folder, version)

    def _begin(self, model: Path, version: int | None) -> None:
        self.close()
        self._process = ServerProcess(self.launch, model, version)
        port = self._process.wait(self.start_timeout)
        assert port is not None
        self.client = Client(self.launch.address(port), self.launch.token, self.timeout)
        self.running = True

    def close(self) -> None:
        self.running = False
        if self._process is not None:
            self._process.kill()
            self._process = None


class Given:
    """A server at an address; `moetrain serve` starts it again when it ends or hangs."""

    def __init__(self, client: Client, start_timeout: float):
        self.client, self.start_timeout = client, start_timeout
        self.running = False
        self._pid: int | None = None

    def begin(self) -> None:
        self._until(None, None)

    def fresh(self, folder: Path, version: int) -> None:
        if self._pid is None:
            self._pid = self._alive()
        self.running = False
        self._until(folder, version)

    def _until(self, folder: Path | None, version: int | None) -> None:
        """Ask until another process than the one so far answers, and serves `version`."""
        deadline = time.monotonic() + self.start_timeout
        message = ""
        while time.monotonic() < deadline:
            try:
                health = self.client.get("/health", HEALTH_SECONDS)
                if folder is None or (health["pid"] != self._pid and health["version"] == version):
                    self._pid, self.running = health["pid"], True
                    return
                self.client.post("/reload", {"folder": str(folder), "version": version})
            except ServerLost as lost:
                if not message:
                    print(f"moetrain: waiting for a server: {lost}", file=sys.stderr, flush=True)
                message = str(lost)
            time.sleep(POLL_SECONDS)
        raise RolloutError(
            f"The server at {self.client.address} did not come back within"
            f" rollout.start_timeout={self.start_timeout:g} s ({message}). Start it with `moetrain"
            " serve`; then start this again, and it goes on with what it has sampled."
        )

    def _alive(self) -> int | None:
        try:
            return self.client.get("/health", HEALTH_SECONDS)["pid"]
        except ServerLost:
            return None

    def close(self) -> None:
        """It is not ours."""
