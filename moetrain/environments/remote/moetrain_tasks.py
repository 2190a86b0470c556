"""Plays the tasks of a taskset of `verifiers`, in the interpreter that has that package.

    python moetrain_tasks.py '{"taskset": ID or FILE.py, "env": {...}}'

A line of JSON on the input is a request, a line on the output its answer; what tasks print goes to
the error output. {"error": TEXT} answers what cannot be done.

    (the start)                         {"version": of verifiers, "bounded": whether tasks end}
    {"task": N}                         {"row": {...}}; {"row": null} after the last
    {"task": N, "key": KEY,
     "base_url": U, "session": S}       {"reward": number, or null}
"""

import asyncio
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import verifiers
import verifiers.v1 as vf
from verifiers.v1.configs.agent import agent_config_fields
from verifiers.v1.configs.env import EnvConfig
from verifiers.v1.env import Env, RunSlot
from verifiers.v1.types import content_text
from verifiers.v1.utils.generic import concrete_type
from verifiers.v1.utils.loaders import environment_class, load_environment

SESSIONS = 64  # after which what serves them is closed: it keeps a client for each
PLAY = ("key", "base_url", "session")


class Player:
    """One environment and its tasks."""

    def __init__(self, taskset: str, env: dict[str, Any]):
        if taskset.endswith(".py"):
            path = Path(taskset).expanduser().resolve()
            sys.path.insert(0, str(path.parent))
            taskset = path.stem
        own = {**env, "taskset": {**env.get("taskset", {}), "id": taskset}}
        kind = environment_class(taskset, env.get("id", ""))
        config = (concrete_type(kind, EnvConfig, origin=Env) or EnvConfig).model_validate(own)
        seats = list(agent_config_fields(config))
        if len(seats) > 1:
            raise ValueError(
                f"its agents are {', '.join(seats)}; one that is trained can be played"
            )
        self.env = load_environment(config)
        self._tasks: Iterator[vf.Task[Any]] = iter(self.env.taskset)
        self._seen: list[vf.Task[Any]] = []

    def task(self, number: int) -> vf.Task[Any] | None:
        """The task of a number from 0; None after the last."""
        while len(self._seen) <= number:
            one = next(self._tasks, None)
            if one is None:
                return None
            self._seen.append(one)
        return self._seen[number]

    def row(self, number: int) -> dict[str, Any] | None:
        """A task as a record of prompts."""
        one = self.task(number)
        if one is None:
            return None
        data = one.data.model_dump(mode="json", exclude_none=True)
        own = {name: value for name, value in data.items() if name not in vf.TaskData.model_fields}
        return own | {"prompt": _prompt(one.data), "task": number, "key": one.key}

    async def play(self, number: int, key: str, base_url: str, session: str) -> float | None:
        """The reward of one episode. Raises ValueError where it has not come to its end."""
        task = self.task(number)
        if task is None or task.key != key:
            raise ValueError(f"task {number} is another one than in the record: list them again")
        name = f"MOETRAIN_SESSION_{session}"
        os.environ[name] = session
        client = vf.EvalClientConfig(base_url=base_url, api_key_var=name)
        try:
            episode = await self.env.run_slot(RunSlot(task), vf.ModelContext("moetrain", client))
        finally:
            del os.environ[name]
        errors = [*episode.errors, *(error for one in episode.traces for error in one.errors)]
        if errors:
            raise ValueError(f"{errors[0].type}: {errors[0].message}")
        return episode.traces[-1].reward if episode.traces else None


def _prompt(data: Any) -> list[dict[str, str]]:
    """What the model is asked first, for whoever reads the record: the task's own is played."""
    given = data.prompt if data.prompt is not None else data.description or data.name or "(a task)"
    if isinstance(given, str):
        messages = [{"role": "user", "content": given}]
    else:
        messages = [{"role": one.role, "content": content_text(one.content)} for one in given]
    system = [{"role": "system", "content": data.system_prompt}] if data.system_prompt else []
    return system + messages


async def _answer(player: Player, asked: dict[str, Any]) -> dict[str, Any]:
    if "session" not in asked:
        return {"row": player.row(asked["task"])}
    return {"reward": await player.play(asked["task"], *(asked[name] for name in PLAY))}


async def _serve(player: Player, output: TextIO) -> None:
    """Until the input ends."""
    while True:
        async with player.env.serving():
            for _ in range(SESSIONS):
                line = await asyncio.to_thread(sys.stdin.readline)
                if not line:
                    return
                try:
                    answer = await _answer(player, json.loads(line))
                except Exception as error:  # of anybody's task
                    answer = {"error": f"{type(error).__name__}: {error}"}
                print(json.dumps(answer), file=output, flush=True)


def main() -> None:
    output = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    settings = json.loads(sys.argv[1])
    try:
        player = Player(settings["taskset"], settings["env"])
    except Exception as error:
        print(json.dumps({"error": f"{type(error).__name__}: {error}"}), file=output, flush=True)
        return
    said = {"version": verifiers.__version__, "bounded": player.env.taskset.bounded}
    print(json.dumps(said), file=output, flush=True)
    asyncio.run(_serve(player, output))


if __name__ == "__main__":
    main()
