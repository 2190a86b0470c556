"""The real vLLM, on the CPU: one server for most tests, started once by `moetrain serve`."""

import contextlib
import json
import math
import os
import shutil
import signal
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from moetrain.config.load import load_recipe
from moetrain.data.assets import resolve
from moetrain.data.samples import Sample
from moetrain.data.tokenizer import load
from moetrain.data.trajectories import from_json
from moetrain.rollout.base import Sampling, stopped_at
from moetrain.rollout.client import Client
from moetrain.rollout.shaping import shaped
from moetrain.testing import command, faults, ranks
from moetrain.testing.command import Started
from moetrain.testing.gloo import Workers
from moetrain.testing.rollouts import batch_of, sample_of

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "examples" / "grpo_tiny.yaml"
PYTHON = ROOT / ".venv-vllm" / "bin" / "python"
REMOTE = ROOT / "moetrain" / "rollout" / "remote"
SETTINGS = (
    *"train.steps=2 train.eval_every=2 checkpoint.every=2 observe.tensorboard=false".split(),
    *"rollout.prompts_per_step=4 rollout.group_size=4 rollout.eval_prompts=4".split(),
    "rollout.engine=vllm",
    "rollout.engine_args={max_model_len: 512, max_num_batched_tokens: 512}",
)
TIMEOUT = 400


def moetrain(*words: str) -> Started:
    return command.start(words[0], RECIPE, *SETTINGS, *words[1:], cwd=ROOT)


def train(run_dir: Path, *more: str, nproc: int = 2) -> None:
    process = moetrain("train", f"run_dir={run_dir}", "--nproc", str(nproc), *more)
    _, err = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 0, err


def steps(run_dir: Path) -> list[dict[str, Any]]:
    lines = (run_dir / "ledger.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if "loss" in row]


def wait_for(condition: Callable[[], bool], process: Started) -> None:
    end = time.monotonic() + TIMEOUT
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.01)


@dataclass
class Served:
    address: str
    token_file: Path
    process: Started

    @property
    def words(self) -> tuple[str, ...]:
        return (f"rollout.address=[{self.address}]", f"rollout.token_file={self.token_file}")


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("served")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    token = folder / "token"
    words = (f"run_dir={folder / 'run'}", f"rollout.token_file={token}", "rollout.stop=[never]")
    process = moetrain("serve", "--port", str(port), "rollout.routing_replay=true", *words)
    ready = folder / "run" / "servers" / f"port{port}" / "ready.json"
    try:
        wait_for(ready.is_file, process)
        yield Served(f"http://127.0.0.1:{port}", token, process)
    finally:
        process.terminate()
        process.communicate(timeout=60)


