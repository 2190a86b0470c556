"""From answers to pairs: what is chosen, what is left out, and why."""

import hashlib
import json
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moetrain import cli
from moetrain.data.formats import to_conversation
from moetrain.data.pair_formats import to_pair
from moetrain.data.pairing import Choice, Chosen, gather, pairs, right_answers


def answer(
    text: str, reward: float | None, logp: float = -1.0, tokens: int = 4, **more: Any
) -> dict[str, Any]:
    return {
        "text": text,
        "reward": reward,
        "parts": {"exact": reward},
        "finish": "stop",
        "tokens": [1] * tokens,
        "logprobs": [logp] * tokens,
        **more,
    }


def row(question: str, *answers: dict[str, Any], id: str = "") -> dict[str, Any]:
    messages = [{"role": "user", "content": question}]
    name = id or hashlib.sha256(question.encode()).hexdigest()[:16]
    return {"prompt": {"id": name, "tokens": [1], "columns": {"prompt": messages}},
            "answers": list(answers)}  # fmt: skip


def chosen_of(*rows: dict[str, Any], source: int = 0, **choice: Any) -> Chosen:
    config = Choice(**{"balance": 0.0, **choice})
    return pairs(gather([(source, r) for r in rows], config), config)


def test_the_rejected_one_is_the_wrong_one_that_the_model_was_surest_of() -> None:
    """A token: a long wrong answer has a lower sum, and may be the surer one."""
    found = chosen_of(
        row(
            "q",
            answer("right", 1.0, -0.1),
            answer("short wrong", 0.0, -1.0, tokens=2),
            answer("long wrong", 0.0, -0.5, tokens=9),
            answer("timid wrong", 0.0, -3.0),
        )
    )
    (record,) = found.records
    assert record["chosen"][0]["content"] == "right"
    assert record["rejected"][0]["content"] == "long wrong"
    assert record["share_right"] == 0.25 and record["rejected_logp"] == -0.5


def test_prompts_without_a_pair_are_counted_by_reason() -> None:
    found = chosen_of(
        row("a", answer("1", 1.0), answer("2", 1.0)),
        row("b", answer("1", 0.0), answer("2", 0.0)),
        row("c", answer("1", None)),
        row("d", answer("1", 1.0, finish="length"), answer("2", 0.0)),
        row("e", answer("1", 1.0), answer("2", 0.5)),
        row("f", answer("1", 1.0), answer("2", 0.0)),
    )
    assert len(found.records) == 1
    assert found.reasons == {
        "all right": 1,
        "none right": 1,
        "without a grade": 1,
        "right ones cut at the limit": 1,
        "wrong ones cut at the limit, or neither right nor wrong": 1,
    }


def test_answers_that_are_cut_count_where_asked_for() -> None:
    one = row("d", answer("1", 1.0, finish="length"), answer("2", 0.0))
    assert len(chosen_of(one, cut=True).records) == 1


def test_lengths_balance() -> None:
    """Right answers are mostly longer than wrong ones: choosing evens it out."""
    rows = [
        row(
            f"q{i}",
            *(answer(f"right {n}", 1.0, tokens=n) for n in (6, 12, 30)),
            answer("wrong", 0.0, tokens=8 + i % 5),
        )
        for i in range(40)
    ]
    found = chosen_of(*rows)
    more = [record["chosen_tokens"] - record["rejected_tokens"] for record in found.records]
    assert abs(mean(more)) < 0.5 and max(map(abs, more)) <= 6


def test_no_difficulty_gives_more_than_its_share() -> None:
    easy = [row(f"e{i}", *[answer(f"{n}", 1.0) for n in range(4)], answer("w", 0.0))
            for i in range(60)]  # fmt: skip
    hard = [row(f"h{i}", answer("r", 1.0), *[answer(f"w{n}", 0.0) for n in range(4)])
            for i in range(10)]  # fmt: skip
    found = chosen_of(*easy, *hard, balance=1.0)
    shares = [record["share_right"] for record in found.records]
    assert shares.count(0.2) == 10 and shares.count(0.8) == 35
    assert found.left_out["too many of their difficulty"] == 25


def test_the_same_prompt_and_the_same_answer_count_once() -> None:
    found = chosen_of(
        row("What  is 1?", answer("one", 1.0), answer("two", 0.0)),
        row("what is 1?", answer("ONE ", 1.0), answer("Two", 0.0, -0.2), id="ab"),
    )
    assert len(found.records) == 1 and found.records[0]["share_right"] == 0.5
    choice = Choice(balance=0.0)
    both = [(0, row("q", answer("1", 1.0), answer("2", 0.0))),
            (1, row("Q", answer("3", 1.0), answer("4", 0.0)))]  # fmt: skip
    found = pairs(gather(both, choice), choice)
    assert [record["source"] for record in found.records] == [0]


