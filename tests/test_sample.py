"""`moetrain sample` from the command line: what it leaves, survives and refuses."""

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from moetrain import cli
from moetrain.answers.sample import counted
from moetrain.data import assets
from moetrain.data.chat import ChatOptions
from moetrain.data.samples import read_lines
from moetrain.data.trajectories import from_json
from moetrain.testing.command import start

ROOT = Path(__file__).parents[1]
MODEL = "builtin:qwen3-moe-tiny"


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    lines = assets.resolve("builtin:checkable-prompts").read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:40]))
    return path


@pytest.fixture(scope="module")
def rewards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Graded by whether it has an even number of characters: a model that knows nothing is right
    half of the time.
    """
    path = tmp_path_factory.mktemp("rewards") / "own.py"
    path.write_text(
        "def even(completions, **columns):\n"
        "    return [float(len(c) % 2 == 0) for c in completions]\n"
    )
    return path


def command(prompts: Path, rewards: Path, out: Path, *more: str) -> list[str]:
    settings = ["rollout.max_tokens=8", f"rewards=[{rewards}:even]"]
    return ["sample", MODEL, str(prompts), "--out", str(out), "-k", "3", *settings, *more]


@pytest.fixture(scope="module")
def whole(prompts: Path, rewards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "samples.jsonl"
    assert cli.main(command(prompts, rewards, out)) == 0
    return out


def answers(path: Path) -> dict[tuple[str, int], dict[str, Any]]:
    rows = read_lines(path)
    return {(a["prompt_id"], a["index"]): a for row in rows for a in row["answers"]}


def test_every_prompt_has_its_answers(whole: Path, prompts: Path) -> None:
    rows = list(read_lines(whole))
    assert [row["prompt"]["columns"]["prompt"][0]["content"] for row in rows] == [
        json.loads(line)["prompt"] for line in prompts.read_text().splitlines()
    ]
    for row in rows:
        assert [a["index"] for a in row["answers"]] == [0, 1, 2]
        for a in row["answers"]:
            assert 1 <= len(a["tokens"]) == len(a["logprobs"]) <= 8 and max(a["logprobs"]) < 0
            assert a["reward"] == float(len(a["text"]) % 2 == 0) == a["parts"]["even"]
    manifest = json.loads(whole.with_name("samples.manifest.json").read_text())
    assert manifest["counts"] == dict(counted(rows)) and manifest["counts"]["answers"] == 120
    assert manifest["versions"]["torch"] and manifest["of"]["model"][1] == MODEL
    assert sorted(path.name for path in whole.parent.iterdir()) == [
        ".samples.jsonl.lock",
        "samples.jsonl",
        "samples.manifest.json",
    ]


def test_nothing_finished_is_lost(
    whole: Path, prompts: Path, rewards: Path, tmp_path: Path
) -> None:
    """Killed while answers come, and once more after a line was cut short."""
    out = tmp_path / "samples.jsonl"
    process = start(*command(prompts, rewards, out), cwd=ROOT)
    part = out.with_name("samples.jsonl.partial0")
    end = time.monotonic() + 200
    while not (part.exists() and part.stat().st_size):
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    lines = part.read_text().splitlines(keepends=True)
    part.write_text("".join(lines) + lines[0][:20])
    finished = {(s["prompt_id"], s["index"]): s for s in read_lines(part)}
    marked = next(iter(finished.values()))
    marked["text"] = "as it was"  # drawn anew, it would not read so
    part.write_text("".join(json.dumps(s) + "\n" for s in finished.values()) + lines[0][:20])
    assert cli.main(command(prompts, rewards, out)) == 0
    found, wanted = answers(out), answers(whole)
    assert found.keys() == wanted.keys()
    for key, own in found.items():
        if key in finished:
            assert own["tokens"] == from_json(finished[key]).tokens
        assert own["logprobs"] == pytest.approx(wanted[key]["logprobs"], abs=1e-4)
    assert found[marked["prompt_id"], marked["index"]]["text"] == "as it was"


def test_more_answers_are_added_to_those_that_are_there(
    whole: Path, prompts: Path, rewards: Path, tmp_path: Path
) -> None:
    out = tmp_path / "samples.jsonl"
    for path in whole.parent.glob("samples*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    assert cli.main(command(prompts, rewards, out, "-k", "4")) == 0
    found, before = answers(out), answers(whole)
    assert len(found) == 160 and all(found[key] == own for key, own in before.items())


def test_told_to_stop_it_says_how_to_go_on(prompts: Path, rewards: Path, tmp_path: Path) -> None:
    out = tmp_path / "samples.jsonl"
    process = start(*command(prompts, rewards, out, "rollout.max_tokens=400"), cwd=ROOT)
    end = time.monotonic() + 200
    while not out.exists():
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.05)
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    said, err = process.communicate(timeout=60)
    assert process.returncode == 143, err
    assert "the same command goes on" in said and "Traceback" not in err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["rollout.temperature=0.5"], "was made with temperature 1.0, this is temperature 0.5"),
        (["rollout.top_k=5"], "was made with top_k nothing, this is top_k 5"),
        (["rewards=[exact]"], "was made with rewards"),
        (["model.dtype=bf16"], "was made with model.dtype fp32"),
        (["rollout.max_tokens=2000"], "can be used"),
        (["rollout.engin=vllm"], "Did you mean 'rollout.engine'"),
        (["rollout.group_size=16"], "does not read rollout.group_size: -k N says how many"),
        (["rollout={eval_temperature: 0.5}"], "rollout.temperature is the temperature"),
        (["rollout.steps_off=2"], "does not read rollout.steps_off"),
        (["optim.lr=1e-3"], "does not read optim.lr: it trains nothing"),
        (["method.beta=0.1"], "does not read method.beta"),
        (["train.steps=5"], "does not read train.steps"),
        (["data.eval=[x.jsonl]"], "does not read data.eval: PROMPTS says what is asked"),
    ],
    ids=lambda value: str(value),
)
def test_other_settings_under_the_same_file_are_refused(
    whole: Path,
    prompts: Path,
    rewards: Path,
    capsys: pytest.CaptureFixture[str],
    more: list[str],
    message: str,
) -> None:
    before = whole.read_bytes()
    capsys.readouterr()
    assert cli.main(command(prompts, rewards, whole, *more)) == 2
    said = capsys.readouterr().err
    assert message in said and len(said.splitlines()) == 1 and whole.read_bytes() == before


def test_a_run_is_asked_as_it_was_trained(
    rewards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import shutil

    run = tmp_path / "run"
    unsigned = shutil.ignore_patterns("manifest.json")
    shutil.copytree(assets.resolve(MODEL), run / "hf", ignore=unsigned)
    data = {"system": "Be terse.", "chat_template_kwargs": {"mood": "grave"}, "seq_len": 64}
    (run / "resolved.yaml").write_text(json.dumps({"data": data, "method": "old"}))
    config = json.loads((run / "hf" / "tokenizer_config.json").read_text())
    file = run / "hf" / "chat_template.jinja"
    template = file.read_text() if file.is_file() else config["chat_template"]
    file.write_text("{{ mood }}" + template)
    one = tmp_path / "one.jsonl"
    one.write_text('{"prompt": "2 + 2?"}\n')
    asked: dict[str, str] = {}
    for name, more in (("run", []), ("own", ["data.system=Be kind.", "data.seq_len=200"])):
        for model in (run, run / "hf"):
            out = tmp_path / f"{name}.{model.name}.jsonl"
            words = ["sample", str(model), str(one), "--out", str(out), "-k", "1"]
            settings = ["rollout.max_tokens=2", f"rewards=[{rewards}:even]", *more]
            assert cli.main([*words, *settings]) == 0, capsys.readouterr().err
            row = next(iter(read_lines(out)))
            tokens = row["prompt"]["tokens"]
            asked[out.stem] = str(ChatOptions().open(run / "hf").tokenizer.decode(tokens))
    assert all(text.startswith("grave") for text in asked.values()), asked
    assert "Be terse." in asked["run.run"] and asked["run.run"] == asked["run.hf"]
    assert "Be kind." in asked["own.run"] and "Be terse." not in asked["own.run"]


def test_another_model_and_other_prompts_are_refused(
    whole: Path, prompts: Path, rewards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    model = tmp_path / "model"
    unsigned = shutil.ignore_patterns("manifest.json")
    shutil.copytree(assets.resolve(MODEL), model, ignore=unsigned)
    tensors = load_file(model / "model.safetensors")
    tensors["lm_head.weight"] += 1  # as training changes it: nearly everywhere
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    other = [str(model) if word == MODEL else word for word in command(prompts, rewards, whole)]
    assert cli.main(other) == 2
    assert f"was made with model {MODEL}, this is model {model}" in capsys.readouterr().err
    fewer = tmp_path / "fewer.jsonl"
    fewer.write_text("".join(prompts.read_text().splitlines(keepends=True)[:39]))
    assert cli.main(command(fewer, rewards, whole)) == 2
    assert "was made with prompts (40 of" in capsys.readouterr().err
