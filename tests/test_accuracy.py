"""What `accuracy` pays, against a table of what people say, and votes as classes of answers."""

import itertools
import random
import time
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moetrain.data.thoughts import after_thought, opened_by
from moetrain.evals.scores import vote_of
from moetrain.rewards.accuracy import accuracy, equal, exact, final
from moetrain.rewards.reading import readings

TABLE = Path(__file__).parent / "fixtures" / "math_pairs.tsv"
MARKS = ("So it is \\boxed{{{}}}", "<think>7</think><answer>{}</answer>", "well\n#### {}")


def table() -> Iterator[tuple[str, str, str, float]]:
    """(part of the table, gold, given, right)."""
    part = ""
    for line in TABLE.read_text(encoding="utf-8").splitlines():
        if line.startswith("# -- ") or not line:
            continue
        if line.startswith("# "):
            part = line.split(" ")[1]
            continue
        right, gold, answer = line.split("\t")
        yield part, gold, answer.replace("⏎", "\n"), float(right)


PAIRS = list(table())


def paid(gold: str, text: str) -> float | None:
    return accuracy(completions=[text], answer=[gold])[0]


def test_the_table_is_large_and_has_both_grades() -> None:
    assert len(PAIRS) >= 300 and len({pair[:3] for pair in PAIRS}) == len(PAIRS)
    assert sum(right for *_, right in PAIRS) > 150 < sum(1 - right for *_, right in PAIRS)


@pytest.mark.parametrize(("part", "gold", "text", "right"), PAIRS)
def test_a_pair_has_the_grade_that_people_give(
    part: str, gold: str, text: str, right: float
) -> None:
    """A bare answer has it whichever side is the gold, and however it is marked."""
    pairs = [(gold, text)]
    if part == "Bare":
        pairs += [(text, gold)]
        pairs += [(g, mark.format(a)) for g, a in pairs for mark in MARKS]
    elif part == "Marked":
        pairs = [(gold, mark.format(text)) for mark in MARKS]
    for one, other in pairs:
        assert paid(one, other) == right, (one, other)


def test_the_columns_of_mixed_sources() -> None:
    golds: dict[str, Any] = {"answer": ["1", None, None], "solution": [None, "2", None]}
    assert accuracy(completions=["1", "2", "3"], **golds) == [1, 1, None]
    assert accuracy(["2", "2", "2"], answer=["", " ", ""], solution=["2", "3", ""]) == [1, 0, None]
    assert exact(["", "2"], answer=["", "2"]) == [None, 1]
    assert accuracy([[{"role": "assistant", "content": "1"}]], answer=[1]) == [1]


def test_a_thought_that_the_prompt_began() -> None:
    opened = opened_by("<|im_start|>assistant\n<think>\n")
    assert opened == "<think>\n"
    assert opened_by("<|im_start|>assistant\n<think>\n\n</think>\n\n") == ""
    assert opened_by("what is <think>?<|im_end|>\n<|im_start|>assistant\n") == ""
    cut, whole = "it is \\boxed{42}", "it is 41</think>42"
    assert accuracy([cut, whole], answer=["42"] * 2, opened=[opened] * 2) == [0, 1]
    assert exact([cut, whole], answer=["42"] * 2, opened=[opened] * 2) == [0, 1]
    assert after_thought(cut, opened) is None and after_thought(whole, opened) == "42"
    assert accuracy([cut], answer=["42"], opened=[""]) == [1]


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("<think>a</think>the tag <think> is 2", 1),
        ("<think>a</think>`<think>` begins it: 2", 1),
        ("[THINK]a[/THINK]the mark [THINK] is 2", 1),
        ("<think>a</think>2<think>b", 0),
        ("<think>a</think>so it is 2\n<think>or not", 0),
        ("<think>the tag <think> is 2", 0),
    ],
)
def test_a_mark_that_is_spoken_of_begins_no_thought(text: str, right: float) -> None:
    assert paid("2", text) == right


