"""Agents: programs of their own that speak to the model through an endpoint in OpenAI's form
(`loops/agent_server.py`). Here they are started, one for each answer.
"""

import asyncio
import inspect
import json
import math
import os
import shlex
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moetrain.config.user_files import check_named
from moetrain.data.messages import FormatError, Message, shown
from moetrain.environments import tasksets
from moetrain.environments.base import Silent, Tool
from moetrain.environments.tasksets import Tasks
from moetrain.errors import ConfigError
from moetrain.rewards.own_files import load_named

WHERE = "rollout.environment_options"
LAST = 2000  # bytes of what a command wrote that are looked at where it failed


@dataclass(frozen=True)
class Access:
    """What an agent needs to reach the model."""

    base_url: str
    key: str  # of its session: the API key, or the header X-Session-Id


class Agents(Silent):
    """Runs one agent for each answer, whose turns become the trajectory.

    Args:
        agent: FILE.py:FUNCTION, called as function(record, base_url=..., session=...); it may be
            async. What it returns is its reward, or None.
        command: a command line instead. It finds OPENAI_BASE_URL and OPENAI_API_KEY in its
            environment and the record as JSON on its input.
        taskset: tasks of `verifiers` instead, with `env` and `python` (`tasksets.py`).

    Raises ConfigError where there is no such.
    """

    tools: Sequence[Tool] = ()

    def __init__(
        self,
        agent: str | None = None,
        command: str | Sequence[str] | None = None,
        taskset: str | None = None,
        env: Mapping[str, Any] | None = None,
        python: str | None = None,
    ):
        given = {"agent": agent, "command": command, "taskset": taskset}
        check_options(given | {"env": env, "python": python})
        self._command = shlex.split(command) if isinstance(command, str) else list(command or ())
        self._function = None if agent is None else load_named(agent, f"{WHERE}.agent", "function")
        self._tasks = None if taskset is None else Tasks(taskset, env, python)

    def reply(self, record: Mapping[str, Any], messages: Sequence[Message]) -> None:
        return None

    def run(self, record: Mapping[str, Any], access: Access) -> float | None:
        """Run the agent to its end; the reward that it gave. Raises whatever the agent does, and
        FormatError for a command that failed and for a reward that is none.
        """
        if self._tasks is not None:
            reward = self._tasks.play(record, access.base_url, access.key)
            return None if reward is None else reward_of(reward)
        if self._function is None:
            return self._run_command(record, access)
        reward = self._function(record, base_url=access.base_url, session=access.key)
        if inspect.iscoroutine(reward):
            reward = asyncio.run(reward)
        return None if reward is None else reward_of(reward)

    def _run_command(self, record: Mapping[str, Any], access: Access) -> None:
        openai = {"OPENAI_BASE_URL": access.base_url, "OPENAI_API_KEY": access.key}
        given = json.dumps(record, default=str).encode()
        with tempfile.TemporaryFile() as output:
            # What it leaves running is ended with this process, or when it is late.
            done = subprocess.run(
                self._command, input=given, stdout=output, stderr=output, env=os.environ | openai,
                check=False,
            )  # fmt: skip
            if done.returncode:
                output.seek(max(0, output.seek(0, os.SEEK_END) - LAST))
                lines = output.read().decode("utf-8", "replace").strip().splitlines()
                raise FormatError(f"exit code {done.returncode}: {lines[-1] if lines else ''}")


def reward_of(value: Any) -> float:
    """A reward that an agent gave. Raises FormatError for what is no finite number."""
    is_number = isinstance(value, int | float) and abs(value) < 1e300
    if not is_number or not math.isfinite(value):
        raise FormatError(f"a reward is a finite number, not {shown(value)}")
    return float(value)


def check_options(options: Mapping[str, Any]) -> None:
    """Raises ConfigError where they name no agent. Files are read, not run."""
    given = {name: options.get(name) for name in ("agent", "command", "taskset")}
    if sum(value is not None for value in given.values()) != 1:
        raise ConfigError(
            f"rollout.environment=agents needs one of {WHERE}.agent (FILE.py:FUNCTION),"
            f" {WHERE}.command, and {WHERE}.taskset (of verifiers)."
        )
    agent, command, taskset = given.values()
    interpreter_options = {name: options.get(name) for name in ("env", "python")}
    if taskset is not None:
        tasksets.check_options(taskset, **interpreter_options)
        return
    for name in (name for name, value in interpreter_options.items() if value is not None):
        raise ConfigError(f"{WHERE}.{name} goes with {WHERE}.taskset: leave it out.")
    if agent is not None:
        if not isinstance(agent, str) or ":" not in agent:
            raise ConfigError(f"{WHERE}.agent is {shown(agent)}: give FILE.py:FUNCTION.")
        check_named(agent, f"{WHERE}.agent", "function")
        return
    words: Any = command
    if isinstance(command, str):
        try:
            words = shlex.split(command)
        except ValueError as error:
            raise ConfigError(f"{WHERE}.command: {error}.") from None
    is_listed = isinstance(words, Sequence) and all(isinstance(one, str) for one in words)
    if not words or not is_listed:
        raise ConfigError(f"{WHERE}.command is {shown(command)}: give a command line.")
