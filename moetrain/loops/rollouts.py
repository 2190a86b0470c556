"""What is drawn and graded for a step, and figures of it."""

import hashlib
import json
import math
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any, TextIO

import torch
from torch import Tensor

from moetrain.data.begun import begun_in
from moetrain.data.groups import GradedAnswer, Group
from moetrain.data.samples import Prompt
from moetrain.data.trajectories import Trajectory, to_json
from moetrain.loops.agent_sessions import REWARD
from moetrain.loops.agents import Agents
from moetrain.loops.dialogues import Dialogues, Turns, opened_for_last_turn
from moetrain.loops.quota import Key, Quota
from moetrain.rewards import Completion, Grader, Verdict
from moetrain.rollout.base import Request, RolloutEngine, Sampling

Drops = Callable[[Tensor, Tensor], Tensor]
"""(rewards [n], group [n]) -> [n] bool: answers of groups that teach nothing."""


@dataclass(frozen=True)
class Drawing:
    """How answers are drawn."""

    engine: RolloutEngine
    sampling: Sampling
    seed: int
    dialogues: Dialogues | Agents | None = None  # None: an answer is one turn

    def draw(
        self,
        prompts: Sequence[Prompt],
        num: int,
        done: dict[tuple[str, int], Trajectory],
        keep: Callable[[Trajectory], None],
        *,
        whole_batches: bool = False,
        held: Mapping[Key, Trajectory] | None = None,
        quota: Quota | None = None,
    ) -> None:
        """`num` trajectories for each prompt, but for those that are `done`; one that is open there
        goes on. `keep` takes each as it ends, and after every turn while it is open; then it is in
        `done`. A `quota` ends the draw before all have ended.

        whole_batches: those of the engine's batches that are not done as a whole are drawn again,
        from what was `held` of them before the draw, so that a run that was killed goes on with the
        same bits.
        """

        def kept(one: Trajectory) -> None:
            done[one.prompt_id, one.index] = one
            keep(one)

        if isinstance(self.dialogues, Agents):  # whose sessions begin anew
            wanted = [(p, i) for p in prompts for i in range(num) if (p.id, i) not in done]
            self.dialogues.draw(self.engine, self.sampling, wanted, self._seed_of_turn, kept)
            return
        every = [
            Request(prompt, index, seed_of(self.seed, prompt.id, index), self.sampling)
            for prompt in prompts
            for index in range(num)
        ]
        batches: Iterable[Sequence[Request]] = ((one,) for one in every)
        if whole_batches:
            batches = self.engine.batches(every, stops=quota is not None)
        left = [one for batch in batches for one in _left(batch, done, held or {})]
        enough = None if quota is None else quota.reached
        if self.dialogues is None:
            requests = [self._going_on(*one) for one in left]
            if requests:
                self.engine.generate(requests, lambda s: kept(Trajectory.of(s)), None, enough)
        elif left:
            by_id = {prompt.id: prompt for prompt in prompts}
            with Turns(self.dialogues, by_id, self.sampling, self._seed_of_turn, kept) as turns:
                requests = []
                for request, one in left:
                    if one is None:
                        requests.append(request)
                    elif one.is_within:
                        requests.append(turns.go_on(one))
                    else:
                        turns.resume(one)
                self.engine.generate(requests, turns.drawn, turns.follow_ups, enough)

    def _going_on(self, request: Request, one: Trajectory | None) -> Request:
        """The request for the rest of an answer of one turn."""
        begun = None if one is None else begun_in(one)
        if begun is None:
            return request
        num = len(begun.turn.tokens)
        seed = self._seed_of_turn(request.prompt.id, request.index, 0, num)
        return replace(request, seed=seed, begun=begun.turn)

    def _seed_of_turn(self, prompt_id: str, index: int, turn: int, num: int = 0) -> int:
        """Of what follows `num` tokens of a turn, which are drawn from numbers of their own."""
        behind = f"+{num}" if num else ""
        return seed_of(self.seed, f"{prompt_id}/{turn}{behind}", index)


def _left(
    batch: Sequence[Request], done: dict[Key, Trajectory], held: Mapping[Key, Trajectory]
) -> list[tuple[Request, Trajectory | None]]:
    """What is to be drawn of requests that are drawn together, and how far each is; `done` has
    nothing of what is drawn again.
    """
    keys = [(one.prompt.id, one.index) for one in batch]
    if len(batch) == 1:
        trajectory = done.get(keys[0])
        return [(batch[0], trajectory)] if trajectory is None or trajectory.is_open else []
    open_keys = [key for key in keys if key not in held or held[key].is_open]
    if all(key in done and not done[key].is_open for key in open_keys):
        return []
    for key in open_keys:
        done.pop(key, None)
    done.update((key, held[key]) for key in open_keys if key in held)
    chosen = set(open_keys)
    pairs = zip(batch, keys, strict=True)
    return [(one, held.get(key)) for one, key in pairs if key in chosen]


