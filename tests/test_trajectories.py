"""Trajectories: what of them is learned, and what of them is on disk."""

import json
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from moetrain.config.builtin import MODELS
from moetrain.data.begun import begun_in
from moetrain.data.groups import GradedAnswer, Group, pack_groups
from moetrain.data.samples import Kept, Prompt, Sample
from moetrain.data.trajectories import Branch, Finish, Trajectory, Word, from_json, to_json
from moetrain.errors import DataError
from moetrain.loops.replayed import check_known
from moetrain.loops.store import Batch, Store
from moetrain.models import read_model

PROMPT = Prompt("p", (1, 2, 3), {"prompt": [{"role": "user", "content": "q"}]})
RNG = np.random.default_rng(1)
ENDS: list[Finish] = ["stop", "length", "turns"]


def drawn(rng: np.random.Generator, index: int, *, before: int, rich: bool) -> Sample:
    """A turn of the model behind `before` tokens, in one go or in several by other weights."""
    tokens = tuple(int(n) for n in rng.integers(4, 90, rng.integers(1, 6)))
    versions = tuple(sorted(int(n) for n in rng.integers(0, 3, len(tokens))))
    several = len(set(versions)) > 1
    return Sample(
        "p",
        index,
        tokens,
        tuple(float(x) for x in -rng.random(len(tokens))),
        f"said {tokens}",
        "stop",
        versions[0],
        rng.integers(0, 200, (before + len(tokens) - 1, 2, 2)).astype(np.int16) if rich else None,
        Kept.of([[n, n + 1][: 1 + i % 2] for i, n in enumerate(tokens)]) if rich else None,
        versions if several else None,
    )


@st.composite
def trajectories(draw: st.DrawFn, *, index: int = 0, rich: bool | None = None) -> Trajectory:
    """Of several turns, some of them behind a conversation that a template has rewritten."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    rich = draw(st.booleans()) if rich is None else rich
    before = len(PROMPT.tokens)
    branch = Branch.of(drawn(rng, index, before=before, rich=rich))
    done: list[Branch] = []
    for rewrites in draw(st.lists(st.booleans(), max_size=3)):
        if rewrites:
            done.append(branch)
            context = rng.integers(4, 90, 7).astype(np.int32)
            branch = Branch.of(drawn(rng, index, before=7, rich=rich), context)
            before = 7
        else:
            reply = tuple(int(n) for n in rng.integers(90, 99, rng.integers(1, 5)))
            branch = branch.with_reply(reply, "a reply")
            place = before + len(branch.tokens)
            branch = branch.with_turn(drawn(rng, index, before=place, rich=rich))
    plain = not done and len(branch.turns) == 1
    messages: Any = () if plain else ({"role": "tool", "content": "a reply"},)
    return Trajectory("p", index, (*done, branch), draw(st.sampled_from(ENDS)), messages)


@settings(deadline=None, max_examples=60)
@given(trajectories(), st.data())
def test_a_turn_that_was_stopped_goes_on_to_what_it_would_have_been(
    one: Trajectory, data: st.DataObject
) -> None:
    """Wherever it was stopped, and by way of the disk: the tokens, their log-probs, the weights
    that drew them, and all before.
    """
    branch, last = one.branches[-1], one.turns[-1]
    place = len(branch.tokens) - last.num_tokens
    cut = data.draw(st.integers(1, last.num_tokens))
    kept = branch.kept
    if kept is not None:
        edge = int(kept.sizes[: place + cut].sum())
        kept = Kept(kept.sizes[: place + cut], kept.ids[:edge])
    stopped = replace(
        branch,
        turns=(*branch.turns[:-1], replace(last, num_tokens=cut, finish="open")),
        tokens=branch.tokens[: place + cut],
        logprobs=branch.logprobs[: place + cut],
        versions=branch.by_token[: place + cut],
        routes=None,
        kept=kept,
    )
    before = replace(one, branches=(*one.branches[:-1], stopped), finish="open")
    again = from_json(json.loads(json.dumps(to_json(before))))
    begun = begun_in(again)
    assert again.is_within and begun is not None and begun_in(one) is None
    assert begun.turn.version == last.version
    if branch.kept is not None:
        kept = Kept(branch.kept.sizes[place + cut :], branch.kept.ids[edge:])
    rest = Sample(
        one.prompt_id,
        one.index,
        tuple(branch.tokens[place + cut :].tolist()),
        tuple(branch.logprobs[place + cut :].tolist()),
        last.text,
        "stop",
        int(branch.by_token[-1]),
        branch.routes,
        kept,
    )
    # A second stop may come before it went on: the versions are those of the tokens.
    pieces = branch.by_token[place + cut :].tolist()
    rest = replace(rest, versions=tuple(pieces) if len(set(pieces)) > 1 else None)
    whole = rest.behind(begun.turn)
    if begun.before is None:
        branches: tuple[Branch, ...] = (Branch.of(whole, begun.context),)
    elif begun.context is not None:
        branches = (*begun.before.branches, Branch.of(whole, begun.context))
    else:
        branches = (*begun.before.branches[:-1], begun.before.branches[-1].with_turn(whole))
    assert_equal(replace(again, branches=branches, finish=one.finish), one)


def batch_of(made: list[Trajectory]) -> Batch:
    """A step's batch of one group."""
    return Batch(7, (Group(PROMPT, tuple(GradedAnswer(one, 1.0) for one in made)),), 1)


