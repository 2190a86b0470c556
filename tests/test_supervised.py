"""Whole runs on real ranks: what they leave behind, and which of them go on."""

import json
from pathlib import Path
from typing import Any

import pytest
from data_helpers import questions, recipe, write_jsonl

from moetrain.config.recipe import Recipe
from moetrain.errors import ConfigError
from moetrain.loops.supervised import train
from moetrain.testing.gloo import Workers
from moetrain.testing.tiny import CONFIGS

pytestmark = pytest.mark.gloo
TIMES = ("seconds", "tokens_per_s", "memory_gib")


def make_recipe(folder: Path, run: str = "run", **sections: dict[str, Any]) -> Recipe:
    data = write_jsonl(folder / "train.jsonl", questions(48))
    held_out = write_jsonl(folder / "eval.jsonl", questions()[48:])
    hf = {"architectures": ["Qwen3MoeForCausalLM"], **CONFIGS["qwen3_moe"], "vocab_size": 512}
    base: dict[str, dict[str, Any]] = {
        "model": {"hf": hf, "dtype": "fp32"},
        "data": {"train": [str(data)], "eval": [str(held_out)]},
        "train": {"steps": 6, "eval_every": 4},
        "checkpoint": {"every": 2},
        "optim": {"lr": 1e-3},
        "observe": {"tensorboard": False},
    }
    for name, values in sections.items():
        base[name] = base.get(name, {}) | values
    made = recipe(folder, **base)
    return made.model_copy(update={"run_dir": folder / run})


def rows(run: Recipe) -> list[dict[str, Any]]:
    lines = (run.run_dir / "ledger.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in lines]


def weights(run: Recipe) -> list[bytes]:
    return [path.read_bytes() for path in sorted((run.run_dir / "hf").glob("*.safetensors"))]


def test_what_a_run_leaves_behind(workers: Workers, tmp_path: Path) -> None:
    run = make_recipe(
        tmp_path,
        observe={"tensorboard": True},
        checkpoint={"best": "eval_loss", "keep": 1, "export_hf": True},
    )
    assert workers.run(1, train, run) == [0]
    made = rows(run)
    assert [(r["step"], "eval_loss" in r) for r in made] == [(0, True)] + [
        (s, e) for s in range(1, 7) for e in ((False, True) if s % 2 == 0 else (False,))
    ]
    initial, *made = made
    assert initial["eval_loss"] > made[-1]["eval_loss"]
    ledger_keys = {"step", "loss", "tokens", "lr", "grad_norm"}
    loads = [f"{layer}{name}" for layer in ("", "layer0/", "layer3/")
             for name in ("load_max_over_mean", "dead_experts")]  # fmt: skip
    ledger_keys |= {f"router/{name}" for name in ("aux_loss", "z_loss", *loads)}
    assert made[0].keys() >= ledger_keys
    first = json.loads((run.run_dir / "ledger.jsonl").read_text().splitlines()[1])
    assert first["tokens_per_s"] > 0 and first["memory_gib"] > 0
    assert made[-2]["loss"] < made[0]["loss"]
    names = {path.name for path in run.run_dir.iterdir()}
    assert names >= {"resolved.yaml", "environment.json", "ranks.json", "loss.png", "tensorboard"}
    assert len(weights(run)) == 1
    published = [path.name for path in sorted((run.run_dir / "checkpoints").glob("step_*"))]
    assert published[-1] == "step_00000006" and len(published) <= 2

    # Started again it has nothing to do; with another learning rate it is refused.
    before = (run.run_dir / "ledger.jsonl").read_text()
    assert workers.run(1, train, run) == [0]
    assert (run.run_dir / "ledger.jsonl").read_text() == before
    with pytest.raises(ConfigError, match=r"optim\.lr=0\.001, this recipe says optim\.lr=0\.1"):
        workers.run(1, train, make_recipe(tmp_path, optim={"lr": 0.1}))
    with pytest.raises(ConfigError, match=r"6 steps, now train\.steps makes it 8"):
        workers.run(1, train, make_recipe(tmp_path, train={"steps": 8}))


def test_a_run_is_prolonged_and_equals_a_long_one(workers: Workers, tmp_path: Path) -> None:
    constant = {"lr": 1e-3, "schedule": "constant"}
    never = {"eval_every": None}
    for run, lengths in (("short", (4, 7)), ("long", (7,))):
        for steps in lengths:
            made = make_recipe(
                tmp_path, run, optim=constant, train={"steps": steps} | never, data={"eval": []}
            )
            assert workers.run(2, train, made) == [0, 0]
    assert rows(make_recipe(tmp_path, "short")) == rows(make_recipe(tmp_path, "long"))


def test_epochs_end_where_the_data_does(workers: Workers, tmp_path: Path) -> None:
    """On two ranks, with a smaller last step; prolonged, the run goes on with the next record."""
    constant = {"lr": 1e-3, "schedule": "constant"}
    found: dict[float, list[int]] = {}
    for epochs in (1, 2):
        made = make_recipe(
            tmp_path,
            optim=constant,
            train={"epochs": epochs, "eval_every": None, "global_batch": 32},
            data={"eval": [], "pack": False},
        )
        assert workers.run(2, train, made) == [0, 0]
        found[epochs] = [row["tokens"] for row in rows(made)]
    assert len(found[1]) == 2 and found[1][1] < 0.7 * found[1][0]  # 48 packs
    assert found[2][:2] == found[1] and sum(found[2]) == 2 * sum(found[1])


def test_steps_that_move_nothing_are_refused(workers: Workers, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"decay_steps=2 ends before .* step 6 is 0"):
        workers.run(1, train, make_recipe(tmp_path, optim={"decay_steps": 2}))
