"""Rewards against what open-r1's own functions say of the same answers, as recorded by
tools/bench/open_r1_fixtures.py: 50 answers to questions of mathematics, 50 programs for problems in
the columns of open-r1/codeforces.
"""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from moetrain.config.rewards import RewardConfig
from moetrain.rewards import Grader, find_reward

THEIRS = json.loads((Path(__file__).parent / "fixtures" / "open_r1.json").read_text())
FORMAT = r"<think>\n.*?\n</think>\n<answer>\n.*?\n</answer>"
# (what open-r1 has recorded, the reward, its options)
SAME = [
    ("accuracy", "accuracy", {}),
    ("format", "format", {"pattern": FORMAT}),
    ("tag_count", "tag_count", {"newlines": True}),
    ("reasoning_steps", "reasoning_steps", {}),
    ("length", "len_reward", {}),
    ("cosine", "cosine", {}),
    ("cosine_of_script", "cosine", THEIRS["cosine_of_script"]),
    ("repetition_penalty", "repetition_penalty", {}),
    ("repetition_of_pairs", "repetition_penalty", {"ngram_size": 2, "max_penalty": -0.5}),
    ("code_format", "code_format", {}),
]


@pytest.mark.parametrize(("recorded", "name", "options"), SAME)
def test_a_reward_is_open_r1s(recorded: str, name: str, options: dict[str, Any]) -> None:
    config = RewardConfig(name=name, options=options)
    rows = THEIRS["mathematics"]
    assert len({row["completion"] for row in rows}) == len(rows) == 50
    found = of_groups(config, rows)
    wanted = [row["values"][recorded] for row in rows]
    assert found == pytest.approx(wanted, abs=1e-12) and len({*wanted}) > 1


def of_groups(config: RewardConfig, rows: list[dict[str, Any]]) -> list[float | None]:
    """By the function itself, on the answers to one prompt after another."""
    found: list[float | None] = []
    for prompt in dict.fromkeys(row["prompt"] for row in rows):
        own = [row for row in rows if row["prompt"] == prompt]
        texts = [row["completion"] for row in own]
        golds = [row["solution"] for row in own]
        found += find_reward(config.name)(texts, solution=golds, **config.options)
    return found


def test_what_cannot_be_read_leaves_a_sample_out() -> None:
    for row in THEIRS["unreadable"]:
        gold, text = row["solution"], row["completion"]
        for name in ("accuracy", "cosine", "len_reward"):
            assert find_reward(name)([text, gold], solution=[gold] * 2) == [None] * 2, (name, gold)
        assert row["value"] is None


OURS: list[tuple[float | None, dict[str, Any]]] = [
    (0.5, {}),  # behind max_len the value stays; there it comes up again
    (None, {}),  # a gold that cannot be read: all answers are right there
    (None, {}),
    (1.0, {}),  # words are compared
    (1.0, {}),  # a number needs no LaTeX around it
    (0.0, {}),  # of two answers neither is taken: the same
    (0.0, {"pattern": FORMAT}),  # nothing may stand behind the answer
]


def test_where_it_differs_from_open_r1() -> None:
    """As docs/rewards.md says."""
    for row, (value, options) in zip(THEIRS["differences"], OURS, strict=True):
        name = "len_reward" if row["reward"] == "length" else str(row["reward"])
        texts, golds = [row["completion"], "x"], [row["solution"]] * 2
        assert find_reward(name)(texts, solution=golds, **options)[0] == value, row


# Programs


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Generated tests, as open-r1/codeforces has them: a file for a contest."""
    folder = tmp_path_factory.mktemp("generated_tests")
    for problem in THEIRS["problems"].values():
        rows = [{"problem_id": problem["id"], "test_case_i": i} | t
                for i, t in enumerate(problem["more"])]  # fmt: skip
        if rows:
            other = {"problem_id": "1/Z", "test_case_i": 0, "input": "0", "output": "0"}
            name = f"test_cases_{int(problem['id'].partition('/')[0]):04d}.parquet"
            parquet.write_table(pa.Table.from_pylist([*rows, other]), folder / name)
    return folder


def records(rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """The columns as they are there, `generated_tests` as the number of further tests."""
    found = [
        {k: v for k, v in problem.items() if k != "more"}
        | {"language": row["language"], "generated_tests": len(problem["more"])}
        for row in rows
        for problem in [THEIRS["problems"][row["problem"]]]
    ]
    return {name: [one[name] for one in found] for name in found[0]}


CODEFORCES = {"no_code": -1.0, "no_compile": -0.1, "language": "record", "compare": "words"}


@pytest.mark.parametrize(("scoring", "batch"), [("weighted_sum", 2), ("pass_fail", -1)])
def test_programs_are_graded_as_open_r1s_cf_code(folder: Path, scoring: str, batch: int) -> None:
    rows = THEIRS["codeforces"]
    assert len({(row["problem"], row["completion"]) for row in rows}) == len(rows) == 50
    if scoring == "pass_fail":  # one of each score
        rows = list({(r["problem"], r["values"][scoring]): r for r in rows}.values())
    options = {"scoring": scoring, "generated_tests": str(folder), "test_batch_size": batch}
    grader = Grader([RewardConfig(name="code", options=CODEFORCES | options)], 2, 30)
    found = grader.grade([row["completion"] for row in rows], records(rows))
    grader.close()
    wanted = [row["values"][scoring] for row in rows]
    assert [one.reward for one in found] == pytest.approx(wanted)
    assert not grader.num_faults and grader.counts["code_missing"] >= 1


def test_programs_are_graded_as_open_r1s_code() -> None:
    rows = THEIRS["code"]
    info = [{"language": "python", "test_cases": THEIRS["cases"][row["cases"]]} for row in rows]
    configs = [
        RewardConfig(name="code", label=scoring, options={"scoring": scoring})
        for scoring in ("partial", "pass_fail")
    ]
    grader = Grader(configs, 1, 30)
    found = grader.grade([row["completion"] for row in rows], {"verification_info": info})
    grader.close()
    assert [one.parts for one in found] == [
        {"partial": row["code"], "pass_fail": row["binary_code"]} for row in rows
    ]
