"""Grades completions by the recipe's rewards, each kind in processes of its own."""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain, groupby
from multiprocessing.connection import wait
from statistics import fmean
from typing import Any

from moetrain.config.rewards import RewardConfig
from moetrain.rewards.base import Completion, Grade, RewardKind, Shape, Verdict
from moetrain.rewards.find import REWARDS
from moetrain.rewards.functions import FUNCTIONS
from moetrain.rewards.pool import Pool, Work
from moetrain.rewards.services import SERVICES
from moetrain.rewards.user_functions import user_function_kind


def check_user_functions(configs: Sequence[RewardConfig]) -> None:
    """Load functions of own files once, before a model is. Raises ConfigError."""
    own_functions = [config for config in configs if ":" in config.name]
    if own_functions:
        Grader(own_functions, 1, 60.0).close()


class Grader:
    """Grades completions by the weighted sum of rewards.

    Args:
        configs: the recipe's rewards; without any, no verdict has a reward. Raises ConfigError when
            one cannot be had.
        num_workers: processes for rewards that are functions.
        deadline_s: seconds that one completion may take them.
    """

    def __init__(self, configs: Sequence[RewardConfig], num_workers: int, deadline_s: float):
        self.configs = list(configs)
        self.counts: Counter[str] = Counter()  # of faults and notes
        self.said = ""  # the detail of the last fault
        self.metrics: dict[str, list[float]] = {}  # what functions have logged, to be taken
        shape_of_recipe = Shape(num_workers, 1, deadline_s)
        functions = [config for config in configs if config.name in REWARDS]
        self._pools = [_pool(FUNCTIONS, functions, shape_of_recipe)] if functions else []
        try:
            for config in configs:
                if config.name not in REWARDS:
                    kind = SERVICES.get(config.name) or user_function_kind(config.batch_size)
                    shape = kind.shape(config.options, shape_of_recipe)
                    self._pools.append(_pool(kind, [config], shape))
            for pool in self._pools:
                pool.wait_ready()
        except BaseException:
            self.close()
            raise

    def grade(
        self, completions: Sequence[str], columns: Mapping[str, Sequence[Any]]
    ) -> list[Verdict]:
        """One verdict for each completion, in order; `columns` have a value for each."""
        return self.grade_completions(
            [
                Completion(i, text, {name: values[i] for name, values in columns.items()})
                for i, text in enumerate(completions)
            ]
        )

    def grade_completions(self, completions: Sequence[Completion]) -> list[Verdict]:
        """One verdict for each, in order; they are numbered from 0."""
        completions = _with_lengths(completions)
        for pool in self._pools:
            pool.ask(completions)
        grades: list[list[Grade]] = [[] for _ in completions]
        missing = len(completions) * len(self._pools)
        while missing:
            for pool in self._pools:
                pool.send()
            patience = min(pool.deadline for pool in self._pools) - time.monotonic()
            wait([pipe for pool in self._pools for pipe in pool.pipes], max(0.0, patience))
            for number, answer in chain.from_iterable(pool.answers() for pool in self._pools):
                grades[number].append(answer)
                self._count(answer)
                missing -= 1
        return [self._verdict(answers) for answers in grades]

    @property
    def num_faults(self) -> int:
        """Answers so far that a reward failed on."""
        return sum(self.counts[name] for name in ("timeout", "crash", "error"))

    def take_metrics(self) -> dict[str, float]:
        """What functions have logged since the last call, as means over their batches."""
        means = {name: fmean(values) for name, values in self.metrics.items()}
        self.metrics = {}
        return means

    def _count(self, answer: Grade) -> None:
        self.counts.update(answer.notes)
        for name, value in answer.metrics.items():
            self.metrics.setdefault(name, []).append(value)
        if answer.fault is not None:
            self.counts[answer.fault] += 1
            self.said = " ".join((answer.detail or answer.fault).split())[:300]

    def _verdict(self, answers: Sequence[Grade]) -> Verdict:
        values = {name: value for answer in answers for name, value in answer.values.items()}
        parts = {config.label: values.get(config.label) for config in self.configs}
        extra = {name: value for answer in answers for name, value in answer.extra.items()}
        fault = next((answer.fault for answer in answers if answer.fault is not None), None)
        if fault is not None:
            return Verdict(None, parts, fault, extra)
        terms = [c.weight * value for c in self.configs if (value := parts[c.label]) is not None]
        return Verdict(sum(terms) if terms else None, parts, None, extra)

    def close(self) -> None:
        """End all workers, and what they have started."""
        for pool in self._pools:
            pool.close()
        self._pools = []


def _pool(
    kind: RewardKind, configs: Sequence[RewardConfig], shape: Shape
) -> Pool[Completion, Grade]:
    labels = [config.label for config in configs]
    work = Work(
        f"rewards: {', '.join(labels)}",
        partial(_grading, kind, tuple(configs)),
        partial(_failed, tuple(labels)),
        _prompt_of if shape.is_grouped else None,
    )
    return Pool(work, shape)


def _grading(
    kind: RewardKind, configs: Sequence[RewardConfig]
) -> Callable[[Sequence[Completion]], Iterator[tuple[int, Grade]]]:
    return kind.make(configs).grade


def _failed(labels: Sequence[str], fault: str) -> Grade:
    return Grade(dict.fromkeys(labels), fault)


def _prompt_of(completion: Completion) -> Any:
    return completion.columns.get("prompt")


def _with_lengths(completions: Sequence[Completion]) -> list[Completion]:
    """With the least and the greatest length of the answers to each prompt: rewards that compare
    these see one completion at a time, so that one that hangs changes no other's reward.
    """
    with_lengths: list[Completion] = []
    for _, alike in groupby(completions, lambda one: one.columns.get("prompt")):
        group = list(alike)
        lengths = [len(one.text) for one in group]
        with_lengths += [replace(one, group_lengths=(min(lengths), max(lengths))) for one in group]
    return with_lengths
