"""Pairs and labelled answers in packs: whole, side by side, their prompt once, nothing else scored.

The oracle is transformers' own chat template call on each whole conversation.
"""

import functools
import tempfile
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from data_helpers import LABELS, PAIRS, tokenizer_folder
from data_helpers import preference_set as make
from hypothesis import given, settings
from hypothesis import strategies as st

from moetrain.data import preference, tokenizer
from moetrain.data.chat import ChatOptions
from moetrain.data.encode import SetKind
from moetrain.data.sets import PackedSet
from moetrain.errors import DataError
from moetrain.ops.packed import prefixes, select

# As long and as odd as word problems with worked answers are.
REAL = [
    {
        "prompt": "A café sells 14 muffins at $3 each and half as many scones at $2.50. How much"
        " does it take in?",
        "chosen": "Muffins: 14 * 3 = $<<14*3=42>>42.\nScones: 7 * 2.5 = $<<7*2.5=17.5>>17.50.\n####"
        " 59.5",
        "rejected": "Muffins: 14 * 3 = $<<14*3=42>>42.\nScones: 7 * 2.5 = $<<7*2.5=17.5>>17.50.\n"
        "#### 69.5",
    },
    {
        "prompt": [
            {"role": "system", "content": "Answer with a number, nothing else."},
            {"role": "user", "content": "日本語で: 3 * 4?\n"},
            {"role": "assistant", "content": "12"},
            {"role": "user", "content": "And doubled?"},
        ],
        "chosen": "24",
        "rejected": "\n 34 😀",
    },
]


@functools.cache
def loaded() -> Any:
    return tokenizer.load(tokenizer_folder())


def whole(prompt: Any, answer: str) -> tuple[list[int], list[int]]:
    """Tokens of prompt and answer up to the end of the turn, and the positions that are scored.

    An answer is tokenised as it is sampled, after its prompt: a line's end before the
    place where it begins and one after it are two tokens.
    """
    before = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    asked = loaded().apply_chat_template(before, add_generation_prompt=True, tokenize=False)
    text = loaded().apply_chat_template(
        [*before, {"role": "assistant", "content": answer}], tokenize=False
    )
    assert isinstance(asked, str) and isinstance(text, str) and text.startswith(asked)
    start = len(loaded()(asked)["input_ids"])
    found = [*loaded()(asked)["input_ids"], *loaded()(text[len(asked) :])["input_ids"]]
    end = max(i for i, token in enumerate(found) if token == loaded().eos_token_id) + 1
    return found[:end], list(range(start - 1, end - 1))


@dataclass(frozen=True)
class Answer:
    """An answer as a pack has it: its whole sequence and which positions of it are scored."""

    role: int
    item: int
    tokens: list[int]
    scored: list[int]
    labels: list[int]
    pack: int
    place: int  # among the sequences of its pack
    margin: float


def answers(data: PackedSet) -> list[Answer]:
    """Every answer of a set, put together from its prefix and its own part; checks the rest."""
    found: list[Answer] = []
    for number in range(len(data)):
        pack = data[number]
        assert pack.num_tokens == data.seq_len
        bounds, parents = pack.cu_seqlens.tolist(), prefixes(pack).tolist()
        for i, (start, end) in enumerate(pairwise(bounds)):
            role, item = int(pack.extras["role"][i]), int(pack.extras["item"][i])
            scored = pack.loss_mask[start:end].nonzero()[:, 0].tolist()
            if role == 0:
                assert not scored and parents[i] == -1
                is_prompt = bool(pack.valid[start])
                assert item == (-1 if is_prompt else 0)
                assert not is_prompt or parents[i + 1] == i == parents[i + 2]
                continue
            tokens, offset = pack.tokens[start:end].tolist(), 0
            if parents[i] >= 0:
                a, b = bounds[parents[i]], bounds[parents[i] + 1]
                tokens, offset = pack.tokens[a:b].tolist() + tokens, b - a
            assert pack.position_ids[start:end].tolist() == list(range(offset, len(tokens)))
            assert pack.valid[start:end].all()
            found.append(
                Answer(
                    role=role,
                    item=item,
                    tokens=tokens,
                    scored=[offset + s for s in scored],
                    labels=pack.labels[start:end][scored].tolist(),
                    pack=number,
                    place=i,
                    margin=float(pack.extras["margin"][i]) if "margin" in pack.extras else 0.0,
                )
            )
    assert sorted(a.item for a in found) == list(range(data.num_items))
    return sorted(found, key=lambda a: a.item)


