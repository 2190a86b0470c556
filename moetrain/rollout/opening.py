"""A fleet as a recipe asks for it, and one server for `rollout.address`."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from moetrain.config.recipe import Recipe
from moetrain.config.rollout import MOST_KEPT, RolloutConfig
from moetrain.data.run_tokenizer import tokenizer_of
from moetrain.errors import RolloutError
from moetrain.rollout.client import Client
from moetrain.rollout.fleet import Fleet
from moetrain.rollout.process import Launch, interpreter, token_of
from moetrain.rollout.servers import Given, Server, Started
from moetrain.rollout.transfer import Ipc, Nccl, Transfer

DTYPES = {"fp32": "float32", "bf16": "bfloat16"}  # as vLLM names them


def check_fleet(recipe: Recipe) -> None:
    """Raises RolloutError when this machine lacks what starts or reaches the recipe's servers."""
    _, rollout = recipe.sampling
    way_of(rollout)
    if rollout.address:
        token_of(rollout.token_file, make=False)
    else:
        interpreter(rollout.python)


def open_fleet(recipe: Recipe, hf: dict[str, Any], tokenizer: Path) -> Fleet:
    """A run's servers; the first push starts those that are not there. Raises RolloutError."""
    _, rollout = recipe.sampling
    folder = recipe.run_dir.absolute() / "servers"
    way = way_of(rollout)
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    servers: list[Server] = []
    if rollout.address:
        token = token_of(rollout.token_file, make=False)
        for address in rollout.address:
            server = Given(Client(address, token, rollout.timeout), rollout.start_timeout)
            server.begin()
            servers.append(server)
    else:
        launch = launch_of(recipe, hf, folder, token_of(rollout.token_file, make=True), way, {})
        for number in range(rollout.num_servers):
            server_launch = replace(
                launch, folder=folder / str(number), env=env_of(rollout, way, number, behind=ranks)
            )
            servers.append(Started(server_launch, rollout.timeout, rollout.start_timeout))
    transfers: dict[str, Transfer | None] = {
        "file": None,
        "nccl": Nccl(rollout.tensor_parallel, rollout.start_timeout),
        "ipc": Ipc(rollout.start_timeout),
    }
    return Fleet(servers, folder / "weights", hf, tokenizer, rollout.start_timeout, transfers[way])


def way_of(rollout: RolloutConfig) -> str:
    """How weights are pushed."""
    import torch

    if rollout.push == "auto":
        return "nccl" if torch.accelerator.is_available() else "file"
    if rollout.push != "file" and not torch.accelerator.is_available():
        raise RolloutError(f"rollout.push={rollout.push} needs GPUs. Take file, or leave it out.")
    return rollout.push


def launch_of(
    recipe: Recipe,
    hf: dict[str, Any],
    folder: Path,
    token: str,
    way: str,
    env: dict[str, str],
    port: int = 0,
) -> Launch:
    """How the recipe's servers are started; `folder` takes the model's config."""
    _, rollout = recipe.sampling
    python = interpreter(rollout.python)
    base = folder / "model"
    base.mkdir(parents=True, exist_ok=True)
    (base / "config.json").write_text(json.dumps(hf))
    engine = {
        "dtype": DTYPES[recipe.model.dtype],
        "tensor_parallel_size": rollout.tensor_parallel,
        "gpu_memory_utilization": rollout.gpu_memory,
    }
    settings = {
        "base": str(base),
        "host": rollout.host,
        "port": port,
        "routes": rollout.routing_replay,
        "transfer": None if way == "file" else way,
        "max_queue": rollout.max_queue,
        # vLLM reads text for stop strings alone.
        "tokenizer": str(tokenizer_of(recipe).absolute()) if rollout.stop else None,
        "most_kept": MOST_KEPT,
        "engine": engine | rollout.engine_args,
    }
    return Launch(python, folder, settings, token, env)


def env_of(rollout: RolloutConfig, way: str, number: int, *, behind: int) -> dict[str, str]:
    """Which GPUs server `number` of this machine has: the first rank's own, or its share of those
    behind the first `behind`. Raises RolloutError.
    """
    import torch

    count = torch.accelerator.device_count()
    if not count:
        return {}
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(count)))).split(",")
    if way == "ipc":
        devices = visible[:1]
        return {"CUDA_VISIBLE_DEVICES": devices[0], "VLLM_ALLOW_INSECURE_SERIALIZATION": "1"}
    first = behind + number * rollout.tensor_parallel
    devices = visible[first : first + rollout.tensor_parallel]
    if len(devices) < rollout.tensor_parallel:
        raise RolloutError(
            f"Server {number} needs {rollout.tensor_parallel} GPUs after the first {first};"
            f" {len(visible)} are visible here. Start fewer ranks or servers, give"
            " rollout.address, or take rollout.push=ipc."
        )
    return {"CUDA_VISIBLE_DEVICES": ",".join(devices)}
