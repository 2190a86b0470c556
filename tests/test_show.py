"""`moetrain show`: the answers of a run in the terminal, and which of its files they are."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from rich.cells import cell_len

from moetrain import cli
from moetrain.config.load import load_recipe
from moetrain.loops.held_out import Answers
from moetrain.observe import answers as reading
from moetrain.observe import report
from moetrain.observe.report_answers import MARK, section
from moetrain.observe.reporter import Reporter
from moetrain.observe.runs import Run
from moetrain.observe.sinks import as_table

ROOT = Path(__file__).parents[1]


def row(question: str, *answers: dict[str, Any], **columns: Any) -> dict[str, Any]:
    prompt = [{"role": "user", "content": question}]
    return {
        "prompt": {"id": question, "tokens": [1], "columns": {"prompt": prompt, **columns}},
        "answers": list(answers),
    }


def answer(text: str, reward: Any, **more: Any) -> dict[str, Any]:
    parts = {"accuracy": reward, "format": None}
    return {
        **{"text": text, "reward": reward, "parts": parts, "tokens": [1] * len(text)},
        **{"finish": "stop", "logprobs": []},
        **more,
    }


def write(path: Path, *rows: dict[str, Any], cut: str = "") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(one) + "\n" for one in rows) + cut)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Two whole batches, a third that is being made, and an evaluation."""
    few = [answer(f"said {i}", i / 10) for i in range(8)]
    write(tmp_path / "rollouts" / "00000001.jsonl", {"cursor": 1}, row("Old?", *few))
    new = [answer("lost", None, fault="timeout"), answer("long", 0.9, finish="length")]
    rows = ({"cursor": 2}, row("New?", *few), row("More?", *new, answer="seven"))
    write(tmp_path / "rollouts" / "00000002.jsonl", *rows, cut='{"prompt"')
    write(tmp_path / "rollouts" / "00000003.partial.jsonl", answer("half", None))
    write(tmp_path / "answers" / "00000002.jsonl", {"step": 2}, row("Kept?", answer("yes", 1.0)))
    return tmp_path


def shown(capsys: pytest.CaptureFixture[str], *words: str | Path) -> str:
    assert cli.main(["show", *map(str, words)]) == 0
    return capsys.readouterr().out


def test_the_newest_whole_batch_and_evaluation(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = shown(capsys, run)
    first, second = text.split("held-out answers of step 2")
    assert first.startswith("rollouts of step 2") and "half" not in text
    assert "10 answers to 2 prompts, mean reward 0.411 (9 graded)" in first
    assert "best 1  answer 10  reward 0.9 (accuracy 0.9, format -)  4 tokens  cut at the" in first
    assert 'answer: "seven"' in first
    # Five of each, none twice, the worst first among the worst.
    assert [first.count(f"{side} {i}  ") for side in ("best", "worst") for i in (1, 4, 5)] == (
        [1, 1, 1, 1, 1, 0]
    )
    assert "worst 1  answer 1  reward 0 " in first
    assert "user: Kept?" in second and "best 1" in second and "worst" not in second


def test_a_step_and_how_many(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, run, "--step", "1", "--worst", "2")
    assert "rollouts of step 1" in text and "held-out" not in text and "Old?" in text
    assert text.count("worst ") == 2 and "best" not in text
    assert "rollouts" not in shown(capsys, run / "answers" / "00000002.jsonl").split("\n")[0]
    assert shown(capsys, run, "--eval").startswith("held-out answers of step 2")
    assert "held-out" not in shown(capsys, run, "--rollouts")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--step", "7"], "no answers of step 7; it has rollouts of steps 1, 2 and held-out"),
        (["--eval", "--step", "1"], "it has held-out answers of step 2"),
        (["/nowhere"], "/nowhere is no run's folder"),
    ],
)
def test_what_is_not_there_is_one_line(
    run: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert cli.main(["show", *([] if words[0] == "/nowhere" else [str(run)]), *words]) == 2
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1 and message in err


def test_a_folder_without_answers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "rollouts").mkdir()
    (tmp_path / "rollouts" / "00000001.jsonl").write_text('[1]\n{"prompt": 3, "answers": {}}\n')
    for path, message in ((tmp_path / "x", "no run's folder"), (tmp_path, "holds no answers")):
        assert cli.main(["show", str(path)]) == 2
        assert message in capsys.readouterr().err
    (tmp_path / "rollouts" / "00000001.jsonl").unlink()
    assert cli.main(["show", str(tmp_path)]) == 2
    assert "train.sample_prompts" in capsys.readouterr().err


