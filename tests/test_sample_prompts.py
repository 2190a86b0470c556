"""train.sample_prompts: what of a file is asked, and that a wrong one is told of before a run."""

import json
from pathlib import Path

import pytest

from moetrain import cli
from moetrain.config.load import load_recipe
from moetrain.data.sample_prompts import read_sample_prompts

RECIPE = Path(__file__).parents[1] / "examples" / "sft_tiny.yaml"
GOOD = json.dumps({"prompt": "A?"}) + "\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist"),
        ("", "holds no record"),
        (GOOD + "{", "asked.jsonl:2: "),
        (GOOD + '{"text": "B"}\n', "asked.jsonl:2: has none of prompt, messages"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}\n', "asked.jsonl:1: "),
    ],
)
def test_a_wrong_file_is_one_line_in_a_dry_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str, message: str
) -> None:
    path = tmp_path / "asked.jsonl"
    if content is not None:
        path.write_text(content)
    words = [f"train.sample_prompts={path}", f"run_dir={tmp_path}/run"]
    assert cli.main(["train", str(RECIPE), "--dry-run", *words]) == 2
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1 and message in err and "train.sample_prompts" in err
    path.write_text(GOOD)
    assert cli.main(["train", str(RECIPE), "--dry-run", *words]) == 0
    assert "train.sample_prompts: 1 prompt, answered" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "tokens", "message"),
    [
        (json.dumps({"prompt": "word " * 2000}) + "\n", 8, "asked.jsonl:1: the prompt has"),
        (GOOD, 1024, "train.sample_tokens=1024 leaves no room for a prompt in the model's 1024"),
    ],
)
def test_what_the_model_has_no_room_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str, tokens: int, message: str
) -> None:
    (tmp_path / "asked.jsonl").write_text(content)
    words = [f"train.sample_prompts={tmp_path}/asked.jsonl", f"train.sample_tokens={tokens}"]
    assert cli.main(["train", str(RECIPE), "--dry-run", f"run_dir={tmp_path}/run", *words]) == 2
    assert message in capsys.readouterr().err


def test_a_run_says_so_before_it_begins(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [f"train.sample_prompts={tmp_path}/none.jsonl", f"run_dir={tmp_path}/run"]
    assert cli.main(["train", str(RECIPE), *words]) == 2
    assert "train.sample_prompts: " in capsys.readouterr().err
    assert not (tmp_path / "run" / "ledger.jsonl").exists()


def test_the_first_of_many_each_once(tmp_path: Path) -> None:
    path = tmp_path / "asked.jsonl"
    records = [{"prompt": f"{i // 2}?"} for i in range(100)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records) + "{")
    prompts, lines = read_sample_prompts(load_recipe(RECIPE, [f"train.sample_prompts={path}"]))
    assert [p.columns["prompt"][0]["content"] for p in prompts] == [f"{i}?" for i in range(16)]
    line = "train.sample_prompts: the first 32 prompts, answered at each evaluation: moetrain show "
    assert lines[0].startswith(line)
    assert read_sample_prompts(load_recipe(RECIPE)) == ([], [])