def same(a: Any, b: Any) -> bool:
    """Whether two optional arrays hold the same."""
    return a is b if a is None or b is None else np.array_equal(a, b)


def assert_equal(one: Trajectory, other: Trajectory) -> None:
    """In everything."""
    assert (one.prompt_id, one.index, one.finish) == (other.prompt_id, other.index, other.finish)
    assert one.turns == other.turns and list(one.messages) == list(other.messages)
    for a, b in zip(one.branches, other.branches, strict=True):
        assert same(a.tokens, b.tokens) and same(a.logprobs, b.logprobs)
        assert same(a.context, b.context) and same(a.routes, b.routes)
        assert same(a.by_token, b.by_token)
        for x, y in zip(a.kept or (), b.kept or (), strict=True):
            assert same(x, y)


@settings(deadline=None, max_examples=60)
@given(st.lists(trajectories(rich=True), min_size=1, max_size=4), st.booleans())
def test_what_is_learned_is_what_the_model_wrote(made: list[Trajectory], beyond: bool) -> None:
    """With the log-prob that it was drawn with and what could be drawn; replies are context."""
    made = [Trajectory("p", i, one.branches, one.finish) for i, one in enumerate(made)]
    group = batch_of(made).groups
    packs = pack_groups(group, {}, seq_len=64, min_packs=2, beyond=beyond)
    learned: dict[int, list[tuple[int, float]]] = {i: [] for i in range(len(made))}
    for pack in packs:
        for n in range(pack.num_sequences):
            start, end = pack.cu_seqlens[n : n + 2].tolist()
            item, mask = int(pack.extras["item"][n]), pack.loss_mask[start:end] > 0
            if item < 0:
                assert not mask.any()
                continue
            labels = pack.labels[start:end][mask].tolist()
            drawn_at = pack.per_token["rollout_logp"][start:end]
            assert not drawn_at[~mask].any()
            assert (pack.per_token["kept"][start:end][mask][:, 0] > 0).all()
            assert not pack.per_token["kept"][start:end][~mask].any()
            learned[item] += zip(labels, drawn_at[mask].tolist(), strict=True)
            # What comes before each learned token is what the model saw: the tokens are its own.
            if int(pack.prefix[n]) < 0 if pack.prefix is not None else True:
                continue
            own = pack.tokens[start:end]
            assert own[1:].tolist() == pack.labels[start : end - 1].tolist()
    for item, one in enumerate(made):
        assert sorted(learned[item]) == sorted(zip(one.tokens, one.logprobs, strict=True))


@settings(deadline=None, max_examples=40)
@given(trajectories())
def test_a_trajectory_is_read_as_it_was_written(one: Trajectory) -> None:
    for readable in (False, True):
        text = json.dumps(to_json(one, readable=readable))
        assert_equal(one, from_json(json.loads(text)))


@settings(deadline=None, max_examples=20)
@given(st.lists(trajectories(rich=True), min_size=1, max_size=4))
def test_a_batch_is_read_as_it_was_written(
    tmp_path_factory: pytest.TempPathFactory, made: list[Trajectory]
) -> None:
    store = Store(tmp_path_factory.mktemp("rollouts"))
    store.write(batch_of(made))
    again = store.read(7)
    assert again is not None and again.cursor == 1
    for one, other in zip(made, again.answers, strict=True):
        assert_equal(one, other.trajectory)


