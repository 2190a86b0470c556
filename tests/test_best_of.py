"""`moetrain eval --best-of`: the score of what a reward ranks highest, against enumeration."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moetrain import cli
from moetrain.config.bench import BenchConfig
from moetrain.errors import MoetrainError
from moetrain.evals.best_of import BestOf, best_of, counts_to, ranking_reward, vote_of_k
from moetrain.evals.evaluate import scored
from moetrain.evals.scores import majority

ROOT = Path(__file__).parents[1]
RANKS = st.one_of(st.none(), st.integers(-2, 2).map(float))


@given(st.lists(st.tuples(RANKS, st.sampled_from([0.0, 0.25, 1.0])), min_size=1, max_size=7))
def test_it_is_the_mean_over_all_draws(answers: list[tuple[float | None, float]]) -> None:
    """Of answers that rank alike, as if one were drawn; those without a rank come last."""
    ranks, scores = zip(*answers, strict=True)
    for k in range(1, len(answers) + 1):
        every: list[float] = []
        for drawn in itertools.combinations(range(len(answers)), k):
            keys = [-99.0 if (rank := ranks[i]) is None else rank for i in drawn]
            top = [scores[i] for i, key in zip(drawn, keys, strict=True) if key == max(keys)]
            every.append(fmean(top))
        assert best_of(ranks, scores, k) == pytest.approx(fmean(every))


def test_small_cases_by_hand() -> None:
    assert best_of([0.1, 0.9, 0.5], [1.0, 0.0, 1.0], 3) == 0
    # Of the three pairs the second answer wins two, the third one.
    assert best_of([0.1, 0.9, 0.5], [1.0, 0.0, 1.0], 2) == pytest.approx(1 / 3)
    assert best_of([0.1, 0.9, 0.5], [1.0, 0.0, 1.0], 1) == pytest.approx(2 / 3)
    assert best_of([None, float("nan")], [1.0, 0.0], 2) == 0.5
    assert (
        counts_to(1) == [1] and counts_to(8) == [1, 2, 4, 8] and counts_to(12) == [1, 2, 4, 8, 12]
    )
    assert best_of([float(i) for i in range(400)], [0.0] * 399 + [1.0], 200) == 0.5


def test_a_vote_of_some_answers_is_the_mean_over_their_draws() -> None:
    votes, right = ["4", "4", "5", "6", "5"], [True, True, False, False, False]
    every = [
        majority([votes[i] for i in own], [right[i] for i in own])
        for own in itertools.combinations(range(5), 3)
    ]
    assert vote_of_k(votes, right, 3) == pytest.approx(fmean(every))
    assert vote_of_k(votes, right, 5) == majority(votes, right)
    many = vote_of_k(votes * 8, right * 8, 8)  # C(40, 8) draws: some of them, the same each time
    assert many == vote_of_k(votes * 8, right * 8, 8) and 0.3 < many < 0.7


def bench(**content: Any) -> BenchConfig:
    given = {"name": "b", "data": "q.jsonl", "scorer": "exact", "rewards": ["length"]}
    more = {"samples": 4, "rollout": {"eval_temperature": 1.0}}
    return BenchConfig.model_validate(given | more | content)


def row(*answers: tuple[str, float | None, float | None]) -> dict[str, Any]:
    """(text, grade, rank) each; an answer that one of the two failed on has no reward."""
    found = [
        {"text": text, "parts": {"exact": grade, "length": rank}}
        | {"reward": None if rank is None else grade}
        for text, grade, rank in answers
    ]
    return {"prompt": {"id": "a"}, "answers": found}


def test_the_grade_is_the_scorers_whatever_ranks() -> None:
    """Also of an answer that the ranking reward failed on: it ranks last and counts as it is."""
    rows = [
        row(("4", 1.0, 0.9), ("5", 0.0, 0.1), ("5", 0.0, 0.2), ("4", 1.0, None)),
        row(("4", 1.0, 0.1), ("5", 0.0, 0.3), ("5", 0.0, 0.2), ("4", None, 0.9)),
    ]
    best = BestOf(4, "length")
    scores = scored(bench(), rows, best)
    assert scores["pass@1"].value == pytest.approx((0.5 + 0.25) / 2)
    assert scores["best@4"].value == 0.5
    assert best.values["best by length"][4] == [1.0, 0.0]
    assert best.values["best by length"][1] == pytest.approx([0.5, 0.25])
    assert best.values["pass"][4] == [1.0, 1.0] and best.values["majority"][4] == [0.5, 0.25]
    left_out = BestOf(4, "length")
    scored(bench(ungraded="leave_out"), rows, left_out)
    assert [len(own) for own in left_out.values["best by length"].values()] == [2, 2, 1]


def test_a_reward_that_ranks_nothing_is_told() -> None:
    best = BestOf(2, "length")
    with pytest.raises(MoetrainError, match="no answer was ranked"):
        scored(bench(), [row(("4", 1.0, None), ("5", 0.0, None))], best)
    scored(bench(), [row(("4", 1.0, 0.5), ("5", 0.0, None))], some := BestOf(2, "length"))
    assert (some.num_unranked, some.num_answers) == (1, 2)


def test_a_mean_score_is_told_on_its_scale() -> None:
    config = bench(pass_at=[], scale=[1, 5], vote=False)
    rows = [row(("x", 0.5, 1.0), ("y", 1.0, 2.0), ("z", 0.0, 0.0), ("z", 0.0, 0.0))] * 2
    best = BestOf(4, "length")
    scores = scored(config, rows, best)
    assert scores["score"].value == 1 + 4 * 0.375 and scores["best@4"].value == 5
    assert set(best.values) == {"best by length"}


@pytest.mark.parametrize(
    ("more", "num", "by", "message"),
    [
        ({}, 5, None, "needs as many answers to a question; samples is 4. Give samples=5"),
        ({"rewards": []}, 4, None, "has no reward that ranks answers, only the scorer exact"),
        ({}, 4, "judge", "b has length, exact. Add it to `rewards`"),
    ],
)
def test_what_cannot_rank_is_refused(
    more: dict[str, Any], num: int, by: str | None, message: str
) -> None:
    with pytest.raises(MoetrainError, match=message):
        ranking_reward(bench(**more), num, by)


def test_rewards_of_a_benchmark_are_told_apart() -> None:
    with pytest.raises(ValueError, match="two are called 'exact'"):
        bench(rewards=["exact"])
    with pytest.raises(ValueError, match="weight of length does nothing"):
        bench(rewards=[{"name": "length", "weight": 2.0}])
    assert ranking_reward(bench(), 4, None) == "length"
    assert ranking_reward(bench(), 4, "exact") == "exact"


def test_a_table_and_a_picture(
    tiny: Callable[[str], tuple[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = tmp_path / "q.jsonl"
    asked.write_text("".join(json.dumps({"prompt": f"{i} + 1?"}) + "\n" for i in range(3)))
    own = tmp_path / "own.py"
    own.write_text(
        "def even(completions, **columns):\n"
        "    return [float(len(c[0]['content']) % 2 == 0) for c in completions]\n"
        "def long(completions, **columns):\n"
        "    return [float(len(c[0]['content'])) for c in completions]\n"
    )
    out = tmp_path / "own.jsonl"
    command = ["eval", "builtin:qwen3-moe-tiny", str(ROOT / "examples/evals/checkable.yaml")]
    command += ["--out", str(out), f"data={asked}", "answer=null", "rollout.max_tokens=6"]
    command += [f"scorer={own}:even", "samples=4", "pass_at=[1,4]"]
    assert cli.main([*command, "--best-of", "4"]) == 2
    assert "has no reward that ranks" in capsys.readouterr().err and not out.exists()
    command += [f"rewards=[{own}:long]"]
    assert cli.main([*command, "--by", "long"]) == 2
    assert "Give --best-of N too" in capsys.readouterr().err
    assert cli.main([*command, "--best-of", "4"]) == 0
    said = capsys.readouterr().out
    assert "best@4" in said and "score against samples" in said
    assert out.with_suffix(".best_of.png").read_bytes().startswith(b"\x89PNG")
    content = json.loads(out.with_suffix(".json").read_text())
    curves = content["best_of"]["scores"]
    assert content["best_of"]["by"] == "long" and list(curves["best by long"]) == ["1", "2", "4"]
    # By hand, from the answers as they lie there.
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    wanted: list[float] = []
    for parts in ([one["parts"] for one in row["answers"]] for row in rows if "answers" in row):
        longest = max(one["long"] for one in parts)
        wanted.append(fmean(one["even"] for one in parts if one["long"] == longest))
    assert len(wanted) == 3
    assert curves["best by long"]["4"]["score"] == pytest.approx(fmean(wanted))
    assert content["scores"]["best@4"] == curves["best by long"]["4"]
    for k, name in (("1", "pass@1"), ("4", "pass@4")):
        assert curves["pass"][k] == content["scores"][name]
