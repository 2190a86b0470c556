"""Steps that take the answers which end first: over random schedules nothing is lost that was to be
kept, nothing is learned from twice, and every token has the weights that drew it.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError
from test_online import answers

from moetrain.config.load import recipe_from
from moetrain.config.method import MethodConfig
from moetrain.config.rollout import RolloutConfig
from moetrain.data import assets
from moetrain.data.prompts import PromptOrder
from moetrain.data.samples import Prompt, Sample
from moetrain.data.trajectories import Trajectory
from moetrain.loops.collector import Collector
from moetrain.loops.quota import Quota, due_now
from moetrain.loops.rollouts import Drawing, seed_of
from moetrain.loops.store import Batch, Place, Store
from moetrain.methods import METHODS, Out
from moetrain.rewards import Verdict
from moetrain.rollout.base import Request, Sampling
from moetrain.rollout.embedded import Embedded
from moetrain.testing.going_on import CONFIG, check_going_on

MOST = 40  # tokens of an answer


class Killed(Exception):
    """The run, at some token."""


def token(version: int, prompt_id: str, index: int, place: int) -> int:
    """What weights draw there."""
    return seed_of(version, f"{prompt_id} {place}", index) % 1000


@dataclass
class Ticks:
    """An engine that draws a token of every answer at a tick; lengths are drawn with a long tail.

    together: the ends of all decide when some are stopped, as in a batch of one model; else each is
    drawn by itself and ends when it likes, as on servers.
    """

    rng: np.random.Generator
    together: bool
    version: int = 0
    kill_after: int | None = None  # tokens
    counts: Counter[str] = field(default_factory=Counter[str])
    drawn: Counter[tuple[str, int, int]] = field(default_factory=Counter[tuple[str, int, int]])
    seeds: set[int] = field(default_factory=set[int])

    def batches(
        self, requests: Sequence[Request], *, stops: bool = False
    ) -> Iterable[Sequence[Request]]:
        return [requests] if self.together and requests else ((one,) for one in requests)

    def generate(
        self,
        requests: Sequence[Request],
        on_sample: Callable[[Sample], None],
        follow_ups: None = None,
        enough: Callable[[], bool] | None = None,
    ) -> None:
        new = {number: 0 for number in range(len(requests))}
        while new and not (enough is not None and enough()):
            order = list(new) if self.together else self.rng.permutation(list(new)).tolist()
            for number in order:
                if self.kill_after == 0:
                    raise Killed
                if self.kill_after is not None:
                    self.kill_after -= 1
                request = requests[number]
                before = len(request.given) - len(request.prompt.tokens)
                self.drawn[request.prompt.id, request.index, before + new[number]] += 1
                new[number] += 1
                if before + new[number] == self.length(request):
                    on_sample(self.sample(request, new.pop(number), "stop"))
                    if not self.together and enough is not None and enough():
                        break
        for number, num in new.items():
            if num:
                on_sample(self.sample(requests[number], num, "open"))

    def length(self, request: Request) -> int:
        own = np.random.default_rng(seed_of(9, request.prompt.id, request.index))
        return min(MOST, 1 + int(own.pareto(1.0) * 3))

    def sample(self, request: Request, num: int, finish: Any) -> Sample:
        begun = request.begun.tokens if request.begun is not None else ()
        name, index = request.prompt.id, request.index
        places = range(len(begun), len(begun) + num)
        tokens = tuple(token(self.version, name, index, place) for place in places)
        logprobs = tuple(-(self.version + 1) * 0.5 for _ in places)
        new = Sample(name, index, tokens, logprobs, "text", finish, self.version)
        return new.behind(request.begun)


class Pays:
    """A grader that pays for length."""

    configs = ("length",)

    num_faults, counts, said = 0, Counter[str](), ""

    def grade_completions(self, completions: Sequence[Any]) -> list[Verdict]:
        return [Verdict(float(len(one.tokens)), {}) for one in completions]

    def take_metrics(self) -> dict[str, float]:
        return {}


@dataclass(frozen=True)
class Schedule:
    """A run."""

    seed: int
    together: bool
    num_prompts: int
    group_size: int
    oversample: float
    partial: bool
    most: int
    num_steps: int
    limit: int | None
    ahead: int = 0

    @property
    def surplus(self) -> int:
        more = {"oversample": self.oversample, "prompts_per_step": self.num_prompts}
        return RolloutConfig(**more, partial=False).surplus


@st.composite
def schedules(draw: st.DrawFn, *, partial: bool = True, together: bool | None = None) -> Schedule:
    oversample = draw(st.sampled_from([1.1, 1.5, 2.0, 2.7]))
    ahead = draw(st.integers(0, 1))
    least = ahead + math.ceil(oversample) - 1
    num_prompts = draw(st.integers(1, 4))
    epochs = partial and draw(st.booleans())
    limit = draw(st.integers(num_prompts, 20)) if epochs else None
    return Schedule(
        seed=draw(st.integers(0, 2**16)),
        together=draw(st.booleans()) if together is None else together,
        num_prompts=num_prompts,
        group_size=draw(st.integers(2, 3)),
        oversample=oversample,
        partial=partial,
        most=draw(st.integers(least, least + 3)),
        num_steps=draw(st.integers(1, 7)) if limit is None else math.ceil(limit / num_prompts),
        limit=limit,
        ahead=ahead,
    )


def played(
    schedule: Schedule, folder: Path, kills: Sequence[int] = ()
) -> tuple[list[Batch], Ticks]:
    """The batches of a run of these steps, and its engine; killed after so many tokens, again and
    again, and resumed from what is on disk.
    """
    engine = Ticks(np.random.default_rng(schedule.seed), schedule.together)
    left = iter(kills)
    engine.kill_after = next(left, None)
    step, place, batches = 1, Place(0), list[Batch]()
    while step <= schedule.num_steps:
        collector = Collector(
            drawing=Drawing(engine, Sampling(MOST), 3),  # type: ignore[arg-type]
            grader=Pays(),  # type: ignore[arg-type]
            prompts=PromptOrder([Prompt(str(i), (1, 2), {}) for i in range(7)], 0),
            store=Store(folder),
            drawn={"temperature": 1.0},
            num_prompts=schedule.num_prompts,
            group_size=schedule.group_size,
            num_steps=schedule.num_steps,
            limit=schedule.limit,
            surplus=schedule.surplus,
            partial=schedule.partial,
            most=schedule.most,
        )
        try:
            while step <= schedule.num_steps:
                engine.version = max(0, step - 1 - schedule.ahead)
                batch = collector.batch(step, place)
                step, place = step + 1, batch.place
                batches.append(batch)
        except Killed:
            engine.kill_after = next(left, None)
    return batches, engine


def learned(batches: Sequence[Batch]) -> list[tuple[int, Trajectory]]:
    """(step, trajectory) of all."""
    return [(batch.step, answer.trajectory) for batch in batches for answer in batch.answers]


def assert_true(schedule: Schedule, batches: Sequence[Batch]) -> None:
    """What holds of every run."""
    found = learned(batches)
    keys = [(one.prompt_id, one.index) for _, one in found]
    assert len(keys) == len(set(keys)), "an answer is learned from twice"
    for batch in batches:
        left = (schedule.limit or math.inf) - schedule.num_prompts * (batch.step - 1)
        assert len(batch.groups) == min(schedule.num_prompts, left)
        assert all(len(group.answers) == schedule.group_size for group in batch.groups)
        assert len(batch.held) <= schedule.surplus
    for step, one in found:
        (branch,) = one.branches
        versions = branch.by_token.tolist()
        assert versions == sorted(versions) and one.version == versions[0]
        assert one.finish == "stop" and not one.is_within
        assert max(0, step - 1) - versions[0] <= schedule.most
        wanted = [token(v, one.prompt_id, one.index, i) for i, v in enumerate(versions)]
        assert one.tokens == wanted
        assert one.logprobs == [-(v + 1) * 0.5 for v in versions]
    if schedule.partial:  # nothing is lost: what was begun is learned from, or goes on
        order = PromptOrder([Prompt(str(i), (1, 2), {}) for i in range(7)], 0)
        begun = {prompt.id for prompt in order.take(0, batches[-1].cursor)}
        waiting = {order.at(place).id for place in batches[-1].held}
        assert begun == waiting | {one.prompt_id for _, one in found}
        assert not waiting, "the last step waits for what nothing comes after"


@settings(deadline=None, max_examples=25)
@given(schedules())
def test_what_goes_on_is_learned_once_and_in_time(
    tmp_path_factory: pytest.TempPathFactory, schedule: Schedule
) -> None:
    folder = tmp_path_factory.mktemp("rollouts")
    batches, engine = played(schedule, folder)
    assert_true(schedule, batches)
    assert set(engine.drawn.values()) == {1}, "a token is drawn once"
    names = {path.name for path in folder.iterdir()}
    kinds = ("jsonl", "safetensors")
    assert names == {f"{b.step:08d}.{kind}" for b in batches for kind in kinds}


@settings(deadline=None, max_examples=25)
@given(schedules(together=False), st.lists(st.integers(0, 60), max_size=4))
def test_killed_beside_servers_nothing_finished_is_drawn_again(
    tmp_path_factory: pytest.TempPathFactory, schedule: Schedule, kills: list[int]
) -> None:
    """Nor anything that was kept of a step before."""
    batches, engine = played(schedule, tmp_path_factory.mktemp("rollouts"), kills)
    assert_true(schedule, batches)
    most = Counter(number for number in engine.drawn.values())
    assert max(most) <= 1 + len(kills)


@settings(deadline=None, max_examples=25)
@given(schedules(together=True), st.lists(st.integers(0, 60), min_size=1, max_size=4))
def test_killed_where_answers_are_drawn_together_all_is_as_it_would_have_been(
    tmp_path_factory: pytest.TempPathFactory, schedule: Schedule, kills: list[int]
) -> None:
    whole, _ = played(schedule, tmp_path_factory.mktemp("whole"))
    again, _ = played(schedule, tmp_path_factory.mktemp("again"), kills)
    for one, other in zip(whole, again, strict=True):
        assert (one.cursor, one.held) == (other.cursor, other.held)
        assert [g.prompt.id for g in one.groups] == [g.prompt.id for g in other.groups]
        for a, b in zip(one.answers, other.answers, strict=True):
            assert a.trajectory.tokens == b.trajectory.tokens
            assert a.trajectory.branches[0].by_token.tolist() == (
                b.trajectory.branches[0].by_token.tolist()
            )


@settings(deadline=None, max_examples=15)
@given(schedules(partial=False))
def test_what_is_late_is_lost_and_counted(
    tmp_path_factory: pytest.TempPathFactory, schedule: Schedule
) -> None:
    batches, engine = played(schedule, tmp_path_factory.mktemp("rollouts"))
    assert_true(schedule, batches)
    lost = schedule.surplus * schedule.group_size
    assert [batch.counts["dropped/late"] for batch in batches] == [lost] * len(batches)
    tokens = sum(len(one.tokens) for _, one in learned(batches))
    late = sum(batch.counts["dropped/late_tokens"] for batch in batches)
    assert tokens + late == engine.drawn.total()
    assert not any(batch.held for batch in batches)
    assert all(len(set(one.branches[0].by_token)) == 1 for _, one in learned(batches))


def test_the_first_are_taken_and_what_is_due_before_them() -> None:
    done = dict[tuple[str, int], Trajectory]()
    prompts = [Prompt(name, (1,), {}) for name in "abcd"]
    quota = Quota(prompts, 1, 2, done, {"d"})

    def ends(name: str, finish: Any = "stop") -> None:
        done[name, 0] = Trajectory.of(Sample(name, 0, (1,), (-1.0,), "", finish, 0))

    for name, reached in [("b", False), ("c", False), ("a", False), ("d", True)]:
        ends(name, "open")
        assert not quota.reached()
        ends(name)
        assert quota.reached() == reached
    assert [prompt.id for prompt in quota.taken()] == ["b", "d"]


@pytest.mark.parametrize("together", [True, False])
def test_what_is_held_stays_where_nothing_has_to_be_drawn(together: bool) -> None:
    ends: list[tuple[str, Any]] = [("a", "stop"), ("b", "open")]
    held = {
        (name, 0): Trajectory.of(Sample(name, 0, (1,), (-1.0,), "", finish, 0))
        for name, finish in ends
    }
    prompts, done = [Prompt(name, (1,), {}) for name in "ab"], dict(held)
    engine: Any = Ticks(np.random.default_rng(0), together)
    quota = Quota(prompts, 1, 1, done)
    Drawing(engine, Sampling(MOST), 3).draw(
        prompts, 1, done, lambda one: None, whole_batches=True, held=held, quota=quota
    )
    assert done == held and not engine.drawn
    assert [prompt.id for prompt in quota.taken()] == ["a"]


def test_what_a_killed_draw_left_does_not_end_the_one_that_draws_it_again() -> None:
    """Else it would end sooner than it would have without the kill."""
    prompts = [Prompt(name, (1,), {}) for name in "ab"]
    engine: Any = Ticks(np.random.default_rng(0), together=True)
    done = {("a", 0): Trajectory.of(Sample("a", 0, (1,), (-1.0,), "", "stop", 0))}
    quota = Quota(prompts, 1, 1, done)
    Drawing(engine, Sampling(MOST), 3).draw(
        prompts, 1, done, lambda one: None, whole_batches=True, quota=quota
    )
    assert ("a", 0, 0) in engine.drawn and ("b", 0, 0) in engine.drawn


def test_what_is_due_leaves_no_step_more_than_it_can_take() -> None:
    """Versions 0, the last step that may learn from them is 4; a step takes two."""
    old = {name: 0 for name in "abcd"}
    assert [len(due_now(old, step, 2, 3)) for step in (1, 2, 3, 4)] == [0, 0, 2, 4]
    assert due_now({"a": 0, "b": 2}, 4, 2, 3) == {"a"}
    assert due_now({}, 4, 2, 3) == set()


# A model


@pytest.fixture(scope="module")
def tokenizer() -> Path:
    return assets.resolve("builtin:stdlib-tokenizer", assets.cache_root(None))


def test_a_model_goes_on_from_its_tokens_with_other_weights(
    tokenizer: Path, tmp_path: Path
) -> None:
    check_going_on(Embedded(CONFIG, tokenizer), tmp_path, num_stops=60, most=40)


def test_answers_whose_lengths_decide_for_all_are_drawn_together(tokenizer: Path) -> None:
    """So that a killed step is drawn again from its start; else those of a batch."""
    engine, sampling = Embedded(CONFIG, tokenizer), Sampling(4)
    asked = [Request(Prompt(str(i), (1,), {}), 0, i, sampling) for i in range(70)]
    assert [len(own) for own in engine.batches(asked)] == [64, 6]
    assert [len(own) for own in engine.batches(asked, stops=True)] == [70]


# Settings


def laid(more: dict[str, Any], method: Any = "grpo", **train: Any) -> dict[str, Any]:
    return {
        "run_dir": "r",
        "model": {"path": "builtin:qwen3-moe-tiny"},
        "method": method,
        "data": {"train": "p.jsonl", "seq_len": 600},
        "rollout": more,
        "rewards": ["accuracy"],
        "train": train or {"steps": 3},
    }


@pytest.mark.parametrize(
    ("more", "rest", "message"),
    [
        ({"partial": True}, {}, "with rollout.oversample=1 no answer is stopped"),
        ({"oversample": 1.5, "max_staleness": 2}, {}, "without rollout.partial no token is older"),
        ({"oversample": 3.0, "partial": True, "max_staleness": 1}, {}, "answers get 2 steps old"),
        ({"oversample": 1.5, "partial": True, "stop": ["x"]}, {}, "Leave one of the two out"),
        (
            {"oversample": 1.5, "partial": True},
            {"method": {"name": "grpo", "mismatch": "none"}},
            "grpo as it is set here has no weights for what older weights drew",
        ),
        ({"oversample": 1.5}, {"epochs": 1}, "nobody knows how many steps there are"),
        ({"oversample": 0.5}, {}, "greater than or equal to 1"),
        ({"oversample": 1.5, "replay": "r"}, {}, "leave rollout.oversample out"),
        ({"oversample": 1.5, "environment": "agents"}, {}, "cannot be stopped to go on later"),
    ],
)
def test_what_would_not_do_what_it_says_is_refused(
    more: dict[str, Any], rest: dict[str, Any], message: str
) -> None:
    with pytest.raises((ValidationError, Exception), match=message) as refused:
        recipe_from(laid(more, **rest))
    assert len(str(refused.value).splitlines()) == 1
    assert recipe_from(laid({"oversample": 1.5, "partial": True}, epochs=1)).rollout is not None


ONLINE = [name for name, method in METHODS.items() if method.online is not None]


MISMATCHES = ("none", "tis", "mask", "sequence", "sequence_mask")
# gkd has no ratio: its divergence is the same whoever drew an answer.
CASES = [*product(ONLINE, MISMATCHES)]
CASES = [case for case in CASES if case[0] != "gkd" or case[1] == "none"]


@pytest.mark.parametrize(("name", "mismatch"), CASES)
def test_older_tokens_are_learned_from_where_their_log_probs_count(
    name: str, mismatch: str
) -> None:
    """A method goes on with answers of older weights where its loss asks which log-prob a token was
    drawn with, and nowhere else.
    """
    cfg: Any = TypeAdapter(MethodConfig).validate_python({"name": name, "mismatch": mismatch})
    cfg = cfg.within(12)
    method, found = METHODS[name], list[float]()
    assert method.online is not None
    for nearer in (0.0, 0.1):
        (answer,) = answers()[:1]
        answer.rollout = [logp - nearer for logp in answer.old]
        pack = answer.packed(1)
        pack.extras["share"] = torch.ones(1)
        known = {"teacher_logp": pack.per_token["ref_logp"]}
        pack.per_token.update(known | {"teacher_top": pack.per_token["ref_logp"][:, None]})
        pack.per_token.update(method.online.targets(pack, cfg))
        known = pack.per_token
        own = known["logp"]
        out = Out(own, known["value"] + 2, known["value"], at_teacher=own[:, None])
        found.append(float(method.loss(out, pack, cfg, {})[0]["loss"]))
    assert (found[0] != found[1]) == (cfg.corrects and name != "gkd")
