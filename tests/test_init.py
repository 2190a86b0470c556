"""`moetrain init`: a recipe for each job, from a look into model and data."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from data_helpers import LABELS, PAIRS, questions, tokenizer_folder, write_jsonl

from moetrain import cli
from moetrain.config.load import load_recipe
from moetrain.config.method import SECTIONS
from moetrain.data.indexing import index
from moetrain.methods import METHODS
from moetrain.run.propose import JOBS, Wanted, propose
from moetrain.testing import command
from moetrain.testing.tiny import save_model

ASKED = [{"question": f"{a} + 1?", "answer": str(a + 1)} for a in range(40)]
RECORDS: dict[str, list[Any]] = {"sft": questions(), "dpo": PAIRS, "kto": LABELS, "grpo": ASKED}
# What a method learns from -> whose records it has.
LIKE = {"chat": "sft", "pairs": "dpo", "labels": "kto", "prompts": "grpo"}


@pytest.fixture(scope="module")
def there(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and data for every job."""
    folder = tmp_path_factory.mktemp("init")
    save_model("qwen3_moe", folder / "model", vocab_size=512)
    shutil.copytree(tokenizer_folder(), folder / "model", dirs_exist_ok=True)
    for name, records in RECORDS.items():
        write_jsonl(folder / f"{name}.jsonl", records)
    (folder / "text.txt").write_text("A text to learn from. " * 2000)
    index([folder / "text.txt"], tokenizer_folder(), folder / "corpus")
    return folder


def wanted(there: Path, job: str, **more: Any) -> Wanted:
    name = LIKE.get(SECTIONS[job].learns_from) if job in SECTIONS else job
    data = there / (f"{name}.jsonl" if name else "corpus")
    if name == "grpo" and SECTIONS[job]().needs_rewards:
        more.setdefault("rewards", ("accuracy", "format"))
    if job in SECTIONS and SECTIONS[job].taught:
        more.setdefault("teacher", str(there / "model"))
    if job == "chord":
        more.setdefault("demonstrations", (str(there / "sft.jsonl"),))
    return Wanted(job, str(there / "model"), (str(data),), **more)


def test_every_method_is_a_job_and_has_a_recipe(there: Path, tmp_path: Path) -> None:
    assert JOBS.keys() == METHODS.keys()
    for number, job in enumerate(JOBS):
        adapter = number % 2 == 0
        path = tmp_path / f"{job}.yaml"
        path.write_text(propose(wanted(there, job, adapter=adapter)))
        recipe = load_recipe(path)
        assert (recipe.method.name, recipe.adapter is not None) == (job, adapter)
        assert cli.main(["train", str(path), "--dry-run"]) == 0


@pytest.mark.parametrize("job", ["sft", "dpo"])
def test_what_is_written_trains(there: Path, tmp_path: Path, job: str) -> None:
    out = tmp_path / "new.yaml"
    words = ["--model", there / "model", "--data", there / f"{job}.jsonl", "--adapter"]
    done = command.run("init", job, *words, "--out", out)
    assert done.returncode == 0, done.stderr
    assert f"Next: moetrain train {out} --dry-run" in done.stdout
    short = ["train.epochs=null", "train.steps=1", "observe.tensorboard=false"]
    done = command.run("train", out, f"run_dir={tmp_path}/run", *short)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(row) for row in (tmp_path / "run/ledger.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [1]
    assert (tmp_path / "run" / "hf" / "config.json").is_file()


def test_it_looks_at_lengths(there: Path, tmp_path: Path) -> None:
    """Packs of several short records, and the longest of long ones whole, within the model's."""
    for size, least, most in ((2, 64, 256), (60, 100, 256), (5000, 256, 256)):
        path = write_jsonl(
            tmp_path / f"{size}.jsonl",
            [{"prompt": "say", "completion": "a " * size + str(i)} for i in range(40)],
        )
        given = Wanted("sft", str(there / "model"), (str(path),))
        recipe_path = tmp_path / "r.yaml"
        recipe_path.write_text(propose(given))
        assert least <= load_recipe(recipe_path).data.seq_len <= most


def test_a_name_cannot_write_into_the_recipe(there: Path, tmp_path: Path) -> None:
    odd = tmp_path / 'a\n"seed": 7 # \t\'b.jsonl'
    write_jsonl(odd, [*questions(), {"x": 1}])
    path = tmp_path / "r.yaml"
    path.write_text(propose(Wanted("sft", str(there / "model"), (str(odd),))))
    assert load_recipe(path).data.train == [str(odd)]
    assert load_recipe(path).seed == 1234


@pytest.mark.parametrize(
    ("job", "changes", "said"),
    [
        ("sft", {"data": "dpo"}, "does not fit: .*dpo.jsonl:1: .*It fits dpo"),
        ("dpo", {"data": "sft"}, "does not fit: .*sft.jsonl:1: .*It fits sft"),
        ("sft", {"data": "none"}, "none.jsonl does not exist"),
        ("grpo", {"rewards": ()}, "grpo needs --reward"),
        ("grpo", {"data": "kto", "rewards": ("accuracy",)}, "no reward can grade its records"),
        ("sft", {"rewards": ("accuracy",)}, "sft does not read --reward"),
        ("chord", {"demonstrations": ()}, "chord needs --demonstrations"),
        ("pretrain", {"data": "sft"}, "moetrain data index"),
        ("fly", {}, "fly is no job. There are pretrain"),
        ("sft", {"model": "/none"}, "model.path=/none: no such folder"),
    ],
)
def test_what_does_not_fit(
    there: Path,
    tmp_path: Path,
    job: str,
    changes: dict[str, Any],
    said: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = wanted(there, job)
    data = there / f"{changes['data']}.jsonl" if "data" in changes else given.data[0]
    words = ["--model", changes.get("model", given.model), "--data", str(data)]
    for flag, values in (
        ("--reward", changes.get("rewards", given.rewards)),
        ("--demonstrations", changes.get("demonstrations", given.demonstrations)),
    ):
        words += [flag, *values] if values else []
    out = tmp_path / "new.yaml"
    assert cli.main(["init", job, *words, "--out", str(out)]) == 2
    err = capsys.readouterr().err
    assert re.search(said, err) and err.count("\n") == 1, err
    assert not out.exists()