def check_groups(found: list[Answer]) -> None:
    """Both answers of a group are neighbours in one pack, the first one first."""
    for a, b in zip(found[::2], found[1::2], strict=True):
        assert a.pack == b.pack and b.place == a.place + 1
        for one in (a, b):
            assert one.labels == [one.tokens[i + 1] for i in one.scored]


WORDS = st.lists(st.sampled_from(["it", "is", "12", "13", "no", "né", "\n", "?"]), min_size=1)
TEXT = WORDS.map(lambda words: "so " + " ".join(words))
RECORDS = st.lists(st.tuples(TEXT, TEXT, TEXT), min_size=2, max_size=8)


@settings(max_examples=25, deadline=None)
@given(RECORDS, st.sampled_from([40, 64, 400]), st.booleans(), st.booleans())
def test_every_pair_is_whole_and_its_answers_are_neighbours(
    texts: list[tuple[str, str, str]], seq_len: int, share: bool, pack: bool
) -> None:
    records = [{"prompt": p, "chosen": a, "rejected": b} for p, a, b in texts]
    records.append({"prompt": "x", "chosen": "1", "rejected": "2"})  # fits in any case
    with tempfile.TemporaryDirectory() as folder:
        data = make(Path(folder), records, seq_len=seq_len, share_prompt=share, pack=pack)
        lines = [r.line for r in data.rejects()]
        kept = [r for i, r in enumerate(records, start=1) if i not in lines]
        found = answers(data)
        assert data.stats.num_groups == len(kept) == len(found) // 2
        assert pack or len(data) == len(kept)
    check_groups(found)
    assert [a.role for a in found] == [1, 2] * len(kept)
    for record, a, b in zip(kept, found[::2], found[1::2], strict=True):
        for key, one in (("chosen", a), ("rejected", b)):
            tokens, scored = whole(record["prompt"], record[key])
            assert one.tokens == tokens[: len(one.tokens)]
            assert one.scored == [i for i in scored if i + 1 < len(one.tokens)] and one.scored
            # A cut pair lost no more than it had to: it fills what a pack holds, but for one.
            if len(one.tokens) < len(tokens):
                starts = min(a.scored[0], b.scored[0]) if share else 0
                same = [x == y for x, y in zip(a.tokens[:starts], b.tokens, strict=False)]
                assert len(a.tokens) + len(b.tokens) - [*same, False].index(False) >= seq_len - 1


