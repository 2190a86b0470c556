"""`moetrain serve`: one server for another process's `rollout.address`, started again whenever it
ends or hangs.
"""

import signal
import threading
import time
from pathlib import Path
from typing import Any

from moetrain.config.recipe import Recipe
from moetrain.errors import RolloutError
from moetrain.rollout.client import Client, ServerLost
from moetrain.rollout.opening import env_of, launch_of, token_of, way_of
from moetrain.rollout.process import ServerProcess, interpreter

LOOK_SECONDS = 2.0
SHORT_SECONDS = 10.0  # a server that lives no longer than this, three times, has a lasting problem
MAX_SHORT = 3


def serve(recipe: Recipe, hf: dict[str, Any], port: int) -> int:
    """Serve until SIGTERM or SIGINT. `hf` is the model's config; weights come with pushes.

    Raises RolloutError.
    """
    _, rollout = recipe.sampling
    if rollout.address:
        raise RolloutError("rollout.address is for the trainer; a server has rollout.host.")
    way = way_of(rollout)
    if way == "ipc":
        raise RolloutError("rollout.push=ipc: the trainer starts that server itself.")
    token = token_of(rollout.token_file, make=rollout.token_file is not None)
    interpreter(rollout.python)
    folder = recipe.run_dir.absolute() / "servers" / f"port{port}"
    launch = launch_of(recipe, hf, folder, token, way, env_of(rollout, way, 0, behind=0), port)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    model, version = Path(launch.settings["base"]), None
    short = 0
    while not stop.is_set():
        process = ServerProcess(launch, model, version)
        began = time.monotonic()
        try:
            _watch(process, Client(launch.address(port), token, rollout.timeout), recipe, stop)
            model, version = process.wanted()
        finally:
            process.kill()
        short = short + 1 if time.monotonic() < began + SHORT_SECONDS else 0
        if short == MAX_SHORT:
            raise RolloutError(f"The server ended {short} times at once: see {launch.log}.")
    return 0


def _watch(process: ServerProcess, client: Client, recipe: Recipe, stop: threading.Event) -> None:
    """Until the server ends, hangs or is to end."""
    _, rollout = recipe.sampling
    print(f"starting a server at {client.address}, log: {process.launch.log}", flush=True)
    port = process.wait(rollout.start_timeout, stop)
    if port is not None:
        print(f"ready at {client.address}", flush=True)
    while not (stop.wait(LOOK_SECONDS) or process.ended):
        try:
            client.get("/health")
        except ServerLost as lost:
            print(f"lost: {lost}", flush=True)
            return
