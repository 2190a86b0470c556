"""Post-training from the command line: every tiny recipe, the reference's cache, adapters that go
out of a run, a deepened model.
"""

import json
import math
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_helpers import answers_shown, write_jsonl
from safetensors.torch import load_file

from moetrain import cli
from moetrain.config.load import load_recipe
from moetrain.data.loader import RunData
from moetrain.ops.packed import Packed
from moetrain.testing import command

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
SHORT = ["train.steps=2", "data.seq_len=128", "train.eval_packs=2", "observe.tensorboard=false"]

FEW = "data.train=builtin:checkable-pairs-eval"  # fewer pairs than there are to train on


def moetrain(*words: str | Path) -> subprocess.CompletedProcess[str]:
    return command.run(*words)


def train(recipe: Path, run_dir: Path, *more: str) -> subprocess.CompletedProcess[str]:
    return moetrain("train", recipe, *SHORT, f"run_dir={run_dir}", *more)


def rows(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "ledger.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def earlier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What examples that go on from another's run begin from."""
    run = tmp_path_factory.mktemp("earlier") / "run"
    done = train(EXAMPLES / "sft_tiny.yaml", run, "checkpoint.export_hf=true")
    assert done.returncode == 0, done.stderr
    return run


@pytest.mark.parametrize("recipe", sorted(EXAMPLES.glob("*_tiny.yaml")), ids=lambda p: p.stem)
def test_every_tiny_recipe_runs(recipe: Path, tmp_path: Path, earlier: Path) -> None:
    goes_on = "path: runs/" in recipe.read_text()
    begin = (f"model.path={earlier}/hf", f"teacher.path={earlier}") if goes_on else ()
    done = train(recipe, tmp_path / "run", *begin)
    assert done.returncode == 0, done.stderr
    found = rows(tmp_path / "run")
    assert [row["step"] for row in found if "loss" in row] == [1, 2]
    assert all(math.isfinite(v) for row in found for v in row.values() if isinstance(v, float))
    assert any("eval_loss" in row or "eval_reward/mean" in row for row in found)
    method = load_recipe(recipe).method
    assert found[0]["step"] == 0 and set(method.about) - {"kl"} <= found[1].keys()
    assert f"eval_{method.about[0]}" in found[0]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`first` and `second`: two LoRA-DPO runs, alike but for the learning rate, with one cache."""
    folder = tmp_path_factory.mktemp("runs")
    asked = [{"prompt": "Say island and then garden."}, {"question": "Two?"}, {"prompt": "?"}]
    write_jsonl(folder / "asked.jsonl", [*asked, asked[0]])
    answered = (f"train.sample_prompts={folder}/asked.jsonl", "train.sample_tokens=8")
    for name, lr in (("first", "1e-3"), ("second", "2e-3")):
        more = (f"data.cache={folder / 'cache'}", f"optim.lr={lr}", "optim.warmup=0")
        done = train(
            EXAMPLES / "lora_dpo_tiny.yaml",
            folder / name,
            "train.steps=4",
            "checkpoint.export_hf=true",
            FEW,
            *more,
            *answered,
            "observe.tensorboard=true",
        )
        assert done.returncode == 0, done.stderr
        assert ("reference log-probs of" in done.stdout) == (name == "first"), done.stdout
    return folder


def test_a_recipe_can_be_scored_ahead(runs: Path) -> None:
    recipe = EXAMPLES / "lora_dpo_tiny.yaml"
    settings = (FEW, "data.seq_len=128", f"data.cache={runs / 'cache'}", "run_dir=/nonexistent")
    done = moetrain("score", recipe, *settings)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if "has no manifest.json" not in line]
    folders = [line.split(": ")[1] for line in lines]
    assert folders == [str(f) for f in (runs / "cache" / "reference").glob("[!.]*")] * 2
    refused = moetrain("score", EXAMPLES / "simpo_tiny.yaml")
    assert refused.returncode == 2 and "has no reference" in refused.stderr


@torch.no_grad()
def scored(model: Any, pack: Packed) -> dict[int, float]:
    """Number of an answer in its data -> sum of its log-probs, by transformers on the whole
    sequence.
    """
    assert pack.prefix is not None
    found: dict[int, float] = {}
    for i in range(pack.num_sequences):
        if pack.extras["role"][i] == 0:
            continue
        own = slice(*pack.cu_seqlens[i : i + 2].tolist())
        parent = int(pack.prefix[i])
        before = pack.tokens[slice(*pack.cu_seqlens[parent : parent + 2].tolist())]
        before = before[: 0 if parent < 0 else None]
        logits = model(torch.cat([before, pack.tokens[own]])[None]).logits[0, len(before) :]
        logp = torch.log_softmax(logits, -1).gather(1, pack.labels[own, None])[:, 0]
        found[int(pack.extras["item"][i])] = float((logp * pack.loss_mask[own]).sum())
    return found


def test_the_cached_reference_gives_the_loss_of_a_live_one(runs: Path) -> None:
    """Against transformers: the cache is the base's log-probs, and the held-out loss after the
    last step is that of the trained model with the base beside it.
    """
    from transformers import AutoModelForCausalLM

    from moetrain.data import assets

    settings = [*SHORT, f"data.cache={runs / 'cache'}"]
    held_out = RunData(load_recipe(EXAMPLES / "lora_dpo_tiny.yaml", settings)).eval_packs(0, 1)
    assert held_out is not None
    (table,) = (np.load(path) for path in (runs / "cache" / "reference").glob("*/logp.npy"))
    load: Any = AutoModelForCausalLM.from_pretrained
    base = load(assets.resolve("builtin:qwen3-moe-tiny"), dtype=torch.float32)
    trained = load(runs / "first" / "hf", dtype=torch.float32)
    losses: list[float] = []
    for pack in held_out:
        policy, live = scored(trained, pack), scored(base, pack)
        for item, value in live.items():
            assert table[item] == pytest.approx(value, abs=1e-4)
        items = list(live)
        for good, bad in zip(items[::2], items[1::2], strict=True):
            h = (policy[good] - live[good]) - (policy[bad] - live[bad])
            losses.append(math.log1p(math.exp(-0.1 * h)))
    assert len(losses) >= 2 and max(losses) - min(losses) > 1e-3
    (row,) = (row for row in rows(runs / "first") if row.get("eval_loss") and row["step"] == 4)
    assert row["eval_loss"] == pytest.approx(sum(losses) / len(losses), abs=1e-5)


@torch.no_grad()
def test_what_the_trained_model_answers_is_kept(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """At each evaluation; in the end it is what transformers draws from the exported model."""
    from transformers import AutoModelForCausalLM

    steps = [row["step"] for row in rows(runs / "first") if "eval_loss" in row]
    files = sorted((runs / "first" / "answers").iterdir())
    assert [int(path.stem) for path in files] == sorted({0, *steps}) and steps[-1] == 4
    head, *kept = map(json.loads, files[-1].read_text().splitlines())
    assert head["step"] == 4 and len(kept) == 3  # each prompt once
    assert answers_shown(runs / "first") == {"held_out": [int(path.stem) for path in files]}
    load: Any = AutoModelForCausalLM.from_pretrained
    model = load(runs / "first" / "hf", dtype=torch.float32)
    for row in kept:
        (answer,) = row["answers"]
        assert answer["reward"] is None and answer["version"] == 4
        prompt = torch.tensor([row["prompt"]["tokens"]])
        mask = torch.ones_like(prompt)
        ids = model.generate(prompt, attention_mask=mask, do_sample=False, max_new_tokens=8)
        wanted = ids[0, prompt.size(1) :].tolist()[: len(answer["tokens"])]
        assert answer["tokens"] == wanted and 0 < len(wanted) <= 8
    assert cli.main(["show", str(runs / "first")]) == 0
    out = capsys.readouterr().out
    assert "held-out answers of step 4\n" in out and "Say island and then garden." in out


def test_before_the_first_update_policy_and_reference_are_one(runs: Path) -> None:
    """A live reference would give these figures: the policy is still it."""
    initial, first = rows(runs / "first")[:2]
    assert initial["step"] == 0 and initial["eval_loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert abs(first["rewards/chosen"]) < 1e-5 and abs(first["kl"]) < 1e-4
    assert initial["eval_rewards/graded"] >= 2 and first["rewards/graded"] >= 2, "pairs"
    assert rows(runs / "second")[1]["loss"] == first["loss"]
    assert rows(runs / "second")[-1]["eval_loss"] != rows(runs / "first")[-1]["eval_loss"]


def test_a_cache_of_another_model_is_refused(runs: Path, tmp_path: Path) -> None:
    from moetrain.data import assets

    (folder,) = (runs / "cache" / "reference").glob("[!.]*")
    recipe, own = EXAMPLES / "lora_dpo_tiny.yaml", f"data.reference={folder}"
    same = train(recipe, tmp_path / "same", own, FEW)
    assert same.returncode == 0, same.stderr
    other = tmp_path / "tokenizer"  # another one, though these data have the same tokens in it
    shutil.copytree(assets.resolve("builtin:stdlib-tokenizer"), other)
    words = json.loads((other / "tokenizer.json").read_text())
    words["model"]["merges"] = words["model"]["merges"][:-1]
    (other / "tokenizer.json").write_text(json.dumps(words))
    for changes, word in (
        (("model.init=random", FEW), "model"),
        ((f"model.tokenizer={other}", FEW), "tokenizer"),
        (("data.train=builtin:checkable-pairs",), "data"),
    ):
        done = train(recipe, tmp_path / "other", own, *changes)
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
        assert f"another {word}" in done.stderr


def test_an_adapter_goes_out_of_a_run(runs: Path, tmp_path: Path) -> None:
    """The PEFT folder of a run, of its checkpoint, and what is merged by name: all the same."""
    from moetrain.data import assets

    run = runs / "first"
    done = moetrain("convert", "adapter", run, tmp_path / "peft")
    assert done.returncode == 0, done.stderr
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "peft" / name).read_bytes() == (run / "adapter" / name).read_bytes()
    base = assets.resolve("builtin:qwen3-moe-tiny")
    done = moetrain("convert", "merge", base, tmp_path / "peft", tmp_path / "merged")
    assert done.returncode == 0, done.stderr
    merged, live = (load_file(f / "model.safetensors") for f in (tmp_path / "merged", run / "hf"))
    assert merged.keys() == live.keys()
    for name, tensor in merged.items():
        assert torch.allclose(tensor, live[name], atol=1e-6), name


def test_a_deepened_model_trains_its_new_blocks_alone(tmp_path: Path) -> None:
    from moetrain.data import assets

    base = Path(assets.resolve("builtin:qwen3-moe-tiny"))
    done = moetrain("convert", "expand", base, tmp_path / "deep", "--every", "2")
    assert done.returncode == 0, done.stderr
    line = next(part for part in done.stdout.splitlines() if part.startswith("trainable: "))
    done = train(
        EXAMPLES / "sft_tiny.yaml",
        tmp_path / "run",
        f"model.path={tmp_path / 'deep'}",
        line.replace(": ", "=", 1).replace(" ", ""),
        "checkpoint.export_hf=true",
        "optim.lr=1e-2",
    )
    assert done.returncode == 0, done.stderr
    added = json.loads((tmp_path / "deep" / "expanded.json").read_text())["added"]
    before = load_file(tmp_path / "deep" / "model.safetensors")
    after = load_file(tmp_path / "run" / "hf" / "model.safetensors")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    new = {name for name in before if any(name.startswith(f"{block}.") for block in added)}
    assert changed and changed <= new
    assert any("o_proj" in name for name in changed) and any(
        "down_proj" in name for name in changed
    )