def journal(
    file: TextIO, known: Collection[tuple[str, int]], on_new: Callable[[], None] = lambda: None
) -> Callable[[Trajectory], None]:
    """Writes each trajectory that a draw keeps at the end of `file`; of those that have ended and
    were not `known`, `told` hears.
    """

    def keep(one: Trajectory) -> None:
        file.write(json.dumps(to_json(one), ensure_ascii=False) + "\n")
        file.flush()
        if not one.is_open and (one.prompt_id, one.index) not in known:
            on_new()

    return keep


def with_reward(made: Sequence[Trajectory], verdicts: Sequence[Verdict]) -> list[GradedAnswer]:
    """The answers that the rewards have graded."""
    graded = map(graded_by, made, verdicts)
    return [one for one in graded if one is not None]


def graded_by(one: Trajectory, verdict: Verdict) -> GradedAnswer | None:
    """An answer with its reward; None where the rewards have none to give."""
    if verdict.reward is None:
        return None
    return GradedAnswer(one, verdict.reward, verdict.parts, verdict.extra)


def verdicts(
    grader: Grader, pairs: Sequence[tuple[Prompt, Trajectory]], step: int = 0, last: int = 0
) -> list[Verdict]:
    """What the rewards say of each trajectory, from its text and its prompt's columns, at a step of
    a run that has `last` of them. One that a fault of its environment ended has no reward.
    """
    whole = [(prompt, one) for prompt, one in pairs if not one.is_lost]
    completions = [
        Completion(
            number,
            one.text,
            prompt.columns | _posted(one),
            opened=opened_for_last_turn(prompt, one),
            is_text=prompt.is_text,
            tokens=tuple(one.tokens),
            messages=one.messages if len(one.messages) > 1 else (),
            step=step,
            last=last,
        )
        for number, (prompt, one) in enumerate(whole)
    ]
    ready = iter(grader.grade_completions(completions))
    return [Verdict(None, {}, one.finish) if one.is_lost else next(ready) for _, one in pairs]


def _posted(one: Trajectory) -> dict[str, float]:
    """The column that the reward `agent` reads."""
    counts = one.counts or {}
    return {"agent_reward": counts[REWARD]} if REWARD in counts else {}


def means(answers: Sequence[GradedAnswer], prefix: str) -> dict[str, Any]:
    """Mean rewards, and of each part the mean over the answers that it applies to, with their
    numbers. What no answer has is left out: a reward that failed is not a score.
    """
    figures: dict[str, Any] = {f"{prefix}/graded": float(len(answers))}
    if answers:
        mean = figures[f"{prefix}/mean"] = fmean(one.reward for one in answers)
        off = [one.reward - mean for one in answers]
        figures[f"{prefix}/std"] = math.sqrt(fmean(x * x for x in off))
    for name in sorted({name for one in answers for name in one.parts}):
        values = [v for one in answers if (v := one.parts.get(name)) is not None]
        if values:
            figures[f"{prefix}/{name}"] = fmean(values)
        if len(values) < len(answers):
            figures[f"{prefix}/{name}/graded"] = float(len(values))
    return figures


def turn_figures(made: Sequence[Trajectory]) -> dict[str, float]:
    """Turns of the model, tools that it called and tokens of replies; nothing where every answer
    was one turn of no environment.
    """
    if all(one.is_plain for one in made):
        return {}
    counts = Counter[str]()
    for one in made:
        counted = {name: int(n) for name, n in (one.counts or {}).items() if name != REWARD}
        counts.update(counted)
    agents = {name: float(n) for name, n in counts.items() if name.startswith("agents/")}
    return agents | {
        "turns/mean": fmean(len(one.written) for one in made),
        "turns/most": float(max(len(one.written) for one in made)),
        "turns/limit": fmean(one.finish == "turns" for one in made),
        "tools/calls": float(counts["tools/calls"]),
        "tools/errors": float(counts["tools/errors"]),
        "tokens/replies": float(sum(one.num_replies for one in made)),
    }


def tensors(groups: Sequence[Group]) -> tuple[Tensor, Tensor]:
    """(rewards [n] fp32, the group of each [n] int64) of all answers in order."""
    rewards = [answer.reward for group in groups for answer in group.answers]
    numbers = [i for i, group in enumerate(groups) for _ in group.answers]
    return torch.tensor(rewards), torch.tensor(numbers)


def seed_of(seed: int, prompt_id: str, index: int) -> int:
    """A seed for one answer, the same on every engine and at every time."""
    digest = hashlib.sha256(f"{seed} {prompt_id} {index}".encode()).digest()
    return int.from_bytes(digest[:4], "little")


class timed:
    """Adds what passes inside to `seconds[name]`."""

    def __init__(self, seconds: dict[str, float], name: str):
        self.seconds, self.name = seconds, name

    def __enter__(self) -> None:
        self._started = time.perf_counter()

    def __exit__(self, *exc: object) -> None:
        passed = time.perf_counter() - self._started
        self.seconds[self.name] = self.seconds.get(self.name, 0.0) + passed
