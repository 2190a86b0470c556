"""Tasks of real `verifiers`, played by a real model: what is learned is what was sampled, the
reward is the task's, and each way to go wrong is a line.
"""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_agents import Scene, opened

from moetrain.data.prompts import read_prompt
from moetrain.loops.rollouts import Drawing
from moetrain.rollout.base import Sampling

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv-verifiers" / "bin" / "python"
pytestmark = [
    pytest.mark.system,
    pytest.mark.skipif(
        not PYTHON.exists(),
        reason="no .venv-verifiers (make verifiers), so this stays unproven: tasks of verifiers",
    ),
]
TASKS = """
import asyncio
import os

import verifiers.v1 as vf

__all__ = ["Odd"]


class Kind(vf.TaskData):
    kind: str


class OddTask(vf.Task[Kind]):
    async def setup(self, trace, runtime):
        print("what a task prints is no answer")
        if self.data.kind == "raises":
            raise ValueError("no such luck")
        if self.data.kind == "dies":
            os._exit(3)
        if self.data.kind == "hangs":
            await asyncio.sleep(100)

    @vf.reward
    async def half(self, trace):
        return 0.5

    @vf.reward(weight=0.25)
    async def spoke(self, trace):
        return float(trace.num_turns)


class Odd(vf.Taskset[OddTask]):
    INFINITE = True

    def load(self):
        for kind in ("plays", "raises", "dies", "plays on", "hangs"):
            yield OddTask(Kind(prompt="Say something.", system_prompt="Be brief.", kind=kind))
"""
HARNESS = '{agent: {harness: {id: "null"}, runtime: {type: subprocess}}}'


def listed(folder: Path, taskset: str, *more: str) -> "subprocess.CompletedProcess[str]":
    words = [ROOT / ".venv/bin/moetrain", "data", "tasks", ROOT / "examples/tools_tiny.yaml"]
    words += ["--out", folder / "tasks.jsonl", "rollout.environment=agents", "rollout.tools=[]"]
    words += [f"rollout.environment_options={options_of(taskset)}", *more]
    return subprocess.run(words, capture_output=True, text=True, check=False, timeout=120)


def options_of(taskset: str) -> str:
    return f"{{taskset: '{taskset}', env: {HARNESS}, python: '{PYTHON}'}}"


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "odd_tasks.py").write_text(TASKS)
    options = options_of(f"{folder}/odd_tasks.py")
    more = ("rollout.environment_workers=1", "rollout.environment_seconds=25")
    with opened(folder, options, *more) as one:
        yield one


def test_tasks_are_listed_as_prompts(tmp_path: Path) -> None:
    done = listed(tmp_path, str(ROOT / "examples/addition_tasks.py"))
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"100 tasks in {tmp_path}/tasks.jsonl\n"
    rows = [json.loads(line) for line in (tmp_path / "tasks.jsonl").read_text().splitlines()]
    assert [row["task"] for row in rows] == list(range(100)) and rows[99]["answer"] == "18"
    assert rows[12]["prompt"] == [{"role": "user", "content": "What is 1 + 2?"}]
    assert len({row["key"] for row in rows}) == 100
    for taskset, more, words in (
        ("nowhere", (), "taskset 'nowhere' not found"),
        (f"{tmp_path}/nowhere.py", (), "is not a file"),
        (f"{tmp_path}/odd_tasks.py", (), "has no end of tasks: say how many with --num N."),
        (f"{tmp_path}/broken.py", (), "no such luck"),
    ):
        (tmp_path / "odd_tasks.py").write_text(TASKS)
        (tmp_path / "broken.py").write_text("raise ValueError('no such luck')")
        done = listed(tmp_path, taskset, *more)
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
        assert words in done.stderr
    assert listed(tmp_path, f"{tmp_path}/odd_tasks.py", "--num", "3").stdout.startswith("3 tasks")


def test_what_a_task_pays_and_what_goes_wrong(scene: Scene, tmp_path: Path) -> None:
    """A task that raises, dies or hangs costs its trajectory; those behind it are played."""
    (tmp_path / "odd_tasks.py").write_text(TASKS)
    assert listed(tmp_path, f"{tmp_path}/odd_tasks.py", "--num", "5").returncode == 0
    rows = [json.loads(line) for line in (tmp_path / "tasks.jsonl").read_text().splitlines()]
    rows.insert(4, rows[0] | {"key": "another", "kind": "changed"})
    rows.insert(5, {"prompt": "Hello?", "kind": "no task"})
    chat = scene.agents.limits.chat
    prompts = [read_prompt(row, chat)[0] for row in rows]
    sampling = Sampling(6, stop_ids=scene.agents.limits.stop_ids)
    done: dict[Any, Any] = {}
    Drawing(scene.engine, sampling, 3, scene.agents).draw(prompts, 1, done, lambda one: None)
    made = {prompt.columns["kind"]: done[prompt.id, 0] for prompt in prompts}
    for kind in ("plays", "plays on"):
        one = made[kind]
        assert one.finish in ("stop", "length") and one.counts["agent/reward"] == 0.75, one.detail
        ((name, (request, sample)),) = (
            pair for pair in scene.engine.seen.items() if pair[0].startswith(f"{one.prompt_id}/")
        )
        (branch,) = one.branches
        assert branch.context is None, "the episode has asked what its record does"
        assert branch.tokens.tolist() == list(sample.tokens) and name
        assert tuple(request.prompt.tokens) == next(
            prompt.tokens for prompt in prompts if prompt.id == one.prompt_id
        )
    ends = {kind: (one.finish, one.detail) for kind, one in made.items() if "plays" not in kind}
    assert ends.pop("hangs")[0] == "timeout"
    assert ends.pop("dies") == (
        "error",
        "it ended with exit code 3: what a task prints is no answer",
    )
    assert (
        ends.pop("raises")[1].startswith("ValueError: ") and "no such luck" in made["raises"].detail
    )
    assert "is another one than in the record" in ends.pop("changed")[1]
    assert "`moetrain data tasks` writes records of them" in ends.pop("no task")[1]
    assert not ends
