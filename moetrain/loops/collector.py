"""The batches of a run with a rollout engine, made of its stream of prompts one after the other."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from moetrain import files
from moetrain.data.groups import Group
from moetrain.data.prompts import PromptOrder
from moetrain.data.samples import Prompt
from moetrain.data.trajectories import Trajectory
from moetrain.errors import DataError
from moetrain.loops.rollouts import (
    Drawing,
    Drops,
    graded_by,
    journal,
    tensors,
    timed,
    verdicts,
)
from moetrain.loops.store import Batch, Store
from moetrain.rewards import Grader

EMPTY = 3  # batches in a row that nothing can be learned from, before a run ends


@dataclass
class Collector:
    """Makes batches, on the one process that drives the rollout engine."""

    drawing: Drawing
    grader: Grader
    prompts: PromptOrder
    store: Store
    drawn: Mapping[str, float]  # what the recipe says of it
    num_prompts: int
    group_size: int
    drops: Drops | None = None
    leaves_cut: bool = False  # whether answers that were cut are not learned from
    rounds: int = 1  # of sampling for one step, at most, where groups without signal are dropped
    num_steps: int = 0  # of the run, for rewards that ask
    limit: int | None = None  # prompts of the stream that there are, where epochs are counted
    # Faults that a batch has counted; those of the push before it are among them.
    _reported: Counter[str] = field(default_factory=Counter[str])

    def batch(self, step: int, cursor: int) -> Batch:
        """The batch of `step`, from prompt number `cursor` on; what of it is on disk is taken from
        there. A batch from which nothing can be learned is left for the prompts after it: DataError
        after EMPTY of them. Without groups where train.epochs has no prompt left.
        """
        saved = self.store.read(step)
        if saved is not None:
            return saved
        done = self.store.finished(step)
        failed = self.grader.num_faults
        seconds = {"sample": 0.0, "score": 0.0}
        counts: Counter[str] = Counter()
        groups: list[Group] = []
        while not groups and not self._is_over(cursor):
            groups, cursor = self._collect(step, cursor, done, seconds, counts)
            counts["dropped/batches"] += not groups
            if counts["dropped/batches"] == EMPTY:
                break
        if not groups and (step == 1 or not self._is_over(cursor)):
            raise DataError(self._nothing(step, counts["dropped/batches"]))
        faults = self.drawing.engine.counts + self.grader.counts
        counts += faults - self._reported
        self._reported = faults
        metrics = self.grader.take_metrics()
        fault = self.grader.said if self.grader.num_faults > failed else ""
        batch = Batch(
            step,
            tuple(groups),
            cursor,
            seconds,
            dict(counts),
            metrics,
            fault,
            self.drawn["temperature"],
            {name: value for name, value in self.drawn.items() if name != "temperature"},
        )
        if groups:
            self.store.write(batch)
        return batch

    def _is_over(self, cursor: int) -> bool:
        return self.limit is not None and cursor >= self.limit

    def _collect(
        self,
        step: int,
        cursor: int,
        done: dict[tuple[str, int], Trajectory],
        seconds: dict[str, float],
        counts: Counter[str],
    ) -> tuple[list[Group], int]:
        """(groups to learn from, those without signal last; the place behind their prompts)."""
        groups: list[Group] = []
        spare: list[Group] = []  # without signal; better than an empty step
        for _ in range(self.rounds):
            wanted = self.num_prompts - len(groups)
            if self.limit is not None:
                wanted = min(wanted, self.limit - cursor)
            prompts = self.prompts.take(cursor, wanted)
            cursor += len(prompts)
            with timed(seconds, "sample"):
                self._sample(step, prompts, done)
            with timed(seconds, "score"):
                graded = self._grade(step, prompts, done, counts)
            useful, useless = self._parted(graded)
            groups += useful
            spare += useless
            counts["dropped/no_signal"] += len(useless)
            if len(groups) >= self.num_prompts:
                break
        groups += spare[: self.num_prompts - len(groups)]
        if self.leaves_cut and all(
            answer.trajectory.is_cut for group in groups for answer in group.answers
        ):
            return [], cursor
        return groups, cursor

    def _nothing(self, step: int, num: int) -> str:
        """Why a run ends for want of anything to learn from."""
        which = f" in {num} batches one after the other" if num > 1 else ""
        return (
            f"Step {step}: no prompt kept two graded answers{which}. The rewards gave None for the"
            " rest; look at their columns, or raise rollout.group_size."
            + " Answers that rollout.max_tokens cut are left out (method.truncated is mask)."
            * self.leaves_cut
            + f" The last fault: {self.grader.said}" * bool(self.grader.said)
        )

    def _sample(
        self, step: int, prompts: Sequence[Prompt], done: dict[tuple[str, int], Trajectory]
    ) -> None:
        with files.named(self.store.folder), self.store.open(step, done.values()) as file:
            keep = journal(file, ())
            self.drawing.draw(prompts, self.group_size, done, keep, whole_batches=True)

    def _grade(
        self,
        step: int,
        prompts: Sequence[Prompt],
        done: dict[tuple[str, int], Trajectory],
        counts: Counter[str],
    ) -> list[Group]:
        """The groups with at least two graded answers."""
        pairs = [(p, done[p.id, i]) for p in prompts for i in range(self.group_size)]
        counts.update(f"environment/{one.finish}" for _, one in pairs if one.is_lost)
        results = verdicts(self.grader, pairs, step, self.num_steps)
        graded = [graded_by(made, one) for (_, made), one in zip(pairs, results, strict=True)]
        groups: list[Group] = []
        for number, prompt in enumerate(prompts):
            group = graded[number * self.group_size : (number + 1) * self.group_size]
            answers = tuple(answer for answer in group if answer is not None)
            counts["dropped/ungraded"] += len(group) - len(answers)
            if len(answers) > min(1, self.group_size - 1):
                groups.append(Group(prompt, answers))
        return groups

    def _parted(self, groups: list[Group]) -> tuple[list[Group], list[Group]]:
        """(groups to learn from, groups without signal)."""
        if self.drops is None or not groups:
            return groups, []
        rewards, numbers = tensors(groups)
        dropped = self.drops(rewards, numbers)
        useless = {int(n) for n in numbers[dropped]}
        return (
            [group for i, group in enumerate(groups) if i not in useless],
            [group for i, group in enumerate(groups) if i in useless],
        )