def plain() -> Trajectory:
    return Trajectory.of(Sample("p", 0, (5, 6), (-0.5, -0.25), "hi", "stop", 2))


def test_numbers_are_beside_the_text_that_people_read(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.write(batch_of([plain()]))
    _, row = (tmp_path / "00000007.jsonl").read_text().splitlines()
    (answer,) = json.loads(row)["answers"]
    assert (answer["text"], answer["tokens"], answer["logp"]) == ("hi", 2, -0.75)
    numbers = tmp_path / "00000007.safetensors"
    content = bytearray(numbers.read_bytes())
    content[-3] ^= 4
    numbers.write_bytes(content)
    with pytest.raises(DataError, match=r"safetensors has other bytes than were written\. Remove"):
        store.read(7)
    numbers.unlink()
    with pytest.raises(DataError, match=r"is missing; it has the numbers of 00000007\.jsonl"):
        store.read(7)


LIES: tuple[tuple[int, tuple[Any, ...], Any], ...] = (
    # (line, place in it, what stands there)
    (0, ("sampling",), {"top_p": "x"}),
    (0, ("cursor",), -1),
    (0, ("counts",), {"faults": None}),
    (1, ("prompt", "tokens"), [1, {}]),
    (1, ("prompt", "tokens"), []),
    (1, ("prompt", "id"), 5),
    (1, ("answers",), []),
    (1, ("answers", 0, "reward"), "1.0"),
    (1, ("answers", 0, "reward"), float("nan")),
    (1, ("answers", 0, "parts"), {"exact": "x"}),
    (1, ("answers", 0, "messages"), [1]),
    (1, ("answers", 0, "tokens"), 3),
    (1, ("answers", 1, "branches"), [[]]),
    (1, ("answers", 1, "branches", 0, 0, "author"), "nobody"),
    (1, ("answers", 1, "branches", 0, 0, "num_tokens"), -2),
)


@pytest.mark.parametrize(("line", "place", "value"), LIES)
def test_rollouts_that_lie(tmp_path: Path, line: int, place: tuple[Any, ...], value: Any) -> None:
    """A line, before anything is learned: `rollout.replay` may be anybody's folder."""
    store = Store(tmp_path)
    many = (
        plain().branches[0].with_reply((7,), "so?").with_turn(drawn(RNG, 1, before=6, rich=False))
    )
    store.write(batch_of([plain(), Trajectory("p", 1, (many,), "stop", ({"role": "user"},))]))
    path = tmp_path / "00000007.jsonl"
    rows = [json.loads(row) for row in path.read_text().splitlines()]
    inner = rows[line]
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match=r"00000007.jsonl.* is not as it was written") as caught:
        store.read(7)
    assert "\n" not in str(caught.value)
    path.write_text(json.dumps(rows[0]) + "\n")
    with pytest.raises(DataError, match="no prompt"):
        store.read(7)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("lengths", np.array([2, 3], np.int64)),
        ("lengths", np.array([2, -7], np.int64)),
        ("lengths", np.array([2.0], np.float32)),
        ("tokens", np.zeros((2, 1), np.int32)),
        ("tokens", np.array([5, -6], np.int32)),
        ("kept/sizes", np.array([2**31 - 1, 1], np.int32)),
        ("kept/ids", np.array([-1, 0, 1], np.int32)),
        ("versions", np.array([1, -2], np.int32)),
        ("versions", np.array([1], np.int32)),
        ("routes", np.zeros((4, 2), np.int16)),
        ("routes", np.zeros((5, 2, 2), np.int16)),
    ],
)
def test_numbers_that_lie(tmp_path: Path, name: str, value: Any) -> None:
    """With a checksum that holds."""
    one = Trajectory.of(Sample("p", 0, (5, 6), (-0.5, -0.25), "hi", "stop", 2))
    routes = np.zeros((4, 2, 2), np.int16)
    branch = replace(one.branches[0], routes=routes, kept=Kept.of([[1, 2], [1]]))
    store = Store(tmp_path)
    store.write(batch_of([replace(one, branches=(branch,))]))
    numbers, rows = tmp_path / "00000007.safetensors", tmp_path / "00000007.jsonl"
    columns = load_file(numbers)
    key = "tokens/lengths" if name == "lengths" else name
    columns[key] = value
    if name != "lengths":
        columns[f"{name}/lengths"] = np.array([len(value)], np.int64)
    save_file(columns, numbers)
    head, row = rows.read_text().splitlines()
    said = json.loads(head) | {"crc": zlib.crc32(numbers.read_bytes())}
    rows.write_text(f"{json.dumps(said)}\n{row}\n")
    with pytest.raises(DataError, match="is not as it was written") as caught:
        store.read(7)
    assert "\n" not in str(caught.value)