@pytest.fixture(scope="module")
def whole(served: Served, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two ranks with expert parallelism."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    train(run_dir, "parallel.ep=2", *served.words)
    return run_dir


def test_nothing_is_open_without_the_token(served: Served) -> None:
    paths = ["/health", "/generate", "/probe", "/push", "/reload", "/sleep", "/wake", "/nothing"]
    paths += [f"/transfer/{step}" for step in ("init", "start", "update", "finish")]
    for path in paths:
        for token in (None, "wrong"):
            headers = {"Authorization": f"Bearer {token}"} if token else {}
            request = urllib.request.Request(served.address + path, b"{}", headers)
            with pytest.raises(urllib.error.HTTPError) as refused:
                urllib.request.urlopen(request, timeout=20)
            assert refused.value.code == 401, path


def ask(served: Served, head: str, body: bytes = b"") -> bytes:
    """What the server says to bytes of our own, until it closes."""
    port = int(served.address.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        said = b""
        try:
            connection.sendall(head.replace("\n", "\r\n").encode() + body)
            while block := connection.recv(1 << 16):
                said += block
        except (ConnectionResetError, BrokenPipeError):  # it has heard enough
            pass
        return said


def test_all_of_it_listens_on_the_loopback_interface(served: Served) -> None:
    """What vLLM's processes open among themselves, too."""
    session = {os.getsid(served.process.pid)}
    ready = next(served.token_file.parent.glob("run/servers/port*/ready.json"))
    session.add(os.getsid(json.loads(ready.read_text())["pid"]))
    sockets: set[str] = set()
    for folder in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            if os.getsid(int(folder.name)) in session:
                sockets |= {os.readlink(path) for path in (folder / "fd").iterdir()}
    found: list[tuple[str, str]] = []
    for name in ("tcp", "tcp6"):
        for line in Path("/proc/net", name).read_text().splitlines()[1:]:
            words = line.split()
            if words[3] == "0A" and f"socket:[{words[9]}]" in sockets:
                found.append((name, words[1].split(":")[0]))
    assert set(found) == {("tcp", "0100007F")}


def test_requests_have_a_size_and_a_time(served: Served) -> None:
    """And no packing; those that never come whole do not keep the trainer out."""
    post = "POST /probe HTTP/1.1\nHost: x\n"
    own = post + f"Authorization: Bearer {served.token_file.read_text().strip()}\n"
    assert b" 401 " in ask(served, post + "Content-Length: 1000000000000\n\n")
    assert b" 415 " in ask(served, own + "Content-Encoding: gzip\nContent-Length: 2\n\n", b"{}")
    for body in (b"[]", b"[" * 100_000, b"\xff", b"9" * 5000):
        said = ask(served, own + f"Content-Length: {len(body)}\n\n", body)
        assert b" 400 " in said, said
    chunk = b"1000000\r\n" + bytes(1 << 24) + b"\r\n"
    said = ask(served, own + "Transfer-Encoding: chunked\n\n", chunk * 5)
    assert said == b"" or b" 413 " in said
    port = int(served.address.rpartition(":")[2])
    slow = [socket.create_connection(("127.0.0.1", port), timeout=60) for _ in range(300)]
    for connection in slow:
        connection.sendall(b"POST /health HTTP/1.1\r\n")
    token = served.token_file.read_text().strip()
    assert Client(served.address, token, 20.0).get("/health")["pid"] > 0
    began = time.monotonic()
    for connection in slow:
        with connection, contextlib.suppress(ConnectionResetError):
            assert connection.recv(1) == b""
    assert time.monotonic() - began < 30


def test_an_answer_is_not_cut_in_silence(served: Served, whole: Path) -> None:
    """vLLM's limit is 512: an answer of max_tokens fits, or is refused."""
    client = Client(served.address, served.token_file.read_text().strip(), 60.0)
    request = {
        **{"number": 0, "tokens": [5] * 500, "seed": 1, "temperature": 1.0, "top_p": 1.0},
        **{"top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "kept": False},
        **{"stop_ids": [], "stop": [], "routes": False},
    }
    said: dict[int, Any] = {}
    for most in (12, 13):
        body = {
            "version": client.get("/health")["version"],
            "requests": [request | {"max_tokens": most}],
        }
        (said[most],) = client.stream("/generate", body)
    assert len(said[12]["tokens"]) == 12
    assert "pass vLLM's limit of 512 (rollout.engine_args.max_model_len)" in said[13]["error"]


def test_trainer_and_server_agree(whole: Path) -> None:
    rows = steps(whole)
    assert [row["step"] for row in rows] == [1, 2]
    for row in rows:
        assert row["push/logprob_gap"] <= 1e-3 and row["mismatch/abs"] <= 1e-3
        assert row["push/reloads"] == 0


ATTENTION = "adapter={rank: 4, target: [q_proj, v_proj]}"  # matrices of 786,432 bytes


@pytest.mark.parametrize("words", [("parallel.tp=2", ATTENTION), ("parallel.pp=2",)])
def test_at_other_layouts_too(served: Served, tmp_path: Path, words: tuple[str, ...]) -> None:
    """With an adapter only what it is for is sent."""
    train(tmp_path / "run", "optim.lr=1e-2", *words, *served.words)
    for row in steps(tmp_path / "run"):
        assert row["push/logprob_gap"] <= 1e-3 and row["push/reloads"] == 0
        assert row["push/whole_bytes"] == 8_410_624
        assert row["push/bytes"] == 786_432 or ATTENTION not in words


def test_a_push_that_leaves_out_a_matrix_is_caught_and_mended(
    served: Served, workers: Workers, tmp_path: Path
) -> None:
    run_dir, settings = tmp_path / "run", (*SETTINGS, "train.steps=1", "data.eval=[]")
    words = ("short folders", str(RECIPE), str(run_dir), *settings, *served.words)
    assert workers.run(1, faults.train_with, *words) == ["the run went on"]
    (row,) = steps(run_dir)
    assert row["push/reloads"] == 1 and row["push/logprob_gap"] <= 1e-3
    assert row["push/whole_bytes"] < row["push/bytes"] < 2 * row["push/whole_bytes"]


METHODS = {
    "grpo": "{name: grpo, beta: 0.05}",
    "dr_grpo": "dr_grpo",
    "dapo": "dapo",
    "gspo": "gspo",
    "ppo": "{name: ppo, beta: 0.05}",
    "chord": "{name: chord, packs: 1}",
}


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.3])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_at_every_temperature(
    served: Served, workers: Workers, tmp_path: Path, method: str, temperature: float
) -> None:
    """vLLM scores given tokens at 1, and says the log-probs of drawn ones as it drew them."""
    more = [f"method={METHODS[method]}", f"rollout.temperature={temperature}", "data.eval=[]"]
    more += ["data.demonstrations=builtin:checkable-sft"] * (method == "chord")
    words = [*SETTINGS, f"run_dir={tmp_path / 'run'}", *served.words, *more]
    assert workers.run(1, ranks.trained, str(RECIPE), words) == [0]
    rows = steps(tmp_path / "run")
    assert [row["step"] for row in rows] == [1, 2]
    for row in rows:
        assert row["push/logprob_gap"] <= 1e-3 and row["push/reloads"] == 0
        assert row["mismatch/abs"] <= 1e-3


def drawn_in(run_dir: Path, step: int) -> Iterator[tuple[list[int], Sample]]:
    """(prompt, answer) of a step's rollouts."""
    for group in batch_of(run_dir, step).groups:
        for answer in group.answers:
            yield list(group.prompt.tokens), sample_of(answer.trajectory)


def compared(prompt: list[int], sample: Sample, model: Any, sampling: Sampling) -> float:
    """The largest difference of a log-prob from what transformers and the embedded engine make of
    it; infinite where they would draw from other tokens.
    """
    ids = torch.tensor([[*prompt, *sample.tokens[:-1]]])
    with torch.inference_mode():
        logits = model(ids).logits[0, len(prompt) - 1 :].float()
    seen = torch.zeros_like(logits, dtype=torch.bool)
    for place in range(len(logits)):
        seen[place, ids[0, : len(prompt) + place]] = True
    ours = shaped(logits, seen, sampling)
    assert sample.kept is not None
    ends = sample.kept.sizes.cumsum()
    for row, end, size in zip(ours, ends, sample.kept.sizes, strict=True):
        if set(sample.kept.ids[end - size : end].tolist()) != set(
            row.isfinite().nonzero()[:, 0].tolist()
        ):
            return math.inf
    drawn = ours.gather(1, torch.tensor(sample.tokens)[:, None])[:, 0]
    return float((drawn - torch.tensor(sample.logprobs)).abs().max())


ADVISED = "rollout.temperature=0.6 rollout.top_p=0.95 rollout.top_k=20".split()
ALL = "rollout.temperature=0.8 rollout.top_p=0.9 rollout.top_k=30 rollout.min_p=0.02".split()
ALL += ["rollout.repetition_penalty=1.3", "rollout.stop=['e', 'th ']"]


@pytest.mark.parametrize("more", [ADVISED, ALL, ["rollout.min_p=0.1"]], ids=["qwen3", "all", "one"])
def test_drawn_from_a_part_of_the_distribution(
    served: Served, workers: Workers, tmp_path: Path, more: list[str]
) -> None:
    """vLLM and the embedded engine draw from the same tokens, with the log-probs that the trainer
    scores; with what Qwen3's card advises the reward rises.
    """
    num_steps = 12 if more is ADVISED else 1
    words = [*SETTINGS, f"run_dir={tmp_path / 'run'}", *served.words, *more, "data.eval=[]"]
    words += [f"train.steps={num_steps}", "rollout.group_size=8", "optim.lr=3e-3"]
    assert workers.run(1, ranks.trained, str(RECIPE), words) == [0]
    rows = steps(tmp_path / "run")
    for row in rows:
        assert row["push/logprob_gap"] <= 1e-3 and row["push/reloads"] == 0
        assert row["mismatch/abs"] <= 1e-4
    recipe = load_recipe(RECIPE, words)
    _, rollout = recipe.sampling
    sampling = Sampling.of(rollout, rollout.temperature, ()).to_learn_from(routes=False)
    folder = resolve("builtin:qwen3-moe-tiny")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    answers = list(drawn_in(tmp_path / "run", 1))
    assert max(compared(prompt, one, model, sampling) for prompt, one in answers) <= 1e-4
    if more is ADVISED:
        rewards = [row["reward/mean"] for row in rows]
        assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.1, rewards
    if rollout.stop:
        tokenizer = load(folder)
        ended = [one for _, one in answers if one.text.endswith(("e", "th "))]
        assert len(ended) > len(answers) / 2
        for one in ended:
            assert one.finish == "stop" and stopped_at(one.text, rollout.stop) == len(one.text)
            before = str(tokenizer.decode(list(one.tokens[:-1])))
            assert stopped_at(before, rollout.stop) is None


def test_more_prompts_than_one_pass_takes(served: Served, tmp_path: Path) -> None:
    """64 of about 25 tokens where 512 fit: with chunked prefill vLLM 0.32 dies of it on the CPU."""
    more = ("train.steps=1", "rollout.prompts_per_step=8", "rollout.group_size=8")
    train(tmp_path / "run", *served.words, *more)
    (row,) = steps(tmp_path / "run")
    assert not any(name.startswith("faults/server") for name in row)


def test_a_benchmark_has_the_same_greedy_answers_from_either_engine(
    served: Served, tmp_path: Path
) -> None:
    bench = ROOT / "examples" / "evals" / "checkable.yaml"
    small = "limit=6 samples=1 pass_at=[1] rollout.max_tokens=12 rollout.eval_temperature=0".split()
    answers: list[list[Any]] = []
    for engine in (("rollout.engine=embedded",), ("rollout.engine=vllm", *served.words)):
        out = tmp_path / f"{len(answers)}.jsonl"
        words = ("eval", "builtin:qwen3-moe-tiny", bench, "--out", out, *small, *engine)
        done = command.run(*words, timeout=TIMEOUT, cwd=ROOT)
        assert done.returncode == 0, done.stderr
        rows = map(json.loads, out.read_text().splitlines())
        answers.append(sorted(a["tokens"] for row in rows for a in row["answers"]))
    assert len(answers[0]) == 6 and answers[0] == answers[1]


def test_the_same_losses_by_replay_and_beside_the_embedded_sampler(
    whole: Path, tmp_path: Path
) -> None:
    """Engines draw different tokens from the same seed. So the tokens are vLLM's in all three: read
    without an engine, and by a run that pushes to the embedded one and proves it.
    """
    wanted = [row["loss"] for row in steps(whole)]
    train(tmp_path / "replay", "parallel.ep=2", f"rollout.replay={whole / 'rollouts'}")
    assert [row["loss"] for row in steps(tmp_path / "replay")] == wanted
    shutil.copytree(whole / "rollouts", tmp_path / "embedded" / "rollouts")
    embedded = ("rollout.engine=embedded", "rollout.engine_args={}")
    train(tmp_path / "embedded", "parallel.ep=2", *embedded)
    rows = steps(tmp_path / "embedded")
    assert [row["loss"] for row in rows] == wanted
    assert all(row["push/logprob_gap"] <= 1e-3 for row in rows)


def test_killed_stopped_and_full(tmp_path: Path) -> None:
    """In the middle of sampling; the run goes on, nothing that had come is lost."""
    run_dir = tmp_path / "run"
    process = moetrain(
        *("train", f"run_dir={run_dir}", "--nproc", "2", "parallel.ep=2", "train.steps=3"),
        *("rollout.max_queue=4", "rollout.timeout=15", "rollout.max_tokens=200"),
    )
    kept: dict[int, list[str]] = {}
    for step, number in ((2, signal.SIGKILL), (3, signal.SIGSTOP)):
        partial = run_dir / "rollouts" / f"{step:08d}.partial.jsonl"
        wait_for(lambda p=partial: p.is_file() and p.read_text().count("\n") > 0, process)
        pid = json.loads((run_dir / "servers" / "0" / "ready.json").read_text())["pid"]
        os.killpg(pid, number)
        kept[step] = partial.read_text().splitlines()[:-1]
    _, err = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 0, err
    rows = steps(run_dir)
    assert sum(row.get("faults/server/dead", 0) for row in rows) == 1
    assert sum(row.get("faults/server/timeout", 0) for row in rows) == 1
    assert sum(row.get("faults/server/restarts", 0) for row in rows) == 2
    assert all(row["faults/server/queue_full"] >= 1 for row in rows)
    assert all(row["push/logprob_gap"] <= 1e-3 for row in rows)
    for step, lines in kept.items():
        made = [answer.trajectory for answer in batch_of(run_dir, step).answers]
        final = {(one.prompt_id, one.index): one.tokens for one in made}
        assert len(final) == 16
        for one in map(from_json, map(json.loads, lines)):
            assert final[one.prompt_id, one.index] == one.tokens


SPEAKER = """
import time


class Speaker:
    tools = ()

    def reset(self, record):
        return []

    def reply(self, record, messages):
        turns = sum(message["role"] == "assistant" for message in messages)
        time.sleep(0.3)
        return None if turns == 3 else [{"role": "user", "content": f"{turns} heard, go on"}]
"""


def test_turns_go_on_by_tokens_and_after_a_kill(served: Served, tmp_path: Path) -> None:
    """Three turns beside other trajectories' turns, their routes recorded: what is learned is what
    was drawn, and a killed run goes on from the turns that had come.
    """
    run_dir, own = tmp_path / "run", tmp_path / "speaker.py"
    own.write_text(SPEAKER)
    words = (f"rollout.environment={own}:Speaker", "rollout.stop=[e,a,i]", "data.eval=[]")
    words += ("data.seq_len=256", "rollout.routing_replay=true", *served.words)
    process = moetrain("train", f"run_dir={run_dir}", *words)
    partial = run_dir / "rollouts" / "00000001.partial.jsonl"
    wait_for(lambda: partial.is_file() and partial.read_text().count("\n") > 20, process)
    process.kill()
    process.communicate()
    lines = partial.read_text().splitlines()[:-1]
    before = {(one.prompt_id, one.index): one for one in map(from_json, map(json.loads, lines))}
    assert any(one.finish == "open" for one in before.values())
    train(run_dir, *words, nproc=1)
    for row in steps(run_dir):
        assert row["mismatch/abs"] <= 1e-4 and row["push/logprob_gap"] <= 1e-3
        assert row["turns/most"] == 3 and row["tokens/replies"] > 0
    for answer in batch_of(run_dir, 1).answers:
        one = answer.trajectory
        (branch,) = one.branches
        assert one.finish in ("stop", "length") and branch.routes is not None
        known = before.get((one.prompt_id, one.index))
        if known is not None:
            assert one.tokens[: len(known.tokens)] == known.tokens


def broken_python(folder: Path, change: Callable[[str], str]) -> Path:
    """An interpreter that finds another moetrain_worker first."""
    folder.mkdir()
    worker = (REMOTE / "moetrain_worker.py").read_text()
    assert change(worker) != worker
    (folder / "moetrain_worker.py").write_text(change(worker))
    python = folder / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={folder}:$PYTHONPATH exec {PYTHON} "$@"\n')
    python.chmod(0o755)
    return python


def test_what_vllm_serves_after_a_plain_push_is_caught_and_mended(tmp_path: Path) -> None:
    """Without our mend vLLM 0.32 serves wrong log-probs after a push in place."""
    python = broken_python(
        tmp_path / "broken", lambda text: text.replace("\n_repack_experts()\n", "\n")
    )
    train(tmp_path / "run", "parallel.ep=2", "train.steps=1", f"rollout.python={python}")
    (row,) = steps(tmp_path / "run")
    assert row["push/reloads"] == 1 and row["push/logprob_gap"] <= 1e-3


def test_weights_that_never_arrive_stop_the_run(tmp_path: Path) -> None:
    spoil = """
def _spoil() -> None:
    from vllm.model_executor.layers.fused_moe import unquantized_fused_moe_method as module

    method = module.UnquantizedFusedMoEMethod
    original = method.process_weights_after_loading

    def process(self: Any, layer: Any) -> Any:
        layer.w2_weight.data.mul_(1.5)
        return original(self, layer)

    method.process_weights_after_loading = process

"""
    python = broken_python(
        tmp_path / "broken",
        lambda text: text.replace(
            "\n_repack_experts()\n", spoil + "\n_repack_experts()\n_spoil()\n"
        ),
    )
    run_dir = tmp_path / "run"
    process = moetrain(
        *("train", f"run_dir={run_dir}", "--nproc", "2", "parallel.ep=2"),
        f"rollout.python={python}",
    )
    _, err = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 2, err
    assert "differ by" in err and "after a push and a reload" in err, err
    assert not (run_dir / "ledger.jsonl").exists() or not steps(run_dir)


def test_routes_bring_training_closer_to_the_rollout(tmp_path: Path) -> None:
    """A bf16 server beside an fp32 trainer, so that their routers disagree now and then."""
    own = "rollout.engine_args={max_model_len: 512, dtype: bfloat16}"
    more = ("parallel.ep=2", "rollout.tolerance=0.25", "train.steps=1", own)
    size = ("rollout.prompts_per_step=8", "rollout.group_size=8", "optim.lr=1e-4")
    train(tmp_path / "with", "rollout.routing_replay=true", *more, *size)
    replay = f"rollout.replay={tmp_path / 'with' / 'rollouts'}"
    train(tmp_path / "without", replay, *more, *size)
    (replayed,), (plain,) = steps(tmp_path / "with"), steps(tmp_path / "without")
    print("mismatch/abs with and without routes:", replayed["mismatch/abs"], plain["mismatch/abs"])
    assert replayed["mismatch/abs"] < plain["mismatch/abs"]
