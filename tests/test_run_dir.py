"""Which run_dir a recipe may continue, and what is written beside the outputs."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from moetrain.config.load import apply_override, load_recipe, recipe_from
from moetrain.config.optim import OptimConfig
from moetrain.config.recipe import Recipe
from moetrain.errors import ConfigError, MoetrainError
from moetrain.observe.sinks import check_sinks, open_sinks
from moetrain.run.folder import check_recipe, check_schedule, write_run_files


def make_recipe(run_dir: Path, *overrides: str) -> Recipe:
    content: dict[str, Any] = {
        "run_dir": str(run_dir),
        "model": {"path": "model"},
        "method": "sft",
        "data": {"train": "a.jsonl"},
        "train": {"steps": 10},
    }
    for override in overrides:
        apply_override(content, override)
    return recipe_from(content)


def start(run_dir: Path, *overrides: str) -> None:
    write_run_files(make_recipe(run_dir, *overrides), [{"rank": 0}], {"num_steps": 10})


def test_what_matters_must_agree(tmp_path: Path) -> None:
    assert check_recipe(make_recipe(tmp_path / "run")) is None
    start(tmp_path / "run")
    earlier = check_recipe(
        make_recipe(tmp_path / "run", "parallel.tp=2", "checkpoint.every=3", "train.steps=20")
    )
    assert earlier is not None and earlier.train.steps == 10
    with pytest.raises(ConfigError, match=r"optim\.lr=0\.0001, this recipe says optim\.lr=0\.5"):
        check_recipe(make_recipe(tmp_path / "run", "optim.lr=0.5"))
    with pytest.raises(ConfigError, match=r"data\.train=\[\"a\.jsonl\"\]"):
        check_recipe(make_recipe(tmp_path / "run", "data.train=[a.jsonl, b.jsonl]"))


def test_foreign_folders_are_refused(tmp_path: Path) -> None:
    (tmp_path / "ledger.jsonl").write_text("")
    with pytest.raises(ConfigError, match=r"without its resolved\.yaml"):
        check_recipe(make_recipe(tmp_path))
    with pytest.raises(ConfigError, match="is a file"):
        check_recipe(make_recipe(tmp_path / "ledger.jsonl"))


def rate(step: int, optim: OptimConfig, num_steps: int) -> float:
    """A schedule that depends on the length unless it is constant."""
    return optim.lr * (1 if optim.schedule == "constant" else 1 - step / num_steps)


def length(recipe: Recipe) -> int:
    return recipe.train.steps or 0


def test_a_run_is_prolonged_only_where_its_past_stays_the_same(tmp_path: Path) -> None:
    for schedule in ("constant", "cosine"):
        override = f"optim.schedule={schedule}"
        earlier, longer = (make_recipe(tmp_path, override, f"train.steps={n}") for n in (10, 20))
        check_schedule(earlier, longer, 0, length, rate)
        check_schedule(earlier, earlier, 10, length, rate)
        if schedule == "constant":
            check_schedule(earlier, longer, 10, length, rate)
        else:
            with pytest.raises(ConfigError, match=r"10 steps, now train\.steps makes it 20"):
                check_schedule(earlier, longer, 1, length, rate)


def test_files_beside_the_outputs(tmp_path: Path) -> None:
    start(tmp_path, "optim.lr=3e-4")
    assert load_recipe(tmp_path / "resolved.yaml") == make_recipe(tmp_path, "optim.lr=3e-4")
    environment = json.loads((tmp_path / "environment.json").read_text())
    assert environment["versions"]["torch"] and environment["recipe_hash"]
    assert json.loads((tmp_path / "ranks.json").read_text()) == [{"rank": 0}]


@pytest.mark.parametrize("text", [None, "import pydantic.nothing\n", "run = None\n"])
def test_wandb_is_asked_for_and_half_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str | None
) -> None:
    """A folder of its name, which Python takes for a package, and what a broken pip leaves."""
    check_sinks(make_recipe(tmp_path))
    (tmp_path / "wandb").mkdir()
    if text is not None:
        (tmp_path / "wandb" / "__init__.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    with pytest.raises(MoetrainError, match=r"Run `pip install .*wandb`, or set") as caught:
        recipe = make_recipe(tmp_path, "observe.wandb={project: x}", "observe.tensorboard=false")
        check_sinks(recipe)
        open_sinks(recipe, 0)
    assert "\n" not in str(caught.value)