def test_what_a_prompt_s_template_reads_stays_with_it() -> None:
    """A prompt with other tools is another prompt, and is learned with its own."""
    tools = [{"type": "function", "function": {"name": "add"}}]
    with_tools = row("q", answer("one", 1.0), answer("two", 0.0))
    with_tools["prompt"]["columns"] |= {"tools": tools, "chat_template_kwargs": {"x": False}}
    plain = row("q", answer("three", 1.0), answer("four", 0.0))
    found = chosen_of(with_tools, plain).records
    assert sorted(len(to_pair(record).chosen.template_kwargs) for record in found) == [0, 2]
    for record in right_answers(gather([(0, with_tools)], Choice()), Choice()).records:
        assert to_conversation(record).template_kwargs == {"x": False, "tools": tools}


@given(
    st.lists(st.integers(1, 30), min_size=2, max_size=4),
    st.lists(st.integers(1, 9), min_size=4, max_size=4),
)
def test_sources_come_in_their_shares(sizes: list[int], weights: list[int]) -> None:
    weights = weights[: len(sizes)]
    shares = tuple(weight / sum(weights) for weight in weights)
    rows = [
        (source, row(f"{source} {i}", answer("1", 1.0), answer("2", 0.0)))
        for source, size in enumerate(sizes)
        for i in range(size)
    ]
    choice = Choice(balance=0.0, shares=shares)
    found = pairs(gather(rows, choice), choice)
    most = min(size / share for size, share in zip(sizes, shares, strict=True))
    for num, share in zip(found.per_source, shares, strict=True):
        assert abs(num - most * share) <= 0.5 + 1e-9
    assert sum(found.per_source) == len(found.records)


def test_right_answers_as_instruction_data() -> None:
    config = Choice(balance=0.0, per_prompt=2)
    rows = [
        row("a", *[answer(f"r{n}", 1.0, tokens=n) for n in (1, 5, 6, 50)], answer("w", 0.0)),
        row("b", answer("w", 0.0)),
    ]
    found = right_answers(gather([(0, r) for r in rows], config), config)
    assert {r["messages"][-1]["content"] for r in found.records} == {"r5", "r6"}
    assert found.reasons == {"none right": 1}
    assert to_conversation(found.records[0]).trained == [False, True]


def written(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def test_the_command_writes_what_dpo_reads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = written(
        tmp_path / "s.jsonl",
        *(row(f"q{i}", answer("right", 1.0), answer("wrong", 0.0)) for i in range(20)),
        row("all", answer("right", 1.0)),
    )
    out = tmp_path / "p" / "pairs.jsonl"
    command = ["pairs", str(source), "--out", str(out), "--held-out", "0.3"]
    assert cli.main(command) == 0
    said = capsys.readouterr().out
    assert "20 pairs of 20 of 21 prompts" in said and "no pair from 1 prompt (1 all right)" in said
    records = [json.loads(line) for line in out.read_text().splitlines()]
    held_out = [
        json.loads(line) for line in (tmp_path / "p/pairs.eval.jsonl").read_text().splitlines()
    ]
    assert len(records) + len(held_out) == 20 and held_out
    assert not {r["id"] for r in records} & {r["id"] for r in held_out}
    pair = to_pair(records[0])
    assert pair.chosen.messages[-1]["content"] == "right" and pair.margin is None
    before = out.read_text()
    assert cli.main(command) == 0 and out.read_text() == before
    assert cli.main([*command, "--right", "0.9"]) == 2
    assert "was made with --right 1.0, this is --right 0.9" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--shares", "0.5,0.5"], "2 numbers for 1 sources"),
        (["--shares", "half"], "no list such as"),
        (["--shares", "0.5"], "sum to 1"),
        (["--wrong", "1"], "must be below"),
        (["--held-out", "1"], "must be a share"),
        (["--by", "none"], "nothing to write"),
    ],
)
def test_a_mistake_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], message: str
) -> None:
    source = written(tmp_path / "s.jsonl", row("q", answer("1", 1.0), answer("2", 0.0)))
    out = tmp_path / "out.jsonl"
    assert cli.main(["pairs", str(source), "--out", str(out), *more]) == 2
    said = capsys.readouterr().err
    assert message in said and len(said.splitlines()) == 1 and not out.exists()