def test_a_replay_of_another_model(tmp_path: Path) -> None:
    """Wherever a batch has its tokens and experts: embeddings would be read beyond their end."""
    model, store = read_model(MODELS["qwen3-moe-tiny"]), Store(tmp_path)
    vocab, num_experts = model.heads.vocab, model.num_experts
    (branch,) = Trajectory.of(Sample("p", 0, (5, 6), (-0.5, -0.25), "hi", "stop", 2)).branches
    word = Word(np.zeros(2, np.float32), np.zeros((2, 1), np.int32), np.zeros((2, 1), np.float32))

    def check(prompt: tuple[int, ...] = (1,), **own: Any) -> None:
        one = Trajectory("p", 0, (replace(branch, **own),), "stop")
        group = Group(Prompt("p", prompt, {}), (GradedAnswer(one, 1.0),))
        check_known(Batch(7, (group,), 1), store, model)

    routes = np.full((2, 4, 2), num_experts - 1, np.uint8)
    check((vocab - 1,), routes=routes, kept=Kept.of([[vocab - 1], [1]]), word=word)
    high = np.array([1, vocab], np.int32)
    lies: tuple[dict[str, Any], ...] = (
        {"prompt": (1, vocab)},
        {"tokens": high},
        {"context": high},
        {"kept": Kept.of([[1], [2, vocab]])},
        {"word": word._replace(ids=high[:, None])},
    )
    for own in lies:
        with pytest.raises(DataError, match=f"has token {vocab}, and the model {vocab} tokens"):
            check(**own)
    with pytest.raises(DataError, match=f"has expert {num_experts}, and the model"):
        check(routes=routes + 1)


def test_half_a_character_costs_itself(tmp_path: Path) -> None:
    """A tool's, or what a reward has logged: it is no reason to end a run."""
    one = replace(plain(), finish="error", detail="so \udc80")
    group = Group(PROMPT, (GradedAnswer(plain(), 1.0, {}, {"said": "\ud800"}),))
    store = Store(tmp_path)
    with store.open(8, [one]):
        pass
    (again,) = store.finished(8).values()
    assert again.detail == "so ?"
    store.write(Batch(7, (group,), 1, fault="\ud800"))
    batch = store.read(7)
    assert batch is not None and batch.fault == "?" and batch.answers[0].extra == {"said": "?"}


def test_rollouts_of_other_versions(tmp_path: Path) -> None:
    """Those of before have everything in one file and are read; later ones are refused."""
    prompt = {"id": "p", "tokens": [1, 2], "columns": {}}
    old = {"prompt_id": "p", "index": 0, "tokens": [5], "logprobs": [-0.5], "text": "hi"}
    old |= {"finish": "stop", "version": 0, "reward": 1.0, "parts": {}}
    rows = [{"cursor": 1, "temperature": 1.0}, {"prompt": prompt, "answers": [old]}]
    path = tmp_path / "00000003.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    batch = Store(tmp_path).read(3)
    assert batch is not None and batch.answers[0].trajectory.tokens == [5]
    assert batch.answers[0].trajectory.branches[0].by_token.tolist() == [0]
    Store(tmp_path).write(batch_of([plain()]))
    now = tmp_path / "00000007.jsonl"
    now.write_text(now.read_text().replace('"schema": 3', '"schema": 2'))
    batch = Store(tmp_path).read(7)
    assert batch is not None and batch.answers[0].trajectory.branches[0].by_token.tolist() == [2, 2]
    path.write_text(json.dumps(rows[0] | {"schema": 9}) + "\n")
    with pytest.raises(DataError, match=r"by a later moetrain \(schema 9; .*give another run_dir"):
        Store(tmp_path).read(3)
