"""What a user gets wrong, and what a machine does to a run: one line, the way out, nothing lost."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from data_helpers import chat, questions, tokenizer_folder, write_jsonl
from safetensors.torch import load_file, save_file

from moetrain.testing import command
from moetrain.testing.tiny import save_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen3-MoE with a tokenizer that fits it."""
    folder = tmp_path_factory.mktemp("model")
    save_model("qwen3_moe", folder, vocab_size=512)
    shutil.copytree(tokenizer_folder(), folder, dirs_exist_ok=True)
    return folder


def write_recipe(folder: Path, model: Path, **sections: Any) -> Path:
    data = write_jsonl(folder / "train.jsonl", questions(48))
    content: dict[str, Any] = {
        "run_dir": str(folder / "run"),
        "model": {"path": str(model), "dtype": "fp32"},
        "method": "sft",
        "data": {"train": str(data), "seq_len": 64, "cache": str(folder / "cache")},
        "optim": {"lr": 1e-3},
        "train": {"steps": 4, "global_batch": 4},
        "checkpoint": {"every": 2},
        "observe": {"tensorboard": False, "progress": False},
    }
    for name, values in sections.items():
        content[name] = content.get(name, {}) | values
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def run(recipe: Path, *more: str, nproc: int = 1) -> subprocess.CompletedProcess[str]:
    return command.run("train", recipe, "--nproc", str(nproc), *more)


def a_copy(model: Path, folder: Path) -> Path:
    return Path(shutil.copytree(model, folder / "model"))


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def drop_a_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.gate.weight"]
    save_file(tensors, folder / "model.safetensors")


def leave_the_folder(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").rename(folder.parent / "elsewhere.safetensors")
    index = {"weight_map": dict.fromkeys(tensors, "../elsewhere.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


BAD_MODELS: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "no folder": (shutil.rmtree, ["model", "no"]),
    "architecture": (
        lambda folder: edit_config(folder, architectures=["GPT2LMHeadModel"]),
        ["GPT2LMHeadModel", "Qwen3MoeForCausalLM"],
    ),
    "truncated": (truncate, ["model.safetensors", "truncated"]),
    "a tensor missing": (drop_a_tensor, ["model.layers.1.mlp.gate.weight"]),
    "vocabulary": (lambda folder: edit_config(folder, vocab_size=640), ["640", "512"]),
    "outside": (leave_the_folder, ["../elsewhere.safetensors"]),
}


@pytest.mark.parametrize("case", BAD_MODELS)
def test_a_model_that_cannot_be(model: Path, tmp_path: Path, case: str) -> None:
    change, words = BAD_MODELS[case]
    folder = a_copy(model, tmp_path)
    change(folder)
    done = run(write_recipe(tmp_path, folder), nproc=2)
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert all(word in done.stderr for word in words), done.stderr
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_too_many_bad_records(model: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, model)
    records = [*questions(40), "{not json", {"messages": []}, chat("only a question")]
    write_jsonl(tmp_path / "train.jsonl", records)
    done = run(recipe, nproc=2)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    assert "data.max_rejected" in done.stderr and "3 of 43" in done.stderr
    rejected = (tmp_path / "run" / "rejected.jsonl").read_text().splitlines()
    assert [json.loads(line)["line"] for line in rejected] == [41, 42, 43]
    assert run(recipe, "data.max_rejected=0.1", "train.steps=1").returncode == 0


@pytest.mark.parametrize("nproc", [1, 2])
def test_a_loss_that_is_no_number(model: Path, tmp_path: Path, nproc: int) -> None:
    folder = a_copy(model, tmp_path)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][3] = torch.inf
    save_file(tensors, folder / "model.safetensors")
    done = run(write_recipe(tmp_path, folder), nproc=nproc)
    assert done.returncode == 3, done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert "Step 1" in done.stderr and "train.jsonl:" in done.stderr
    assert not list((tmp_path / "run").glob("checkpoints/step_*"))


FULL_DISK = """
import subprocess, sys
from pathlib import Path
from moetrain.testing import command

disk, size, recipe = sys.argv[1:]
subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", disk], check=True)
for _ in range(2):
    done = command.run("train", recipe, "--nproc", "2", f"run_dir={disk}/run")
    print("code", done.returncode)
    print(*sorted(path.name for path in Path(disk, "run", "checkpoints").iterdir()), sep="\\n")
    sys.stderr.write(done.stderr)
    subprocess.run(["mount", "-o", "remount,size=1g", disk], check=True)
"""


def test_a_full_disk_while_saving(model: Path, tmp_path: Path) -> None:
    """A real one: a tmpfs that holds one checkpoint and not two; it grows, and the run ends."""
    recipe = write_recipe(tmp_path, model, checkpoint={"every": 2, "keep": 1})
    assert run(recipe, "train.steps=2", nproc=2).returncode == 0
    size = sum(path.stat().st_size for path in (tmp_path / "run").rglob("*") if path.is_file())
    mebibytes = round(size * 1.6 / 2**20)
    disk = tmp_path / "disk"
    disk.mkdir()
    unshare = ["unshare", "--user", "--map-root-user", "--mount"]
    probe = [*unshare, "mount", "-t", "tmpfs", "none", str(disk)]
    if subprocess.run(probe, capture_output=True, check=False).returncode:
        pytest.skip("no mount namespaces here: a full disk stays unproven")
    script = [sys.executable, "-c", FULL_DISK, str(disk), f"{mebibytes}m", str(recipe)]
    done = subprocess.run([*unshare, *script], capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith(("code", "step_"))]
    assert lines == ["code 2", "step_00000002", "code 0", "step_00000004"], (
        done.stdout + done.stderr
    )
    assert len(done.stderr.splitlines()) == 1 and "GiB free" in done.stderr, done.stderr
