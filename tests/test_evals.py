"""Scores of benchmarks: estimators against enumeration, intervals, questions, what is refused."""

import itertools
import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moetrain import cli
from moetrain.config.bench import BenchConfig, load_bench
from moetrain.data.chat import Chat, ChatOptions
from moetrain.errors import MoetrainError
from moetrain.evals.evaluate import scored
from moetrain.evals.questions import read_questions
from moetrain.evals.scores import majority, mean_of, pass_at_k, share, vote_of
from moetrain.observe.runs import find_runs
from moetrain.observe.table import columns_of, write_csv

ROOT = Path(__file__).parents[1]


@given(st.integers(1, 8), st.data())
def test_pass_at_k_is_the_mean_over_all_draws(num: int, data: st.DataObject) -> None:
    right = data.draw(st.integers(0, num))
    k = data.draw(st.integers(1, num))
    marks = [True] * right + [False] * (num - right)
    every = [any(drawn) for drawn in itertools.combinations(marks, k)]
    assert pass_at_k(num, right, k) == pytest.approx(fmean(every))


def test_pass_at_k_of_many_answers_does_not_overflow() -> None:
    assert pass_at_k(20_000, 1, 10_000) == pytest.approx(0.5)


def test_a_majority_is_the_largest_group() -> None:
    assert majority(["4", "4", "5"], [True, True, False]) == 1
    assert majority(["4", "5", "5"], [True, False, False]) == 0
    assert majority(["4", "4", "5", "5", "6"], [True, True, False, False, False]) == 0.5
    assert majority(["a", "b"], [False, False]) == 0


def test_votes_are_told_apart_by_what_they_say() -> None:
    same = ["1,000", " 1000.", "$1000$", "1000.0"]
    assert len({vote_of(text) for text in same}) == 1
    assert vote_of("Yes.") == vote_of("yes") != vote_of("no")
    assert vote_of("nan") != vote_of("inf")


def test_a_wilson_interval_of_yes_and_no() -> None:
    """8 of 10: 0.490 to 0.943 (Wilson 1927, without correction for continuity)."""
    score = share([1.0] * 8 + [0.0] * 2)
    assert (score.low, score.high) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    none = share([0.0] * 20)
    assert none.low == 0 and none.high == pytest.approx(1.96**2 / (20 + 1.96**2), abs=1e-3)


def test_an_interval_holds_the_truth_as_often_as_it_says() -> None:
    """Questions of many difficulties, several answers each: the spread over questions, not over
    answers, is what another draw of questions would show.
    """
    rng = random.Random(1)
    hits = 0
    for _ in range(400):
        values: list[float] = []
        for _ in range(80):
            p = rng.choice((0.05, 0.5, 0.95))
            values.append(fmean(rng.random() < p for _ in range(8)))
        score = share(values)
        hits += score.low <= 0.5 <= score.high
    assert 0.92 <= hits / 400 <= 0.98


@given(st.lists(st.floats(0, 1), min_size=1, max_size=30))
def test_an_interval_stays_within_bounds_and_around_its_mean(values: list[float]) -> None:
    score = share(values)
    assert 0 <= score.low <= score.value <= score.high <= 1


def test_a_mean_of_unbounded_scores() -> None:
    score = mean_of([1.0, 2.0, 3.0, 6.0])
    assert score.value == 3 and score.high - score.value == pytest.approx(
        1.96 * math.sqrt(14 / 3 / 4), rel=1e-3
    )
    assert math.isinf(mean_of([1.0]).high)


def bench(**content: Any) -> BenchConfig:
    return BenchConfig.model_validate(
        {"name": "b", "data": "q.jsonl", "scorer": "exact", "answer": "answer"} | content
    )


def row(id: str, *answers: tuple[str, float | None]) -> dict[str, Any]:
    found = [{"text": text, "reward": reward} for text, reward in answers]
    return {"prompt": {"id": id}, "answers": found}