def test_no_text_takes_long_to_read() -> None:
    """Readings are made in the trainer, too: for votes."""
    rng = random.Random(3)
    pieces = (
        "\\boxed{ ( 1 , { \\frac <answer> $ \\[ or ^ x \\text{ #### \\{ and < \\cup ½ (1, -".split()
    )
    pieces += [" ", "\n", "sqrt(", "答案是"]
    texts = [piece * 30_000 for piece in pieces]
    texts += ["".join(rng.choices(pieces, k=20_000)) for _ in range(20)]
    texts += ["".join(rng.choices(pieces, k=300)) for _ in range(300)]
    slowest = 0.0
    for text in texts:
        start = time.perf_counter()
        vote_of(final(text))
        slowest = max(slowest, time.perf_counter() - start)
    assert slowest < 5


# Votes

NUMBERS = st.fractions(min_value=-50, max_value=50, max_denominator=8)


def spelt(value: Fraction, how: int) -> str:
    """A number, in one of the ways to write it."""
    up, down = abs(value.numerator), value.denominator
    sign = "-" * (value < 0)
    ways = [
        f"{sign}{up}/{down}",
        f"{sign}\\frac{{{up}}}{{{down}}}",
        f"${sign}\\dfrac{{{up}}}{{{down}}}$",
    ]
    if down in (1, 2, 4, 5, 8):
        plain = f"{float(abs(value)):.10g}"
        ways += [
            f"{sign}{plain}",
            f" {sign}{plain}. ",
            f"x = {sign}{plain}",
            f"\\text{{{sign}{plain}}}",
        ]
        # With three digits behind it, a comma parts thousands.
        comma = plain if len(plain.partition(".")[2]) == 3 else plain.replace(".", ",")
        ways += [
            f"{sign}{comma}",
            f"{float(abs(value) * 100):.10g}\\%".join([sign, ""]),
        ]
    if up > down > 1:
        ways += [
            f"{sign}{up // down} {up % down}/{down}",
            f"{sign}{up // down}\\frac{{{up % down}}}{{{down}}}",
        ]
    return ways[how % len(ways)]


@given(NUMBERS, NUMBERS, st.integers(0, 99), st.integers(0, 99))
def test_votes_for_numbers_are_votes_for_their_values(
    one: Fraction, other: Fraction, how: int, as_well: int
) -> None:
    a, b = spelt(one, how), spelt(other, as_well)
    assert (vote_of(a) == vote_of(b)) == (one == other), (a, b)


ANSWERS = sorted({side.strip() for part, *pair, _ in PAIRS if part == "Bare" for side in pair})
NAMED_OTHERWISE = {"y=3", "y > 5"}  # a vote is for 3, whatever it is called


def test_votes_are_classes_of_answers_that_are_graded_alike() -> None:
    """Reflexive, symmetric and transitive over all answers of the table; what is one vote is never
    graded as different.
    """
    votes = {text: vote_of(text) for text in ANSWERS}
    for key, group in itertools.groupby(sorted(ANSWERS, key=votes.__getitem__), votes.__getitem__):
        own = list(group)
        for a, b in itertools.product(own, own):
            assert vote_of(a) == vote_of(b) == key
            assert NAMED_OTHERWISE & {a, b} or equal(a, b), (a, b, readings(a), readings(b))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("1/2", "0.5"),
        ("50%", "\\frac12"),
        ("(5,\\infty)", "x > 5"),
        ("\\{1, 2\\}", "2 and 1"),
        ("3,000円", "¥3000"),
        ("2 1/2", "2.5"),
    ],
)
def test_ways_to_say_the_same_are_one_vote(one: str, other: str) -> None:
    assert vote_of(one) == vote_of(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("50", "50%"),
        ("5 cm", "5 m"),
        ("(1,2)", "(2,1)"),
        ("(1,2)", "\\{1,2\\}"),
        ("x > 5", "x \\ge 5"),
    ],
)
def test_other_answers_are_other_votes(one: str, other: str) -> None:
    assert vote_of(one) != vote_of(other)
