"""A sample of the records of each input, and a share of them that is held out."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from data_helpers import QUESTIONS, questions, recipe, write_jsonl
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from moetrain.data.loader import RunData
from moetrain.data.prompts import prepare_prompts
from moetrain.data.selection import Selection, rows_of
from moetrain.data.sets import PackedSet
from moetrain.errors import DataError


def names_of(data: PackedSet | None) -> Counter[str]:
    """How often each record stands in a set, as FILE:LINE."""
    assert data is not None
    return Counter(name for i in range(len(data)) for name in data[i].ids if name)


def lines_of(data: PackedSet | None) -> Counter[int]:
    return Counter({int(name.rpartition(":")[2]): n for name, n in names_of(data).items()})


def files(folder: Path, *sizes: int) -> list[str]:
    return [
        str(write_jsonl(folder / f"{i}.jsonl", questions(size))) for i, size in enumerate(sizes)
    ]


def test_a_share_is_held_out_and_never_trained_on(tmp_path: Path) -> None:
    one = recipe(tmp_path, data={"train": files(tmp_path, 64), "eval_share": 0.1})
    train, held_out = (lines_of(RunData(one).packed(held_out=held)) for held in (False, True))
    assert (len(train), len(held_out)) == (58, 6)
    assert not train.keys() & held_out.keys() and len(train | held_out) == 64
    assert sorted(held_out) != list(range(59, 65)), "shuffled, not the last ones"
    assert RunData(one).prepare().num_eval_packs > 0
    other_seed = recipe(tmp_path, data=one.data.model_dump()).model_copy(update={"seed": 7})
    assert lines_of(RunData(other_seed).packed(held_out=True)) != held_out


def test_in_order_the_last_ones_are_held_out(tmp_path: Path) -> None:
    data = {"train": files(tmp_path, 20), "eval_share": 0.1, "shuffle": False, "take": [12]}
    one = recipe(tmp_path, data=data)
    # 10% of 12 is one record; the other 11 are the first ones.
    assert sorted(lines_of(RunData(one).packed(held_out=True))) == [20]
    assert sorted(lines_of(RunData(one).packed(held_out=False))) == list(range(1, 12))


def test_as_many_as_are_asked_for_of_each_path(tmp_path: Path) -> None:
    paths = files(tmp_path, 10, 6, 5)
    one = recipe(tmp_path, data={"train": paths, "take": [4, None, 12]})
    data = RunData(one).packed(held_out=False)
    found = names_of(data)
    own = [[n for name, n in found.items() if name.startswith(path)] for path in paths]
    assert sorted(own[0]) == [1] * 4
    assert sorted(own[1]) == [1] * 6
    assert sorted(own[2]) == [2, 2, 2, 3, 3], "more than there are: some again"
    assert names_of(RunData(one).packed(held_out=False)) == found


def test_without_either_the_set_is_the_one_it_was(tmp_path: Path) -> None:
    paths = files(tmp_path, 10)
    plain = RunData(recipe(tmp_path, data={"train": paths})).packed(held_out=False)
    whole = RunData(recipe(tmp_path, data={"train": paths, "take": [None]})).packed(held_out=False)
    assert plain is not None and whole is not None
    assert plain.sequences_fingerprint == whole.sequences_fingerprint
    assert RunData(recipe(tmp_path, data={"train": paths})).packed(held_out=True) is None


def test_prompts_are_chosen_in_the_same_way(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "p.jsonl", [{"prompt": q, "answer": a} for q, a in QUESTIONS])
    found = prepare_prompts(
        recipe(
            tmp_path,
            method={"name": "grpo"},
            rollout={"max_tokens": 8, "replay": str(tmp_path)},
            data={"train": [str(path)], "eval_share": 0.1, "take": [40]},
        )
    )
    train, held_out = {p.id for p in found.train.prompts}, {p.id for p in found.held_out}
    assert (len(train), len(held_out)) == (36, 4)
    assert not train & held_out


@given(
    num=st.integers(1, 30),
    take=st.none() | st.integers(1, 80),
    share=st.just(0.0) | st.floats(0.01, 0.99),
    shuffle=st.booleans(),
    seed=st.integers(0, 5),
)
def test_what_is_taken_and_what_is_held_out(
    num: int, take: int | None, share: float, shuffle: bool, seed: int
) -> None:
    own = Selection((take,), share, seed, shuffle)
    num_held = max(int((num if take is None else min(num, take)) * share), 1) if share else 0
    if num_held >= num or (take is not None and take <= num_held):
        with pytest.raises(DataError, match="to train on"):
            own.times(0, num, "a.jsonl")
        return
    times, held = own.times(0, num, "a.jsonl"), own.other().times(0, num, "a.jsonl")
    assert held.sum() == num_held and held.max(initial=0) <= 1
    assert times.sum() == (num if take is None else take) - num_held
    assert not (times * held).any()
    assert times[held == 0].max() - times[held == 0].min() <= 1, "each once before any again"


def test_every_record_comes_once_before_any_comes_again(tmp_path: Path) -> None:
    (path,) = files(tmp_path, 3)
    rows = [row.line for row in rows_of([path], Selection((7,), 0.0, 0, False))]
    assert rows == [1, 2, 3, 1, 2, 3, 1]


@pytest.mark.parametrize(
    ("sections", "match"),
    [
        ({"data": {"train": ["a", "b"], "take": [1]}}, "1 numbers for 2 data.train paths"),
        ({"data": {"train": ["a"], "eval": ["b"], "eval_share": 0.1}}, "exclude each other"),
        ({"data": {"train": ["a"], "eval_share": 1.0}}, "less than 1"),
        ({"data": {"train": ["a"], "take": [0]}}, "greater than or equal to 1"),
        (
            {"method": {"name": "cpt"}, "data": {"train": ["a"], "take": [3]}},
            "data.take does nothing",
        ),
        (
            {"method": {"name": "pretrain"}, "data": {"train": ["a"], "eval_share": 0.1}},
            "data.eval_share does nothing with method pretrain here: it chooses records",
        ),
    ],
)
def test_refused(tmp_path: Path, sections: dict[str, Any], match: str) -> None:
    with pytest.raises(ValidationError, match=match):
        recipe(tmp_path, **sections)


def test_nothing_left_to_train_on_is_said(tmp_path: Path) -> None:
    one = recipe(tmp_path, data={"train": files(tmp_path, 1), "eval_share": 0.5})
    with pytest.raises(DataError, match=r"1 record, and data\.eval_share=0\.5 leaves none"):
        RunData(one).prepare()