@settings(max_examples=25, deadline=None)
@given(RECORDS)
def test_sharing_the_prompt_changes_no_answer(texts: list[tuple[str, str, str]]) -> None:
    records = [{"prompt": p, "chosen": a, "rejected": b + " then"} for p, a, b in texts]
    with tempfile.TemporaryDirectory() as folder:
        sets = [
            make(Path(folder), [*records, *PAIRS[:3]], seq_len=400, share_prompt=share)
            for share in (True, False)
        ]
        found = [answers(data) for data in sets]
    plain = [[(a.item, a.role, a.tokens, a.scored, a.labels) for a in one] for one in found]
    assert plain[0] == plain[1]
    assert sets[0].sequences_fingerprint == sets[1].sequences_fingerprint
    assert sets[0].fingerprint != sets[1].fingerprint
    assert sets[1].stats.num_shared == 0
    shared = sets[0].stats.num_shared
    assert sets[0].stats.num_tokens + shared == sets[1].stats.num_tokens and shared > 0


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(TEXT, TEXT, st.booleans()), min_size=1, max_size=8), st.booleans())
def test_every_labelled_answer_has_the_next_one_beside_it(
    texts: list[tuple[str, str, bool]], share: bool
) -> None:
    records = [{"prompt": p, "completion": a, "label": label} for p, a, label in texts]
    records.append({"prompt": "another", "completion": "one", "label": True})
    with tempfile.TemporaryDirectory() as folder:
        found = answers(
            make(Path(folder), records, preference.LABELS, seq_len=400, share_prompt=share)
        )
    check_groups(found)
    for i, record in enumerate(records):
        own, mismatched = found[2 * i], found[2 * i + 1]
        assert (own.role, mismatched.role) == (1 if record["label"] else 2, 3)
        assert (own.tokens, own.scored) == whole(record["prompt"], record["completion"])
        later = records[i + 1 :] + records[:i]
        other = next(r for r in later if r["prompt"] != record["prompt"])
        expected = whole(record["prompt"], other["completion"])
        assert (mismatched.tokens, mismatched.scored) == expected


def test_real_texts_and_earlier_rounds(tmp_path: Path) -> None:
    found = answers(make(tmp_path, REAL, seq_len=512))
    check_groups(found)
    for record, a, b in zip(REAL, found[::2], found[1::2], strict=True):
        assert (a.tokens, a.scored) == whole(record["prompt"], record["chosen"])
        assert (b.tokens, b.scored) == whole(record["prompt"], record["rejected"])
    said = loaded().decode(found[2].labels)
    assert said == "24<|im_end|>"  # and not the earlier "12"


def test_a_pack_holds_a_prompt_once(tmp_path: Path) -> None:
    data = make(tmp_path, REAL[:1], seq_len=300)
    pack = data[0]
    prompt, chosen, rejected, padding = pack.cu_seqlens.diff().tolist()
    tokens, scored = whole(REAL[0]["prompt"], REAL[0]["chosen"])
    # The answers' common beginning is not shared, since it is scored, nor is the prompt's last
    # token, which predicts it.
    assert prompt == scored[0] and chosen == rejected == len(tokens) - prompt
    assert padding == 300 - prompt - chosen - rejected
    assert prefixes(pack).tolist() == [-1, 0, 0, -1]
    assert pack.extras["role"].tolist() == [0, 1, 2, 0]
    assert pack.extras["item"].tolist() == [-1, 0, 1, 0]
    assert pack.extras["item"].dtype == pack.extras["role"].dtype == torch.int64
    assert pack.ids == (*[f"{tmp_path / 'a.jsonl'}:1"] * 3, "")
    assert set(pack.extras) == {"role", "item"}


