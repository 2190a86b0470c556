"""Batches of graded answers: collected once, kept on disk, replayed without an engine.

`<run_dir>/rollouts` holds one file per step, `00000012.jsonl` (a head, then one line per prompt
with its graded answers), and `00000012.partial.jsonl` while it is being made: each answer as it
ends, so that a killed run loses none.
"""

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any, TextIO

import torch
from torch import Tensor

from moetrain.config.rollout import RolloutConfig
from moetrain.data.groups import GradedAnswer, Group
from moetrain.data.samples import Prompt, Sample, read_as, write_lines
from moetrain.errors import DataError
from moetrain.rewards import Completion, Grader, Verdict
from moetrain.rollout.base import Request, RolloutEngine, Sampling

WHOLE = {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}  # all may be drawn
Drops = Callable[[Tensor, Tensor], Tensor]
"""(rewards [n], group [n]) -> [n] bool: answers of groups that teach nothing."""


@dataclass(frozen=True)
class Batch:
    """What one step learns from."""

    step: int
    groups: tuple[Group, ...]
    cursor: int  # prompts of the stream that are used up after it
    seconds: dict[str, float] = field(default_factory=dict[str, float])
    counts: dict[str, int] = field(default_factory=dict[str, int])  # dropped answers, faults, ...
    metrics: dict[str, float] = field(default_factory=dict[str, float])  # that rewards have logged
    fault: str = ""  # why the last answer that a reward failed on has none
    temperature: float | None = None  # its answers were sampled at; None: written by 0.1
    sampling: dict[str, float] = field(default_factory=dict[str, float])  # the rest; {}: before 0.2

    @property
    def drawn_with(self) -> dict[str, float | None]:
        """How its answers were sampled; until 0.2 from the whole distribution."""
        return {"temperature": self.temperature, **WHOLE, **self.sampling}

    @property
    def answers(self) -> list[GradedAnswer]:
        return [answer for group in self.groups for answer in group.answers]


def drawn_with(rollout: RolloutConfig) -> dict[str, float]:
    """What of a recipe says from which distribution answers are drawn and how they are scored."""
    return {name: getattr(rollout, name) for name in ("temperature", *WHOLE)}


class Store:
    """The folder of a run's rollouts."""

    def __init__(self, folder: Path):
        self.folder = folder

    def read(self, step: int) -> Batch | None:
        """The whole batch of a step, if it is there."""
        made = read_as(self._path(step), lambda row: _group(row) if "prompt" in row else row)
        head, *groups = list(made) or [None]
        if head is None:
            return None
        try:
            return Batch(step, tuple(groups), **head)  # type: ignore[arg-type]
        except TypeError as error:
            raise DataError(
                f"{self._path(step)} is not as it was written ({error}). Remove the file."
            ) from error

    def write(self, batch: Batch) -> None:
        """Keep a whole batch; its parts are no longer needed."""
        names = ("cursor", "seconds", "counts", "metrics", "fault", "temperature", "sampling")
        head = {name: getattr(batch, name) for name in names}
        write_lines(self._path(batch.step), [head, *map(_row, batch.groups)])
        self._partial(batch.step).unlink(missing_ok=True)

    def finished(self, step: int) -> dict[tuple[str, int], Sample]:
        """The answers of a batch that a kill interrupted, by prompt and index."""
        samples = read_as(self._partial(step), Sample.from_json)
        return {(sample.prompt_id, sample.index): sample for sample in samples}

    def open(self, step: int, samples: Iterable[Sample]) -> TextIO:
        """The file to append a batch's answers to, with those that are there already."""
        write_lines(self._partial(step), (sample.to_json() for sample in samples))
        return self._partial(step).open("a", encoding="utf-8")

    def _path(self, step: int) -> Path:
        return self.folder / f"{step:08d}.jsonl"

    def _partial(self, step: int) -> Path:
        return self.folder / f"{step:08d}.partial.jsonl"


def row_of(prompt: Prompt, samples: Sequence[Sample], graded: Sequence[Verdict]) -> dict[str, Any]:
    """A prompt with its answers, as a line of JSON."""
    answers = [
        sample.to_json()
        | {"reward": one.reward, "parts": dict(one.parts)}
        | ({"fault": one.fault} if one.fault else {})
        | ({"extra": dict(one.extra)} if one.extra else {})
        for sample, one in zip(samples, graded, strict=True)
    ]
    return {"prompt": asdict(prompt), "answers": answers}


def _row(group: Group) -> dict[str, Any]:
    graded = [Verdict(one.reward, one.parts, None, one.extra) for one in group.answers]
    return row_of(group.prompt, [one.sample for one in group.answers], graded)


def _group(row: dict[str, Any]) -> Group:
    prompt = Prompt(**row["prompt"] | {"tokens": tuple(row["prompt"]["tokens"])})
    answers = (
        GradedAnswer(Sample.from_json(a), a["reward"], a["parts"], a.get("extra", {}))
        for a in row["answers"]
    )
    return Group(prompt, tuple(answers))


def draw(
    engine: RolloutEngine,
    prompts: Sequence[Prompt],
    num: int,
    sampling: Sampling,
    seed: int,
    done: dict[tuple[str, int], Sample],
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
        done[key] = sample
        file.write(json.dumps(sample.to_json(), ensure_ascii=False) + "\n")
        file.flush()
        if key not in known:
            told()

    if requests:
        engine.generate(requests, keep)


def with_reward(samples: Sequence[Sample], found: Sequence[Verdict]) -> list[GradedAnswer]:
    """The answers that the rewards have graded."""
    graded = map(graded_by, samples, found)
    return [one for one in graded if one is not None]


def graded_by(sample: Sample, found: Verdict) -> GradedAnswer | None:
    """An answer with its reward; None where the rewards have none to give."""
    if found.reward is None:
        return None
    return GradedAnswer(sample, found.reward, found.parts, found.extra)


def verdicts(
    grader: Grader, pairs: Sequence[tuple[Prompt, Sample]], step: int = 0, last: int = 0
) -> list[Verdict]:
    """What the rewards say of each answer, from its text and its prompt's columns, at a step of a
    run that has `last` of them.
    """
    return grader.grade_completions(
        [
            Completion(
                number,
                sample.text,
                prompt.columns,
                opened=prompt.opened,
                is_text=prompt.is_text,
                tokens=sample.tokens,
                step=step,
                last=last,
            )
            for number, (prompt, sample) in enumerate(pairs)
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
