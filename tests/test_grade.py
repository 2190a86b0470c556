"""`moetrain grade`: a file of completions, graded as a run would."""

import json
from pathlib import Path
from typing import Any

import pytest

from moetrain import cli
from moetrain.answers.grade import histogram

OWN = """
def count(prompts, completions, **columns):
    return [float(len(completions))] * len(completions)

def hangs(completions, **columns):
    while "stay" in str(completions):
        pass
    return [1.0] * len(completions)

def failing(completions, **columns):
    raise ValueError("no luck")
"""


def written(path: Path, *records: Any) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def own(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(OWN)
    return path


def test_rows_are_in_order_and_the_terminal_has_worst_and_best(
    own: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = [{"role": "user", "content": "6 times 7?"}]
    file = written(
        tmp_path / "in.jsonl",
        {"completion": "<think>a</think><answer>42</answer>", "answer": "42", "prompt": asked},
        {"completion": "so</think><answer>42</answer>", "answer": 42, "prompt": "q<think>\n"},
        {"completion": "\\boxed{(1, 42)}", "solution": "42", "source": "b"},
        {"completion": [{"role": "assistant", "content": "no idea"}]},
    )
    out = tmp_path / "new.jsonl"
    command = ["grade", str(file), "--rewards", f"accuracy,format,{own}:count", "--out", str(out)]
    assert cli.main(command) == 0
    assert rows(out) == [
        {"reward": 3.0, "parts": {"accuracy": 1.0, "format": 1.0, "count": 1.0}},
        {"reward": 3.0, "parts": {"accuracy": 1.0, "format": 1.0, "count": 1.0}},
        {"reward": 2.0, "parts": {"accuracy": 0.0, "format": 0.0, "count": 2.0}},
        {"reward": 2.0, "parts": {"accuracy": None, "format": 0.0, "count": 2.0}},
    ]
    said = capsys.readouterr().out
    assert "mean 2.5000, 4 of 4 graded" in said
    assert "accuracy: mean 0.6667, 3 of 4 graded" in said
    assert "█" in said and "worst" in said and "record 3" in said and "\\boxed{(1, 42)}" in said


def test_what_fails_has_no_reward_and_is_told(
    own: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = written(tmp_path / "in.jsonl", *({"completion": text} for text in ("go", "stay", "go")))
    out = tmp_path / "out.jsonl"
    command = ["grade", str(file), "--out", str(out), "--seconds", "2", "--rewards"]
    assert cli.main([*command, f"{own}:hangs"]) == 0
    assert [row["reward"] for row in rows(out)] == [1.0, None, 1.0]
    assert rows(out)[1] == {"reward": None, "parts": {"hangs": None}}
    said = capsys.readouterr().out
    assert "mean 1.0000, 2 of 3 graded" in said and "1 timeout" in said
    assert cli.main([*command, f"{own}:failing"]) == 0
    assert [row["reward"] for row in rows(out)] == [None] * 3
    said = capsys.readouterr().out
    assert "no score, 0 of 3 graded" in said and "failing: ValueError: no luck" in said
    assert "0.0000" not in said


def test_a_sandbox_runs_what_code_grades(tmp_path: Path) -> None:
    tests = [{"input": "2", "output": "4"}]
    file = written(
        tmp_path / "in.jsonl",
        {"completion": "```python\nprint(int(input()) ** 2)\n```", "tests": tests},
        {"completion": "<think>```python\nprint(4)\n```", "tests": tests},
    )
    out = tmp_path / "out.jsonl"
    assert cli.main(["grade", str(file), "--rewards", "code", "--out", str(out)]) == 0
    assert [row["reward"] for row in rows(out)] == [1.0, 0.0]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"completion": 3}', "in.jsonl:2: `completion` is neither a text nor"),
        ("[1]", "in.jsonl:2: a record is an object, not list"),
        ('{"completion": "a"', "in.jsonl:2: malformed JSON: cut short at its end"),
        ('{"text": "a", "answer": 1}', "it has no `completion`; its keys are text, answer"),
        ('{"completion": "a", "prompt": 3}', "`prompt` is neither a text nor messages"),
        ('{"completion": "\\ud800"}', "in.jsonl:2: "),
    ],
)
def test_a_bad_line_is_one_line(
    line: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "in.jsonl"
    file.write_text('{"completion": "a"}\n' + line + "\n")
    assert cli.main(["grade", str(file), "--rewards", "format"]) == 2
    said = capsys.readouterr().err
    assert message in said and len(said.splitlines()) == 1


@pytest.mark.parametrize(
    ("rewards", "message"),
    [
        ("acuracy", "Did you mean 'accuracy'?"),
        ("", "--rewards names none"),
        ("accuracy,accuracy", "two are called 'accuracy'"),
        ("./nothing.py:f", "is not a file"),
        ("[{name: code, options: {scorin: x}}]", "Did you mean 'scoring'?"),
        ("[accuracy", "not YAML"),
    ],
)
def test_rewards_that_are_none(
    rewards: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = written(tmp_path / "in.jsonl", {"completion": "a"})
    assert cli.main(["grade", str(file), "--rewards", rewards]) == 2
    said = capsys.readouterr().err
    assert message in said and len(said.splitlines()) == 1


def test_a_histogram_has_each_value_where_there_are_few() -> None:
    assert histogram([1.0, 0.0, 1.0]) == [("0", 1), ("1", 2)]
    many = histogram([i / 100 for i in range(101)])
    assert len(many) == 10 and sum(num for _, num in many) == 101
    assert many[0][0] == "0 to 0.1" and many[-1][0] == "0.9 to 1"