def test_scores_are_means_over_questions() -> None:
    config = bench(samples=3, pass_at=[1, 2], rollout={"eval_temperature": 1.0})
    rows = [
        row("a", ("4", 1.0), ("4", 1.0), ("5", 0.0)),
        row("b", ("7", 0.0), ("8", 1.0), ("7", 0.0)),
        row("c", ("x", None), ("y", None), ("z", None)),  # nothing could be graded
    ]
    scores = scored(config.model_copy(update={"ungraded": "leave_out"}), rows)
    assert scores["pass@1"].value == pytest.approx((2 / 3 + 1 / 3) / 2)
    assert scores["pass@2"].value == pytest.approx((1 + 2 / 3) / 2)
    assert scores["maj@3"].value == 0.5
    assert {score.num for score in scores.values()} == {2}
    # What could not be graded is wrong, where nothing else is said.
    scores = scored(config, rows)
    assert scores["pass@1"].value == pytest.approx((2 / 3 + 1 / 3) / 3)
    assert scores["pass@2"].value == pytest.approx((1 + 2 / 3) / 3)
    assert scores["maj@3"].value == pytest.approx(1 / 3)
    assert {score.num for score in scores.values()} == {3}
    half = [row("a", ("4", 1.0), ("4", None), ("5", None))]
    assert scored(config, half)["pass@1"].value == pytest.approx(1 / 3)
    with pytest.raises(MoetrainError, match="no answer was graded"):
        scored(config, rows[2:])


def test_a_judge_s_score_is_told_on_its_scale() -> None:
    scores = scored(bench(pass_at=[], scale=[1, 5]), [row("a", ("x", 0.5)), row("b", ("y", 1.0))])
    assert list(scores) == ["score"] and scores["score"].value == 4
    assert 1 <= scores["score"].low < 4 < scores["score"].high <= 5


@pytest.fixture(scope="module")
def tokenizer() -> Path:
    from moetrain.data import assets

    return assets.resolve("builtin:stdlib-tokenizer")


def written(folder: Path, *records: dict[str, Any]) -> Path:
    path = folder / "q.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_questions_are_asked_as_the_benchmark_says(tmp_path: Path, tokenizer: Path) -> None:
    path = written(
        tmp_path,
        {"input": "1 + 1?", "gold": "2", "hint": "small", "image": ""},
        {"input": "what is this?", "gold": "3", "hint": "big", "image": "abc"},
        {"input": "1 + 1?", "gold": "2", "hint": "small", "image": ""},
    )
    config = bench(
        question="input",
        answer="gold",
        where={"image": ""},
        system="Be brief.",
        prompt="{question} A {hint} number in \\boxed{{}}.",
    )
    found = read_questions(config, path, chat_of(tokenizer), 200)
    assert len(found) == 2 and len({prompt.id for prompt in found}) == 2
    first = found[0].columns
    assert first["answer"] == "2" and first["hint"] == "small"
    assert first["prompt"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "1 + 1? A small number in \\boxed{}."},
    ]
    assert (
        len(
            read_questions(
                bench(**config.model_dump() | {"limit": 1}), path, chat_of(tokenizer), 200
            )
        )
        == 1
    )


def chat_of(folder: Path) -> Chat:
    return ChatOptions().open(folder)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"answer": "gold"}, "has no 'gold'; its keys are question, answer"),
        ({"prompt": "{quesiton}"}, "cannot be filled in"),
        ({"where": {"kind": "x"}}, "has no record with"),
    ],
)
def test_a_question_that_cannot_be_asked_is_no_benchmark(
    tmp_path: Path, tokenizer: Path, more: dict[str, Any], message: str
) -> None:
    path = written(tmp_path, {"question": "1 + 1?", "answer": "2"})
    with pytest.raises(MoetrainError, match=message):
        read_questions(bench(**more), path, chat_of(tokenizer), 200)


def test_a_prompt_without_room_is_refused(tmp_path: Path, tokenizer: Path) -> None:
    path = written(tmp_path, {"question": "word " * 300, "answer": "2"})
    with pytest.raises(MoetrainError, match="the prompt has"):
        read_questions(bench(), path, chat_of(tokenizer), 20)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sampels=3", "Did you mean 'samples'"),
        ("samples=3", "one and the same"),
        ("pass_at=[4]", "needs as many answers"),
        ("rollout.max_token=3", "Did you mean 'rollout.max_tokens'"),
        ("scorer=", "scorer"),
        ("rollout.temperature=0.7", "rollout.temperature: rollout.eval_temperature is the temp"),
        ("rollout.group_size=3", "does not read rollout.group_size: `samples` says"),
        ("rollout={steps_off: 2}", "does not read rollout.steps_off"),
        ("rollout.prompts_per_step=5", "does not read rollout.prompts_per_step"),
        ("rollout.routing_replay=true", "does not read rollout.routing_replay"),
    ],
)
def test_a_benchmark_s_mistakes_are_told(override: str, message: str) -> None:
    with pytest.raises(MoetrainError, match=message):
        load_bench(ROOT / "examples" / "evals" / "gsm8k.yaml", [override])