def test_mismatched_answers_can_be_selected(tmp_path: Path) -> None:
    pack = make(tmp_path, LABELS, preference.LABELS, seq_len=400)[0]
    alone = select(pack, pack.extras["role"] == 3)
    assert alone.extras["role"].tolist() == [0, 3] * (alone.num_sequences // 2)
    rest = select(pack, (pack.extras["role"] != 3) & (pack.extras["item"] >= 0))
    assert set(rest.extras["role"].tolist()) == {0, 1, 2}


def test_answers_alone(tmp_path: Path) -> None:
    """As apo_zero_unpaired has them: in LABELS' own words, no other beside them, cut as they are;
    and one prompt is enough.
    """
    for limit in (400, 40):
        both = make(tmp_path, LABELS, preference.LABELS, seq_len=limit)
        alone = make(tmp_path, LABELS, preference.LABELS_ALONE, seq_len=limit)
        wanted = [(a.role, a.tokens, a.scored) for a in answers(both) if a.role != 3]
        assert [(a.role, a.tokens, a.scored) for a in answers(alone)] == wanted and wanted
    one = [{"prompt": "One?", "completion": "Yes.", "label": True}]
    assert [a.role for a in answers(make(tmp_path, one, preference.LABELS_ALONE))] == [1]


def test_answers_of_the_same_prompt_are_not_mismatched(tmp_path: Path) -> None:
    twice = [
        {"prompt": q, "completion": f"{a} to {q}", "label": a == "right"}
        for q in ("One?", "Two?", "One?")
        for a in ("right", "wrong")
    ]
    twice.insert(1, {"prompt": "One?"})
    found = answers(make(tmp_path, twice, preference.LABELS))
    said = [loaded().decode(a.labels).removesuffix("<|im_end|>") for a in found[1::2]]
    one, two = ["right to One?"] * 2, ["right to Two?"] * 2
    assert said == [*two, *one, *two]  # the last two go round to the first that asks otherwise
    asked = [loaded().decode(a.tokens[: a.scored[0]]) for a in found[1::2]]
    assert ["One?" in text for text in asked] == [True, True, False, False, True, True]
    with pytest.raises(DataError, match="have the same prompt: kto measures its reference point"):
        make(tmp_path, twice[:3], preference.LABELS)


def test_margins_stand_on_the_chosen_answer(tmp_path: Path) -> None:
    records: list[dict[str, Any]] = [dict(pair) for pair in PAIRS[:4]]
    records[2]["margin"] = 0.5
    data = make(tmp_path, records)
    assert [a.margin for a in answers(data)] == [0, 0, 0, 0, 0.5, 0, 0, 0]
    assert data[0].extras["margin"].dtype == torch.float32


def shared_tokens(pair: list[list[int]]) -> int:
    """Of a pair's prompt, but for its last token."""
    most = next(i for i, (a, b) in enumerate(zip(*pair, strict=False)) if a != b)
    return most - 1


def test_pairs_that_are_too_long(tmp_path: Path) -> None:
    long = {"prompt": "Say it.", "chosen": "yes " * 100, "rejected": "no"}
    both = {"prompt": "Say it.", "chosen": "yes " * 100, "rejected": "no " * 100}
    late = {"prompt": "Say it.", "chosen": "yes " * 100 + "a", "rejected": "yes " * 100 + "b"}
    hopeless = {"prompt": "say " * 100, "chosen": "yes", "rejected": "no"}
    records = [*PAIRS[:2], long, both, late, hopeless]
    data = make(tmp_path, records)
    assert (data.stats.num_truncated, data.stats.num_groups) == (2, 4)
    reasons = {r.line: r.reason for r in data.rejects()}
    assert reasons[5] == "chosen and rejected are identical as far as data.seq_len 96 goes"
    assert "no part of one of them is within data.seq_len 96" in reasons[6]
    found = answers(data)
    prompt = whole(*list(long.values())[:2])[1][0]
    short = whole(long["prompt"], long["rejected"])[0]
    assert found[5].tokens == short and len(found[4].tokens) == 96 - len(short) + prompt
    assert len(found[6].tokens) == len(found[7].tokens) == prompt + (96 - prompt) // 2
    ends = make(tmp_path, [*records, far := hopeless | {"rejected": "never"}], too_long="keep_end")
    assert (ends.stats.num_truncated, ends.stats.num_groups) == (2, 4)
    for i, record in enumerate((hopeless, far)):  # whole answers behind what is left of the prompt
        sides = [whole(record["prompt"], record[name])[0] for name in ("chosen", "rejected")]
        kept = [a.tokens for a in answers(ends)[4 + 2 * i : 6 + 2 * i]]
        assert all(side[-len(own) :] == own for side, own in zip(sides, kept, strict=True))
        assert len(sides[0]) - len(kept[0]) == len(sides[1]) - len(kept[1])
        assert sum(map(len, kept)) - shared_tokens(kept) == 96
    assert {r.line: "no room for a prompt" in r.reason for r in ends.rejects()} == {
        line: True for line in (3, 4, 5)
    }
    refused = make(tmp_path, records, too_long="reject")
    assert (refused.stats.num_truncated, refused.stats.num_groups) == (0, 2)
    assert all("data.too_long is reject" in r.reason for r in refused.rejects())


def test_labelled_answers_that_are_too_long(tmp_path: Path) -> None:
    long = {"prompt": "Say it.", "completion": "yes " * 100, "label": True}
    hopeless = {"prompt": "say " * 100, "completion": "yes", "label": False}
    records = [*LABELS[:2], long, hopeless]
    data = make(tmp_path, records, preference.LABELS)
    # The second's mismatched answer is the long one, and the long one's own is cut.
    assert (data.stats.num_truncated, data.stats.num_rejected) == (2, 1)
    assert [a.role for a in answers(data)] == [1, 3, 2, 3, 1, 3]
    ends = make(tmp_path, records, preference.LABELS, too_long="keep_end")
    assert [r.line for r in ends.rejects()] == [3] and ends.stats.num_truncated == 1
    own = [a.tokens for a in answers(ends) if a.role == 2][-1]
    assert len(own) == 96 and whole(hopeless["prompt"], "yes")[0][-96:] == own
    refused = make(tmp_path, records, preference.LABELS, too_long="reject")
    assert [r.line for r in refused.rejects()] == [3, 4]
    assert [a.role for a in answers(refused)] == [1, 3, 2, 3]


@pytest.mark.parametrize("too_long", ["truncate", "reject"])
@pytest.mark.parametrize("share", [True, False])
def test_only_the_mismatched_answer_is_cut(tmp_path: Path, too_long: str, share: bool) -> None:
    """A real answer that fits stays whole whatever stands beside it; one that does not is cut to
    data.seq_len and no further, as in TRL.
    """
    few = [{"prompt": f"Say {i}.", "completion": "yes " * n, "label": True}
           for i, n in enumerate((3, 10, 40, 20, 60, 2, 90))]  # fmt: skip
    wholes = [whole(r["prompt"], r["completion"])[0] for r in few]
    limit = len(wholes[4])  # the fifth has a pack for itself, the seventh is too long
    data = make(
        tmp_path, few, preference.LABELS, seq_len=limit, too_long=too_long, share_prompt=share
    )
    found = answers(data)
    own = [a for a in found if a.role == 1]
    others = [a for a in found if a.role == 3]
    kept = wholes if too_long == "truncate" else wholes[:6]
    assert [a.tokens for a in own] == [tokens[:limit] for tokens in kept]
    assert [reject.line for reject in data.rejects()] == ([] if too_long == "truncate" else [7])
    assert len(others) == len(own) and all(a.scored for a in others)
    for i, other in enumerate(others):
        donor = few[(i + 1) % len(kept)]
        assert other.tokens == whole(few[i]["prompt"], donor["completion"])[0][: len(other.tokens)]
    assert len(others[4].tokens) == len(whole(few[4]["prompt"], few[5]["completion"])[0])


def test_a_difference_that_the_template_trims_is_none(tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ m.role }}: {{ m.content|trim }}<|im_end|>{% endfor %}"
    records = [*PAIRS[:1], {"prompt": "x", "chosen": "yes", "rejected": "yes "}]
    data = make(tmp_path, records, chat=ChatOptions(template))
    assert [r.reason for r in data.rejects()] == ["chosen and rejected are identical"]


@pytest.mark.parametrize(
    ("kind", "records", "message"),
    [
        (preference.PAIRS, LABELS, "has a rejected answer; their keys are"),
        (preference.LABELS, PAIRS, "has a label; their keys are"),
    ],
)
def test_data_of_another_kind(
    tmp_path: Path, kind: SetKind, records: list[dict[str, Any]], message: str
) -> None:
    with pytest.raises(DataError) as caught:
        make(tmp_path, records, kind)
    text = str(caught.value)
    assert f"None of the {len(records)} records in {tmp_path / 'a.jsonl'} {message}" in text
    assert f" {', '.join(sorted(records[0]))}. " in text and "\n" not in text
    with pytest.raises(DataError, match=r"can be used\. The first: "):
        make(tmp_path, [*records, "{"], kind)
