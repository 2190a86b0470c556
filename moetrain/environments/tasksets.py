"""Tasks of a taskset of `verifiers`, which is asked in an interpreter of its own
(`remote/moetrain_tasks.py`): the package wants other versions than the trainer has.
"""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from moetrain.config.recipe import Recipe
from moetrain.config.user_files import parsed_file
from moetrain.data.messages import FormatError, shown
from moetrain.data.samples import write_lines
from moetrain.errors import ConfigError, DataError

PROGRAM = Path(__file__).parent / "remote" / "moetrain_tasks.py"
WHERE = "rollout.environment_options"
WAYS = f"`make verifiers` installs it into .venv-verifiers; or name another in {WHERE}.python"
LAST = 2000  # bytes of what a program wrote that are looked at where it failed


class Tasks:
    """The process that has a taskset.

    Args:
        taskset: the name of an installed taskset, or a file that has one.
        env: further settings of verifiers' EnvConfig, such as {agent: {harness: {id: null}}}.
        python: the interpreter; None: that of `.venv-verifiers` beside this one's environment.

    Raises ConfigError where there is no such interpreter, package or taskset.
    """

    def __init__(
        self, taskset: str, env: Mapping[str, Any] | None = None, python: str | None = None
    ):
        self._taskset, self._program = taskset, _interpreter(python)
        self._settings = json.dumps({"taskset": taskset, "env": env or {}})
        self._said = tempfile.TemporaryFile()
        self._start()

    def _start(self) -> None:
        paths = os.pathsep.join([str(self._program.parent), os.environ.get("PATH", "")])  # for uv
        variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        self._process = subprocess.Popen(
            [self._program, PROGRAM, self._settings],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            env=variables | {"PATH": paths},
            text=True,
        )
        try:
            self.is_bounded = bool(self._answer().get("bounded"))
        except FormatError as error:
            self.close()
            raise ConfigError(f"{WHERE}.taskset={shown(self._taskset)}: {error}. {WAYS}.") from None

    def rows(self, most: int | None) -> Iterator[dict[str, Any]]:
        """The tasks as records of prompts, at most so many. Raises FormatError."""
        number = 0
        while most is None or number < most:
            row = self._ask({"task": number})["row"]
            if row is None:
                return
            yield row
            number += 1

    def play(self, record: Mapping[str, Any], base_url: str, session: str) -> float | None:
        """Play a record's task; its reward. Raises FormatError with the reason where it has not
        come to its end.
        """
        task, key = record.get("task"), record.get("key")
        if type(task) is not int or not isinstance(key, str):
            raise FormatError(
                "the record has no task: `moetrain data tasks` writes records of them"
            )
        asked = {"task": task, "key": key, "base_url": base_url, "session": session}
        return self._ask(asked)["reward"]

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        for one in (self._process.stdin, self._process.stdout, self._said):
            assert one is not None
            one.close()

    def _ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        if self._process.poll() is not None:  # the task before it has brought it down
            self._start()
        assert self._process.stdin is not None
        os.ftruncate(self._said.fileno(), 0)  # what earlier tasks have said is gone, and the
        os.lseek(self._said.fileno(), 0, os.SEEK_SET)  # process, which has the same place, goes on
        with contextlib.suppress(OSError):  # what it said last tells more
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        answer: dict[str, Any] = json.loads(line) if line else {"error": self._last_words()}
        if "error" in answer:
            raise FormatError(" ".join(str(answer["error"]).split())[:300].rstrip("."))
        return answer

    def _last_words(self) -> str:
        code = self._process.wait()
        self._said.seek(max(0, self._said.seek(0, os.SEEK_END) - LAST))
        lines = self._said.read().decode("utf-8", "replace").strip().splitlines()
        return f"it ended with exit code {code}: {lines[-1] if lines else 'nothing was said'}"


def written(recipe: Recipe, out: Path, most: int | None) -> int:
    """Write the tasks of the recipe's taskset, at most so many, as records of prompts; how many.
    ConfigError where the recipe has none.
    """
    options = {} if recipe.rollout is None else recipe.rollout.environment_options
    if "taskset" not in options:
        raise ConfigError(
            f"{WHERE}.taskset is not set: name the taskset of verifiers whose tasks are wanted,"
            " with rollout.environment=agents."
        )
    own: Any = {name: options.get(name) for name in ("taskset", "env", "python")}
    check_options(**own)
    tasks = Tasks(**own)
    try:
        if most is None and not tasks.is_bounded:
            raise DataError(f"{own['taskset']} has no end of tasks: say how many with --num N.")
        rows = list(tasks.rows(most))
    except FormatError as error:
        raise DataError(f"{own['taskset']}: {error}. No file was written.") from None
    finally:
        tasks.close()
    write_lines(out, rows)
    return len(rows)


def check_options(taskset: Any, env: Any, python: Any) -> None:
    """Raises ConfigError where a taskset cannot be had. Nothing is run."""
    if not isinstance(taskset, str) or not taskset:
        raise ConfigError(f"{WHERE}.taskset is {shown(taskset)}: give a name, or FILE.py.")
    if taskset.endswith(".py"):
        parsed_file(f"{taskset}:", f"{WHERE}.taskset")
    if env is not None and not isinstance(env, Mapping):
        raise ConfigError(f"{WHERE}.env is {shown(env)}: give a mapping, as verifiers reads it.")
    if python is not None and not isinstance(python, str):
        raise ConfigError(f"{WHERE}.python is {shown(python)}: give the path of an interpreter.")
    _interpreter(python)


def _interpreter(python: str | None) -> Path:
    environment = Path(sys.prefix).parent / ".venv-verifiers" / "bin" / "python"
    program = environment if python is None else Path(python).expanduser()
    if not os.access(program, os.X_OK):
        raise ConfigError(f"{WHERE}.taskset wants verifiers, and {program} is no program: {WAYS}.")
    return program