HOSTILE = "\x1b[2J\x1b]0;owned\x07 \x9b31m a\rb \u202egnp.exe \ud800 [bold]no[/bold]\n" + "x" * 5000


def test_rewards_that_have_no_mean(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Infinite ones, ones that a sum has no room for, ones that are no numbers."""
    odd = [float("inf"), -float("inf"), float("nan"), 1e308, 1e308, 10**400, "1", None]
    write(tmp_path / "a.jsonl", row("?", *(answer("a", one) for one in odd)))
    assert "mean reward nan (4 graded)" in shown(capsys, tmp_path / "a.jsonl")


def test_an_answer_cannot_drive_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Escapes, control characters and directions are written as codes; every line fits."""
    monkeypatch.setenv("COLUMNS", "80")
    long = "字" * 3000 + "\n" * 500 + "the end"
    path = tmp_path / "f\x1b[1m.jsonl"
    hostile = answer(HOSTILE, 1.0) | {"parts": {"\x1b[31m": 1.0}, "fault": "\x1b"}
    write(path, row(HOSTILE, hostile, answer(long, 0.0), column=HOSTILE))
    text = shown(capsys, path)
    assert not [c for c in text if (ord(c) < 32 and c != "\n") or 127 <= ord(c) < 160]
    assert "\u202e" not in text and "\\u202e" in text and "\\x1b[2J" in text and "\\ud800" in text
    assert "[bold]no[/bold]" in text
    assert max(map(cell_len, text.splitlines())) <= 80
    # A long text says how long it is, and keeps its end.
    assert f"of {len(long):,} characters" in text and "the end" in text
    assert len(text.splitlines()) < 150
    whole = shown(capsys, path, "--full")
    assert whole.count("字") == 3000 and "characters are left out" not in whole


def test_a_terminal_without_the_characters(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", row("字?", answer("é字", 1.0)))
    words = [sys.executable, "-m", "moetrain", "show", str(tmp_path / "a.jsonl")]
    done = subprocess.run(words, capture_output=True, check=True, env={"PYTHONIOENCODING": "ascii"})
    assert b"\\xe9\\u5b57" in done.stdout


def test_it_starts_without_what_is_heavy(run: Path) -> None:
    words = [sys.executable, "-X", "importtime", "-m", "moetrain", "show", str(run)]
    seconds: list[float] = []
    for _ in range(3):  # the best of them: other work shares the machine
        started = time.perf_counter()
        done = subprocess.run(words, capture_output=True, text=True, check=True)
        seconds.append(time.perf_counter() - started)
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert not loaded & {"torch", "numpy", "yaml", "pydantic", "megatron", "transformers"}
    assert min(seconds) < 0.6  # without the other packages of this environment: 0.15


@pytest.mark.parametrize("text", ["", "a", "a\n" * 30, "ab" * 900, "x" * 1501, "\n" * 2000])
def test_what_is_left_out_is_counted(text: str) -> None:
    short = reading.shortened(text, 1500, 30)
    if "left out here" not in short:
        assert short == text
        return
    head, _, tail = short.partition("\n[... ")
    tail = tail.partition("...]\n")[2]
    left = len(text) - len(head) - len(tail)
    assert text.startswith(head) and text.endswith(tail) and left > 0
    assert f"{left:,} of {len(text):,} characters" in short
    assert len(head) + len(tail) <= 1500 and short.count("\n") <= 31


def test_the_oldest_answers_make_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The newest stay, whatever their size."""
    store = Answers(tmp_path)
    for step in (0, 5, 10):
        store.write(step, 0.0, [], [])
        (tmp_path / f"{step:08d}.jsonl").write_text("x" * 100)
    size = len(json.dumps({"step": 15, "temperature": 0.0})) + 1
    monkeypatch.setattr("moetrain.loops.held_out.KEPT_BYTES", 200 + size)
    store.write(15, 0.0, [], [])
    assert list(reading.steps_of(tmp_path)) == [5, 10, 15]
    monkeypatch.setattr("moetrain.loops.held_out.KEPT_BYTES", 1)
    store.write(20, 0.0, [], [])
    assert list(reading.steps_of(tmp_path)) == [20]
    store.go_on(20)
    assert list(reading.steps_of(tmp_path)) == [20]
    store.go_on(0)
    assert list(reading.steps_of(tmp_path)) == []


def test_answers_on_the_page(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The newest evaluation's, each once, escaped; without one the newest batch's; a page of many
    runs stays small.
    """
    hostile = "</pre><script>alert(1)</script><img src=x onerror=alert(2)>\x1b[2J\u202e"
    hostile += "y" * 5000
    answers = [answer(f"said {i} " * i, i / 10) for i in range(12)]
    answers += [answer(hostile, 0.55, finish="length"), answer("", None, fault="<b>crash")]
    write(tmp_path / "answers" / "00000004.jsonl", {"step": 4}, row("<i>Why?</i>", *answers))
    write(tmp_path / "broken" / "answers" / "00000001.jsonl", {"step": 1}, cut="{")
    one = Run("a<b>", run, "finished")
    html = section([one, Run("broken", tmp_path / "broken", "failed")])
    assert "a&lt;b&gt;: held-out answers of step 4" in html and "broken" not in html
    assert "<script" not in html and "<img" not in html and "<i>" not in html
    assert "&lt;script&gt;" in html and "\x1b" not in html and "\\x1b[2J\\u202e" in html
    assert f"of {len(hostile):,} characters are left out" in html
    titles = re.findall(r'<div class="answer"><p><b>(.*?)</b>', html)
    wanted = ["best, longest", "best", "best", "worst", "worst", "worst"]
    assert titles == [*wanted, "longest, cut at the limit"]
    many = section([Run(str(i), run, "finished") for i in range(30)])
    assert len(many) < 500_000 and many.count("<details") == 20 and "10 more runs" in many
    for path in (run / "answers").iterdir():
        path.unlink()
    assert "rollouts of step 2" in section([one])
    assert section([Run("none", tmp_path / "none", "no steps")]) == ""
    page = report.page([one], report.columns_of([one]), "title")
    assert page.count('id="answers"') == 1 and MARK not in page


def test_a_few_answers_go_to_tensorboard(run: Path) -> None:
    """As they are in the run's folder; of a batch in each fiftieth part of a run alone; no mark of
    an answer is one of the text.
    """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    hostile = answer("```\n# A title <b>", 0.5) | {"parts": {"own": 0.5}}
    many = [answer(f"said {i}", i / 100) for i in range(30)]
    write(run / "answers" / "00000004.jsonl", {"step": 4}, row("Why?", hostile, *many))
    recipe = load_recipe(ROOT / "examples" / "grpo_tiny.yaml", [f"run_dir={run}"])
    with Reporter(recipe, 51, 0, speaks=True) as reporter:
        for step in (1, 2, 3):  # every second of 51
            made = run / "rollouts" / f"{step:08d}.jsonl"
            reporter.rollouts(step, reading.read_answers(made) if made.exists() else [])
        reporter.answers(4)
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    found = {tag: events.Tensors(tag) for tag in events.Tags()["tensors"]}
    assert {tag: [event.step for event in own] for tag, own in found.items()} == {
        "answers/rollouts/text_summary": [2],
        "answers/held_out/text_summary": [4],
    }
    text = found["answers/held_out/text_summary"][0].tensor_proto.string_val[0].decode()
    assert text.startswith("**best 1** reward 0.5 (own 0.5) 17 tokens\n\n    user: Why?\n\n&nbsp;")
    assert "\n    ```\n    # A title <b>\n" in text and text.count("**") == 2 * 8


def test_a_table_of_answers(run: Path) -> None:
    """Of Weights & Biases: a column for each part of any answer's reward."""
    made = [answer("x" * 9000, 1.0), answer("\x1b", None, finish="length", parts={"own": 2.0})]
    write(run / "a.jsonl", row("Why?", *made))
    few = [("best 1", reading.read_answers(run / "a.jsonl")[0])]
    few += [("", reading.read_answers(run / "a.jsonl")[1])]
    columns, rows = as_table(7, few)
    assert columns[-3:] == ["reward/accuracy", "reward/format", "reward/own"]
    first, second = (dict(zip(columns, own, strict=True)) for own in rows)
    assert len(first.pop("answer")) < 2100 and first.pop("prompt") == "user: Why?"
    assert first == {
        **{"step": 7, "which": "best 1", "tokens": 9000, "cut": False, "reward": 1.0},
        **{"reward/accuracy": 1.0, "reward/format": None, "reward/own": None},
    }
    assert second["answer"] == "\\x1b" and second["cut"] and second["reward/own"] == 2.0
