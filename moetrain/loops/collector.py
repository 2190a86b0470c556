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
from moetrain.loops.quota import Key, Quota, due_now
from moetrain.loops.rollouts import (
    Drawing,
    Drops,
    graded_by,
    journal,
    tensors,
    timed,
    verdicts,
)
from moetrain.loops.store import Batch, Place, Store
from moetrain.loops.teacher_servers import TeacherServers
from moetrain.rewards import Grader, Verdict

EMPTY = 3  # batches in a row that nothing can be learned from, before a run ends


@dataclass
class _Work:
    """A step's batch while it is made."""

    step: int
    place: Place
    held: dict[Key, Trajectory]  # how far earlier draws brought what goes on
    done: dict[Key, Trajectory]
    seconds: dict[str, float] = field(default_factory=lambda: {"sample": 0.0, "score": 0.0})
    counts: Counter[str] = field(default_factory=Counter[str])

    def oldest(self) -> dict[str, int]:
        """Prompts that are held and have tokens -> the version of the oldest of them."""
        oldest: dict[str, int] = {}
        for (prompt_id, _), one in self.held.items():
            oldest[prompt_id] = min(one.version, oldest.get(prompt_id, one.version))
        return oldest


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
    teacher: TeacherServers | None = None
    drops: Drops | None = None
    leaves_cut: bool = False  # whether answers that were cut are not learned from
    rounds: int = 1  # of sampling for one step, at most, where groups without signal are dropped
    num_steps: int = 0  # of the run, for rewards that ask
    limit: int | None = None  # prompts of the stream that there are, where epochs are counted
    surplus: int = 0  # prompts that are being answered beyond those of a step
    partial: bool = False  # whether what is not ready for a step goes on in the next
    most: int = 0  # steps that a token may be old then
    # Faults that a batch has counted; those of the push before it are among them.
    _reported: Counter[str] = field(default_factory=Counter[str])

    def batch(self, step: int, place: Place) -> Batch:
        """The batch of `step`, from a place of the stream on; what of it is on disk is taken from
        there. A batch from which nothing can be learned is left for the prompts after it: DataError
        after EMPTY of them. Without groups where train.epochs has no prompt left.
        """
        saved = self.store.read(step)
        if saved is not None:
            return saved
        held = self.store.held(step)
        work = _Work(step, place, held, held | self.store.finished(step))
        failed = self.grader.num_faults
        seconds, counts = work.seconds, work.counts
        groups: list[Group] = []
        while not groups and not self._is_over(work.place):
            groups = self._collect(work)
            counts["dropped/batches"] += not groups
            if counts["dropped/batches"] == EMPTY:
                break
        if not groups and (step == 1 or not self._is_over(work.place)):
            raise DataError(self._nothing(step, counts["dropped/batches"]))
        if self.teacher is not None:
            with timed(seconds, "teach"):
                groups = self.teacher.taught(groups)
        faults = self.drawing.engine.counts + self.grader.counts
        counts += faults - self._reported
        self._reported = faults
        metrics = self.grader.take_metrics()
        fault = self.grader.said if self.grader.num_faults > failed else ""
        batch = Batch(
            step,
            tuple(groups),
            work.place.cursor,
            seconds,
            dict(counts),
            metrics,
            fault,
            self.drawn["temperature"],
            {name: value for name, value in self.drawn.items() if name != "temperature"},
            work.place.held,
        )
        if groups:
            with files.named(self.store.folder):
                if self.partial:
                    self.store.hold(step + 1, work.held.values())
                self.store.write(batch)
        return batch

    def _is_over(self, place: Place) -> bool:
        return self.limit is not None and place.cursor >= self.limit and not place.held

    def _collect(self, work: "_Work") -> list[Group]:
        """Groups to learn from, those without signal last; `work` is behind their prompts then."""
        groups: list[Group] = []
        spare: list[Group] = []  # without signal; better than an empty step
        for _ in range(self.rounds):
            wanted, places = self._begun(work, self.num_prompts - len(groups))
            prompts = [self.prompts.at(place) for place in places]
            with timed(work.seconds, "sample"):
                taken = self._sample(work, prompts, wanted)
            self._leave(work, dict(zip(places, prompts, strict=True)), taken)
            with timed(work.seconds, "score"):
                graded = self._grade(work, taken)
            useful, useless = self._parted(graded)
            groups += useful
            spare += useless
            work.counts["dropped/no_signal"] += len(useless)
            if len(groups) >= self.num_prompts:
                break
        groups += spare[: self.num_prompts - len(groups)]
        if self.leaves_cut and all(
            answer.trajectory.is_cut for group in groups for answer in group.answers
        ):
            return []
        return groups

    def _begun(self, work: "_Work", wanted: int) -> tuple[int, list[int]]:
        """(groups that are wanted, places in the stream of all that are drawn); the place is behind
        them.
        """
        cursor, held = work.place
        num = wanted + self.surplus
        if self.partial:  # what nothing comes after is not begun
            num = min(num, wanted + self.num_prompts * max(0, self.num_steps - work.step))
        num -= len(held)
        if self.limit is not None:
            num = min(num, self.limit - cursor)
        num = max(num, 0)
        work.place = Place(cursor + num, held)
        places = [*held, *range(cursor, cursor + num)]
        return min(wanted, len(places)), places

    def _leave(self, work: "_Work", drawn: Mapping[int, Prompt], taken: Sequence[Prompt]) -> None:
        """What was drawn and not taken is held, or is lost."""
        chosen = {prompt.id for prompt in taken}
        left = {place: prompt.id for place, prompt in drawn.items() if prompt.id not in chosen}
        keys = [(one, index) for one in left.values() for index in range(self.group_size)]
        there = {key: work.done[key] for key in keys if key in work.done}
        work.held, held = {}, ()
        if self.partial:
            work.held, held = there, tuple(sorted(left))
        elif left:
            work.counts["dropped/late"] += len(keys)
            work.counts["dropped/late_tokens"] += sum(one.num_tokens for one in there.values())
        work.place = Place(work.place.cursor, held)

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

    def _sample(self, work: "_Work", prompts: Sequence[Prompt], wanted: int) -> Sequence[Prompt]:
        """The prompts that have all their answers, and are taken."""
        quota = None
        if len(prompts) > wanted:
            due = due_now(work.oldest(), work.step, self.num_prompts, self.most)
            quota = Quota(prompts, self.group_size, wanted, work.done, due)
        folder = self.store.folder
        with files.named(folder), self.store.open(work.step, work.done.values()) as file:
            self.drawing.draw(
                prompts,
                self.group_size,
                work.done,
                journal(file, ()),
                whole_batches=True,
                held=work.held,
                quota=quota,
            )
        return prompts if quota is None else quota.taken()

    def _grade(self, work: "_Work", prompts: Sequence[Prompt]) -> list[Group]:
        """The groups with at least two graded answers."""
        pairs = [(p, work.done[p.id, i]) for p in prompts for i in range(self.group_size)]
        counts = work.counts
        counts.update(f"environment/{one.finish}" for _, one in pairs if one.is_lost)
        if self.grader.configs:
            results = verdicts(self.grader, pairs, work.step, self.num_steps)
        else:  # a teacher judges, and nobody else
            results = [Verdict(None if one.is_lost else 0.0, {}) for _, one in pairs]
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
