"""Answers drawn from a part of the distribution, or with a repetition penalty: what a sampler makes
of logits, and the trainer's log-probs of the same.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from moetrain.config.rollout import MOST_KEPT, RolloutConfig
from moetrain.data.groups import GradedAnswer, Group, pack_groups
from moetrain.data.samples import Kept, Prompt, Sample
from moetrain.data.trajectories import Trajectory, to_json
from moetrain.errors import DataError
from moetrain.ops.drawn import Drawn, drawn_of
from moetrain.ops.logprob import token_logprobs
from moetrain.rollout.base import Sampling, stopped_at, text_of_answer
from moetrain.rollout.shaping import shaped

V, H = 13, 6


# What a sampler leaves


def shares(sampling: Sampling, probs: list[float], seen: tuple[int, ...] = ()) -> list[float]:
    before = torch.zeros(1, len(probs), dtype=torch.bool)
    before[0, list(seen)] = True
    found = shaped(torch.tensor([probs]).log(), before, sampling)
    assert found.exp().sum() == pytest.approx(1, abs=1e-6)
    return found[0].exp().tolist()


@pytest.mark.parametrize(
    ("cut", "probs", "left"),
    [
        ({"top_k": 2}, [0.4, 0.3, 0.2, 0.1], [4 / 7, 3 / 7, 0, 0]),
        ({"top_k": 2}, [0.4, 0.2, 0.2, 0.2], [0.4, 0.2, 0.2, 0.2]),  # level with the second
        ({"top_k": 9}, [0.4, 0.3, 0.2, 0.1], [0.4, 0.3, 0.2, 0.1]),
        ({"top_p": 0.65}, [0.4, 0.3, 0.2, 0.1], [4 / 7, 3 / 7, 0, 0]),
        ({"top_p": 0.01}, [0.4, 0.3, 0.2, 0.1], [1, 0, 0, 0]),
        ({"min_p": 0.6}, [0.4, 0.3, 0.2, 0.1], [4 / 7, 3 / 7, 0, 0]),
        # top_p of what top_k left: 0.4 is 4/7 of that
        ({"top_k": 2, "top_p": 0.5}, [0.4, 0.3, 0.2, 0.1], [1, 0, 0, 0]),
        # min_p after the temperature: 0.3^2 is less than 0.6 x 0.4^2
        ({"min_p": 0.6, "temperature": 0.5}, [0.4, 0.3, 0.2, 0.1], [1, 0, 0, 0]),
    ],
)
def test_what_is_left_out(cut: dict[str, Any], probs: list[float], left: list[float]) -> None:
    assert shares(Sampling(1, **cut), probs) == pytest.approx(left, abs=1e-6)


def test_a_repetition_penalty_comes_first() -> None:
    logits = torch.tensor([[2.0, -1.0, 2.0, -1.0, 0.5]])
    seen = torch.tensor([[True, True, False, False, False]])
    found = shaped(logits, seen, Sampling(1, temperature=0.5, repetition_penalty=2.0))
    wanted = torch.log_softmax(torch.tensor([[1.0, -2.0, 2.0, -1.0, 0.5]]) / 0.5, -1)
    torch.testing.assert_close(found, wanted)
    greedy = shaped(logits, seen, Sampling(1, temperature=0.0, repetition_penalty=2.0))
    assert greedy.argmax() == 2  # 0 without it


def test_what_is_asked_of_an_engine() -> None:
    rollout = RolloutConfig(top_p=0.9, min_p=0.1, repetition_penalty=1.1, stop=["\n"])
    own = Sampling.of(rollout, 0.6, (7,))
    assert (own.top_p, own.min_p, own.top_k, own.kept) == (0.9, 0.1, 0, False)
    learned = own.to_learn_from(routes=True)
    assert (learned.top_k, learned.kept, learned.routes) == (MOST_KEPT, True, True)
    greedy = Sampling.of(rollout, 0.0, (7,))
    assert greedy == Sampling(512, 0.0, repetition_penalty=1.1, stop_ids=(7,), stop=("\n",))
    plain = Sampling.of(RolloutConfig(repetition_penalty=1.1), 1.0, ())
    assert plain.to_learn_from(routes=False) == plain


# What ends an answer


class Letters:
    """A tokenizer of letters."""

    def decode(self, ids: list[int], *, skip_special_tokens: bool = False) -> str:
        return "".join(map(chr, ids))


def test_a_stop_string_is_in_the_text() -> None:
    ids = list(b"so </a> and")
    assert text_of_answer(Letters(), ids, [], ["</a>", "and"]) == "so </a>"
    assert text_of_answer(Letters(), [*ids, 0], [0], ["</b>"]) == "so </a> and"
    assert stopped_at("ab", []) is None and stopped_at("aab", ["b", "ab"]) == 3


# What the trainer makes of it


def plain(logits: Tensor, kept: Tensor, penalty: Tensor, seen: Tensor, t: Tensor) -> Tensor:
    """[m, v] log-probs by the formula, row by row."""
    rows: list[Tensor] = []
    for i, row in enumerate(logits):
        own = torch.where(row > 0, row / penalty[i], row * penalty[i])
        row = torch.where(seen[i], own, row) / t[i]
        ids = kept[i][kept[i] > 0].long() - 1
        out = torch.full_like(row, -torch.inf) if len(ids) else row
        rows.append(torch.log_softmax(out.index_copy(0, ids, row[ids]), -1))
    return torch.stack(rows)


@pytest.mark.parametrize("chunk", [1, 4, 1024])
@pytest.mark.parametrize("what", ["kept", "penalty", "both"])
def test_log_probs_of_what_was_drawn_from(what: str, chunk: int) -> None:
    """And their gradients, of a pack with a shared prompt, against autograd on the formula."""
    g = torch.Generator().manual_seed(0)
    words = [(3, 1, 1), (2, 5, 9, 2), (4,), (8, 8, 0)]
    answers: list[GradedAnswer] = []
    for i, tokens in enumerate(words):
        sets = [[token, (token + 3) % V, 11][: 1 + (i + n) % 3] for n, token in enumerate(tokens)]
        kept = None if what == "penalty" or i == 3 else Kept.of(sets)
        one = Sample("p", i, tokens, (-1.0,) * len(tokens), "", "stop", 0, kept=kept)
        answers.append(GradedAnswer(Trajectory.of(one), 1.0))
    prompt = (6, 2, 7)
    values = {"temperature": torch.full((4,), 0.7)}
    if what != "kept":
        values["repetition_penalty"] = torch.full((4,), 1.6)
    (pack,) = pack_groups(
        [Group(Prompt("p", prompt, {}), tuple(answers))], values, seq_len=64, min_packs=1
    )
    places = pack.loss_mask.nonzero()[:, 0]
    drawn = drawn_of(pack, places)
    assert drawn is not None
    hidden = torch.randn(pack.num_tokens, H, generator=g)
    weight = torch.randn(V, H, generator=g)
    out = torch.randn(len(places), generator=g)
    mine = [x.clone().requires_grad_() for x in (hidden, weight)]
    logp, entropy, _ = token_logprobs(
        mine[0][places], mine[1], pack.labels[places], group=None, vocab_start=0, vocab_size=V,
        chunk=chunk, temperature=torch.full((len(places),), 0.7), drawn=drawn, with_entropy=True,
    )  # fmt: skip
    assert entropy is not None
    (logp * out + 0.7 * entropy * out.flip(0)).sum().backward()

    seen = torch.zeros(len(places), V, dtype=torch.bool)
    for row, (i, n) in enumerate((i, n) for i, own in enumerate(words) for n in range(len(own))):
        seen[row, [*prompt, *words[i][:n]]] = True
    kept = pack.per_token.get("kept", torch.zeros(pack.num_tokens, 1, dtype=torch.int32))[places]
    penalty = torch.full((len(places),), 1.0 if what == "kept" else 1.6)
    theirs = [x.clone().requires_grad_() for x in (hidden, weight)]
    full = plain(
        theirs[0][places] @ theirs[1].t(), kept, penalty, seen, torch.full((len(places),), 0.7)
    )
    wanted = full.gather(1, pack.labels[places, None])[:, 0]
    assert wanted.isfinite().all()
    could = full.masked_fill(full == -torch.inf, 0.0)
    surprise = -(full.exp() * could).sum(-1)
    (wanted * out + 0.7 * surprise * out.flip(0)).sum().backward()
    torch.testing.assert_close(logp, wanted, atol=2e-6, rtol=2e-6)
    torch.testing.assert_close(entropy, surprise, atol=2e-6, rtol=2e-6)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=5e-6, rtol=5e-6)


def test_a_rank_that_has_none_of_what_was_kept() -> None:
    """Of the vocabulary's rows 5 to 9 it has none of token 0's set, and token 2 is in its rows."""
    logits = torch.ones(3, 5)
    kept = torch.tensor([[1, 3], [0, 0], [8, 0]], dtype=torch.int32)
    Drawn(kept).leave_out(logits, 5)
    assert logits.isfinite().all()
    assert (logits == 1).tolist() == [[False] * 5, [True] * 5, [False, False, True, False, False]]


# On disk


def as_json(sample: Sample) -> dict[str, Any]:
    return to_json(Trajectory.of(sample), readable=True)


def test_what_was_kept_is_written_and_read() -> None:
    kept = Kept.of([[5, 70_000], [3], np.array([1, 2, 4], np.int32)])
    sample = Sample("p", 0, (5, 3, 2), (-0.1, 0.0, -0.2), "t", "stop", 0, kept=kept)
    again = Sample.from_json(json.loads(json.dumps(as_json(sample))))
    assert again.kept is not None
    assert [x.tolist() for x in again.kept] == [[2, 1, 3], [5, 70_000, 3, 1, 2, 4]]
    before = as_json(dataclasses.replace(sample, kept=None))
    assert "kept" not in before and Sample.from_json(before).kept is None
    with pytest.raises(ValueError, match="kept has 3 places"):
        Sample.from_json(as_json(sample) | {"tokens": [5, 3], "logprobs": [0.0, 0.0]})


def test_rollouts_say_how_they_were_drawn(tmp_path: Path) -> None:
    """And are learned from that way alone; those of before, from the whole distribution."""
    from moetrain.loops.replayed import check_drawn
    from moetrain.loops.store import Batch, Store, drawn_with

    def replayed(**settings: Any) -> None:
        check_drawn(Store(tmp_path), 1, drawn_with(RolloutConfig(**settings)))

    answer = GradedAnswer(Trajectory.of(Sample("p", 0, (5,), (-0.1,), "t", "stop", 0)), 1.0)
    advised: dict[str, Any] = {"temperature": 0.6, "top_p": 0.95, "top_k": 20}
    how = drawn_with(RolloutConfig(**advised))
    groups = (Group(Prompt("p", (1, 2), {}), (answer,)),)
    temperature = how.pop("temperature")
    Store(tmp_path).write(Batch(1, groups, 1, temperature=temperature, sampling=how))
    replayed(**advised)
    with pytest.raises(
        DataError, match=r"at top_p 0.95: set rollout\.top_p=0.95, or every log-prob"
    ):
        replayed(**advised | {"top_p": 1.0})
    (path,) = tmp_path.glob("*.jsonl")
    head, row = path.read_text().splitlines()
    before = {name: own for name, own in json.loads(head).items() if name != "sampling"}
    path.write_text(json.dumps(before) + "\n" + row + "\n")
    replayed(temperature=0.6)
    with pytest.raises(DataError, match=r"set rollout\.top_k=0,"):
        replayed(temperature=0.6, top_k=20)