@pytest.mark.parametrize("more", [[], ["--sft"]])
def test_prompts_that_are_templated_already_are_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str]
) -> None:
    """`sample` answers them; no record could say where the answer's turn ends."""
    plain = row("q", answer("1", 1.0), answer("2", 0.0))
    marked = row("r", answer("1", 1.0), answer("2", 0.0))
    marked["prompt"]["columns"] = {"prompt": "<|im_start|>user\nr", "templated": True}
    both = written(tmp_path / "both.jsonl", plain, marked)
    out = tmp_path / "out.jsonl"
    assert cli.main(["pairs", str(both), "--out", str(out), *more]) == 0
    assert '(1 with "templated": true, sample prompts that are m' in capsys.readouterr().out
    assert len(out.read_text().splitlines()) == 1
    alone = written(tmp_path / "alone.jsonl", marked)
    assert cli.main(["pairs", str(alone), "--out", str(tmp_path / "none.jsonl"), *more]) == 2
    assert "nothing to write" in capsys.readouterr().err


def test_answers_of_several_turns_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Their last words alone would be an answer that nobody gave to the prompt."""
    turns = [{"role": role, "content": "x"} for role in ("assistant", "tool", "assistant")]
    one = row("q", answer("1", 1.0, messages=turns), answer("2", 0.0, messages=turns[:1]))
    source = written(tmp_path / "s.jsonl", one)
    assert cli.main(["pairs", str(source), "--out", str(tmp_path / "o.jsonl")]) == 2
    assert "s.jsonl:1 has answers of several turns; pairs" in capsys.readouterr().err


def test_other_files_are_told_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = written(tmp_path / "s.jsonl", {"question": "q"})
    assert cli.main(["pairs", str(source), "--out", str(tmp_path / "o.jsonl")]) == 2
    assert "s.jsonl:1 is no prompt with answers; its keys are question" in capsys.readouterr().err
    assert cli.main(["pairs", str(tmp_path / "no"), "--out", str(tmp_path / "o.jsonl")]) == 2
    assert "neither a file of `moetrain sample`" in capsys.readouterr().err


@pytest.mark.parametrize("opened", ["", "<think>\n"])
def test_a_cut_thought_is_never_given_an_end(opened: str) -> None:
    """Also not with --cut: the template would close it, and nobody sampled that."""
    begin = "" if opened else "<think>\n"
    question = row(
        "q",
        answer(f"{begin}hm</think>4", 1.0, tokens=6),
        answer(f"{begin}hm and then 5", 0.0, -0.1, finish="length"),
        answer(f"{begin}hm</think>5 and", 0.0, -0.5, finish="length"),
    )
    question["prompt"]["opened"] = opened
    (record,) = chosen_of(question, cut=True).records
    assert record["chosen"][0]["content"] == "<think>\nhm</think>4"
    assert record["rejected"][0]["content"] == "<think>\nhm</think>5 and"
    assert not chosen_of(question).records


BAD_ROWS: list[tuple[Any, str]] = [
    ("{", "malformed JSON"),
    ("[1]", "it is a list"),
    ('{"a": "\\ud800"}', "half of a character"),
    ('{"a": ' + "9" * 5000 + "}", "more than 4300 digits"),
    ({"prompt": "q", "answers": []}, "TypeError"),
    ({"prompt": {"id": "a", "columns": {}}, "answers": []}, "KeyError 'prompt'"),
    (row("q") | {"answers": None}, "TypeError"),
    (row("q", answer("a", 1.0) | {"text": 5}), "an answer's text"),
    (row("q", answer("a", 1.0) | {"logprobs": ["x"]}), "a log-prob or reward is not a number"),
    (row("q", answer("a", 1.0) | {"logprobs": [None]}), "a log-prob or reward is not a number"),
    (row("q", answer("a", 1.0) | {"logprobs": [10**400]}), "a log-prob or reward is not a number"),
    (row("q", answer("a", 1.0) | {"tokens": 10**400}), "tokens are of no such number"),
    (row("q", answer("a", 1.0) | {"tokens": -1}), "tokens are of no such number"),
    (row("q", answer("a", 1.0) | {"parts": [1]}), "an answer's parts"),
    (row("q") | {"prompt": {"id": 5, "columns": {"prompt": []}}}, "prompt.id is no text"),
]


@pytest.mark.parametrize(("bad", "reason"), BAD_ROWS)
def test_a_bad_line_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], bad: Any, reason: str
) -> None:
    good = json.dumps(row("q", answer("a", 1.0), answer("b", 0.0)))
    path = tmp_path / "s.jsonl"
    path.write_text(f"{good}\n{bad if isinstance(bad, str) else json.dumps(bad)}\n{good}\n")
    assert cli.main(["pairs", str(path), "--out", str(tmp_path / "p.jsonl")]) == 2
    said = capsys.readouterr().err
    assert f"{path}:2 is no" in said and reason in said
