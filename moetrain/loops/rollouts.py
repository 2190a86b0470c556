"""What is drawn and graded for a step, and figures of it."""

import hashlib
import json
import math
import time
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any, TextIO

import torch
from torch import Tensor

from moetrain.data.groups import GradedAnswer, Group
from moetrain.data.samples import Prompt, Sample
from moetrain.data.trajectories import Trajectory, to_json
from moetrain.rewards import Completion, Grader, Verdict
from moetrain.rollout.base import Request, RolloutEngine, Sampling

Drops = Callable[[Tensor, Tensor], Tensor]
"""(rewards [n], group [n]) -> [n] bool: answers of groups that teach nothing."""


def draw(
    engine: RolloutEngine,
    prompts: Sequence[Prompt],
    num: int,
    sampling: Sampling,
    seed: int,
    done: dict[tuple[str, int], Trajectory],
    file: TextIO,
    told: Callable[[], None] = lambda: None,
    *,
    whole_batches: bool = False,
) -> None:
    """`num` answers to each prompt, but for those that are `done`. Each is in `done` and on disk,
    at the end of `file`, as it ends; then `told` hears of it.

    whole_batches: those of the engine's batches that are not done as a whole are drawn again, so
    that a run that was killed goes on with the same bits.
    """
    known = set(done)
    every = [
        Request(prompt, index, seed_of(seed, prompt.id, index), sampling)
        for prompt in prompts
        for index in range(num)
    ]
    batches = engine.batches(every) if whole_batches else ((one,) for one in every)
    requests = [
        request
        for batch in batches
        if any((one.prompt.id, one.index) not in known for one in batch)
        for request in batch
    ]

    def keep(sample: Sample) -> None:
        key = sample.prompt_id, sample.index
        done[key] = Trajectory.of(sample)
        file.write(json.dumps(to_json(done[key]), ensure_ascii=False) + "\n")
        file.flush()
        if key not in known:
            told()

    if requests:
        engine.generate(requests, keep)


def with_reward(made: Sequence[Trajectory], found: Sequence[Verdict]) -> list[GradedAnswer]:
    """The answers that the rewards have graded."""
    graded = map(graded_by, made, found)
    return [one for one in graded if one is not None]


def graded_by(one: Trajectory, found: Verdict) -> GradedAnswer | None:
    """An answer with its reward; None where the rewards have none to give."""
    if found.reward is None:
        return None
    return GradedAnswer(one, found.reward, found.parts, found.extra)


def verdicts(
    grader: Grader, pairs: Sequence[tuple[Prompt, Trajectory]], step: int = 0, last: int = 0
) -> list[Verdict]:
    """What the rewards say of each answer, from its text and its prompt's columns, at a step of a
    run that has `last` of them.
    """
    return grader.grade_completions(
        [
            Completion(
                number,
                one.text,
                prompt.columns,
                opened=prompt.opened,
                is_text=prompt.is_text,
                tokens=tuple(one.tokens),
                step=step,
                last=last,
            )
            for number, (prompt, one) in enumerate(pairs)
        ]
    )


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