@pytest.mark.parametrize("name", ["gsm8k", "hle", "elyza_tasks_100", "do_not_answer"])
def test_a_missing_file_is_a_line_that_says_where_to_get_it(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = ROOT / "examples" / "evals" / f"{name}.yaml"
    out = tmp_path / "evals" / "a.jsonl"
    missing = f"data={tmp_path / 'none.jsonl'}"
    assert cli.main(["eval", "builtin:qwen3-moe-tiny", str(path), "--out", str(out), missing]) == 2
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1 and load_bench(path).source in said
    assert not out.parent.exists()


def test_the_report_has_scores_and_what_they_are_worth(tmp_path: Path) -> None:
    for name, value in (("base", 0.25), ("tuned", 0.75)):
        folder = tmp_path / name / "evals"
        folder.mkdir(parents=True)
        content = {
            "name": "gsm8k",
            "scores": {"pass@1": {"score": value, "interval": [value - 0.1, value + 0.05], "n": 9}},
        }
        (folder / "gsm8k.json").write_text(json.dumps(content))
        (folder / "gsm8k.manifest.json").write_text("{}")
    (tmp_path / "tuned" / "evals" / "own.json").write_text('{"name": "own", "score": 3}')
    runs = find_runs([tmp_path])
    columns = {column.key: column for column in columns_of(runs)}
    assert [run.status for run in runs] == ["scores only"] * 2
    assert not any(run.problems for run in runs)
    gsm8k = columns["gsm8k pass@1"]
    assert gsm8k.cells == [0.25, 0.75] and gsm8k.nums == [9, 9] and gsm8k.best == 1
    assert gsm8k.halves == pytest.approx([0.075, 0.075])
    assert columns["own"].cells == [None, 3.0] and not any(columns["own"].halves)
    write_csv(list(columns.values()), tmp_path / "r.csv")
    assert "gsm8k pass@1,gsm8k pass@1 ±,gsm8k pass@1 n,own" in (tmp_path / "r.csv").read_text()


def test_a_model_is_asked_scored_and_resumed(
    tiny: Callable[[str], tuple[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "resolved.yaml").write_text("{}")
    asked = written(tmp_path, *({"prompt": f"{i} + 1?", "answer": str(i + 1)} for i in range(3)),
                    {"prompt": "9 + 1?"})  # fmt: skip
    command = ["eval", "builtin:qwen3-moe-tiny", str(ROOT / "examples/evals/checkable.yaml")]
    out = tmp_path / "run" / "evals" / "own.jsonl"
    small = ["--out", str(out), f"data={asked}", "answer=null", "samples=2", "pass_at=[1,2]"]
    small.append("rollout.max_tokens=6")
    assert cli.main([*command, *small]) == 0
    said = capsys.readouterr().out
    assert "pass@2" in said and "maj@2" in said and "95 % interval" in said
    assert f"no reward can grade 1 of 4 in {asked}: they lack answer" in said
    score = json.loads(out.with_suffix(".json").read_text())
    assert all(one["n"] == 4 for one in score["scores"].values())
    assert score["questions"] == 4 and score["counts"]["answers"] == 8
    assert 0 <= score["scores"]["pass@1"]["score"] <= score["scores"]["pass@2"]["score"] <= 1
    before = out.read_text()
    assert cli.main([*command, *small]) == 0  # all is there: nothing is drawn anew
    assert out.read_text() == before
    assert cli.main([*command, *small, "seed=7"]) == 2
    said = capsys.readouterr().err
    assert "was made with seed 1234, this is seed 7" in said and len(said.splitlines()) <= 2
