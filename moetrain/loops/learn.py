"""From graded answers to packs to learn from, and what there is to see in them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from moetrain.config.recipe import Recipe
from moetrain.data.groups import Group, pack_groups
from moetrain.engine import Engine, StepResult
from moetrain.engine.snapshot import Weights, mixed
from moetrain.errors import DataError
from moetrain.loops.batch_values import mean_kl, with_targets, with_values
from moetrain.loops.demonstrations import Demonstrations
from moetrain.loops.outline import Outline
from moetrain.loops.parts import Packs, Parts
from moetrain.loops.rollouts import means, turn_figures
from moetrain.loops.store import Batch
from moetrain.loops.teacher import Teacher, check_words, with_teacher_prompts
from moetrain.methods import METHODS
from moetrain.methods.base import Online, Out
from moetrain.methods.running import MEAN, WEIGHT
from moetrain.observe.answers import Answer, parted, said_in
from moetrain.ops.packed import Packed

SHOWN = (MEAN, WEIGHT)


@dataclass
class Lessons:
    """What packs are made with: the reference of a KL, a teacher, and worked answers, where there
    are some.
    """

    recipe: Recipe
    engine: Engine
    reference: Weights | None
    demonstrations: Demonstrations
    teacher: Teacher | None = None
    carried: dict[str, float] = field(default_factory=dict[str, float])  # from batch to batch

    def packs(self, given: Outline) -> list[list[Packed]]:
        """This data-parallel rank's packs of each optimizer step, with all that the method asks
        for; of choices of experts those for the layers of this stage. Collective.
        """
        online = METHODS[self.recipe.method.name].online
        assert online is not None
        recipe, given = self._as_it_stands(online, given)
        world = self.engine.world
        method, _ = recipe.sampling
        values = answer_values(recipe, online, given)
        parts = self._dealt(recipe, given, values)
        flat = [pack for part in parts for pack in part]
        flat = _completed(recipe, self.engine, flat, self.reference)
        flat = self._with_word(recipe, given, values, flat)
        if online.running is not None and self.reference is not None:
            self.carried = online.running.steer(self.carried, *mean_kl(flat, world), method)
        # Rewards of all answers, those that were left out too.
        ready = iter(with_targets(flat, online, method, values["reward"], given.group, world))
        # Old log-probs stay those before the first pass.
        whole = [[next(ready) for _ in part] for part in parts] * method.num_iterations
        share = online.shares(given.step, recipe.method)[1] if online.shares else 0.0
        return [part + self.demonstrations.next(part[0], share) for part in whole]

    def _as_it_stands(self, online: Online, given: Outline) -> tuple[Recipe, Outline]:
        """The recipe with what the batches before have made of it, and this batch with its rewards
        rescaled by all of them.
        """
        recipe, running = self.recipe, online.running
        if running is None:
            return recipe, given
        rewards, self.carried = running.rescale(
            given.rewards, given.cut, self.carried, recipe.method
        )
        method = running.adapted(recipe.method, self.carried)
        return recipe.model_copy(update={"method": method}), replace(given, rewards=rewards.float())

    def _dealt(self, recipe: Recipe, given: Outline, values: Mapping[str, Tensor]) -> Packs:
        """This rank's part of the packs, which the first rank makes. Collective."""
        world = self.engine.world
        made: Packs = []
        num, model = world.dp_size, self.engine.model
        world.first(lambda: made.extend(all_packs(recipe, given, values, num, model.num_experts)))
        parts = Parts.of(recipe, model, num)
        return world.scatter(lambda replica, stage: parts.of_rank(made, replica, stage))

    def _with_word(
        self, recipe: Recipe, given: Outline, values: Mapping[str, Tensor], packs: list[Packed]
    ) -> list[Packed]:
        """The packs with the teacher's word, where there is one. Collective."""
        teacher = self.teacher
        if teacher is None:
            check_words(recipe, packs)
            return packs
        if teacher.prompts is None:
            return teacher.words(packs)
        others = self._dealt(recipe, with_teacher_prompts(given, teacher.prompts), values)
        return teacher.words_behind(
            packs, [pack for part in others for pack in part], given.lengths
        )

    @property
    def shown(self) -> dict[str, float]:
        """What the ledger says of numbers that move."""
        return {name: x for name, x in self.carried.items() if name in SHOWN}

    def sync(self, step: int) -> None:
        """After `step` the reference moves to the policy, where it is time to (TR-DPO, arXiv
        2404.09656, eq. 9).
        """
        method, _ = self.recipe.sampling
        every = method.ref_model_sync_steps
        if self.reference is not None and every and step % every == 0:
            now = self.engine.snapshot()
            self.reference = mixed(self.reference, now, method.ref_model_mixup_alpha)

    @property
    def moving(self) -> Weights | None:
        """The reference where a run changes it, which a checkpoint then holds."""
        method, _ = self.recipe.sampling
        return self.reference if method.ref_model_sync_steps else None


def answer_values(recipe: Recipe, online: Online, given: Outline) -> dict[str, Tensor]:
    """[answers] fp32 each: the shaped reward, the advantage, the place among the batch's answers,
    the weight where there is one.
    """
    rewards = given.rewards
    if online.shape is not None:
        rewards = online.shape(rewards, given.lengths.float(), given.cut, recipe.method)
    _, rollout = recipe.sampling
    advantages = online.advantages(rewards, given.group, recipe.method)
    values = {"reward": rewards, "advantage": advantages}
    values["place"] = torch.arange(len(rewards), dtype=torch.float32)
    # What is learned from is scored as it was drawn; all else, the proof of a push included, at 1.
    values["temperature"] = torch.full_like(rewards, rollout.temperature)
    if rollout.repetition_penalty != 1:
        values["repetition_penalty"] = torch.full_like(rewards, rollout.repetition_penalty)
    if online.shares is not None:
        values["share"] = torch.full_like(rewards, online.shares(given.step, recipe.method)[0])
    return values


def all_packs(
    recipe: Recipe,
    given: Outline,
    values: Mapping[str, Tensor],
    num_replicas: int,
    num_experts: int,
) -> Packs:
    """A batch as packs, where its answers are. Raises DataError."""
    assert given.batch is not None
    method, _ = recipe.sampling
    online = METHODS[recipe.method.name].online
    assert online is not None
    how = online.truncated(recipe.method)
    groups = given.batch.groups
    if how == "mask":
        groups, values = _without_cut(given, values)
    return [
        pack_groups(
            own_groups,
            step_values,
            seq_len=recipe.data.seq_len,
            min_packs=num_replicas,
            beyond=how == "bootstrap",
            num_experts=num_experts,
        )
        for own_groups, step_values in _split_into_steps(groups, values, method.inner_steps)
    ]


def _without_cut(
    given: Outline, values: Mapping[str, Tensor]
) -> tuple[tuple[Group, ...], dict[str, Tensor]]:
    """The groups and the values of their answers, without answers that were cut."""
    assert given.batch is not None
    whole = ~given.cut
    if not whole.any():
        raise DataError(
            f"Step {given.step}: rollout.max_tokens cut every answer, and method.truncated=mask"
            " leaves them out. Raise it, or take method.truncated=bootstrap or reward."
        )
    stays = iter(whole.tolist())
    kept = [
        replace(group, answers=tuple(answer for answer in group.answers if next(stays)))
        for group in given.batch.groups
    ]
    groups = tuple(group for group in kept if group.answers)
    return groups, {name: value[whole] for name, value in values.items()}


def _split_into_steps(
    groups: Sequence[Group], values: Mapping[str, Tensor], num_parts: int
) -> list[tuple[list[Group], dict[str, Tensor]]]:
    """Whole groups dealt in order to the batch's optimizer steps, with the values of their
    answers. A step without a group is left out.
    """
    ends = torch.tensor([len(group.answers) for group in groups]).cumsum(0).tolist()
    starts = [0, *ends[:-1]]
    parts: list[tuple[list[Group], dict[str, Tensor]]] = []
    for part in range(min(num_parts, len(groups))):
        chosen = range(part, len(groups), num_parts)
        items = torch.tensor([i for g in chosen for i in range(starts[g], ends[g])])
        step_values = {name: value[items] for name, value in values.items()}
        parts.append(([groups[g] for g in chosen], step_values))
    return parts


def _completed(
    recipe: Recipe, engine: Engine, packs: Sequence[Packed], reference: Weights | None
) -> list[Packed]:
    """The packs with the model's own log-probs before the first step, the reference's, and values
    and entropies where they are asked for.
    """
    method, _ = recipe.sampling
    before = engine.outputs(packs, with_entropy=method.top_entropy_quantile < 1)
    others: Sequence[Tensor | None] = [None] * len(packs)
    if reference is not None:
        with engine.as_before(reference):
            others = engine.logprobs(packs)
    return with_known(packs, before, others)


def with_known(
    packs: Sequence[Packed], before: Sequence[Out], others: Sequence[Tensor | None]
) -> list[Packed]:
    """Packs with what the model said of each before the first step, and the reference."""
    done: list[Packed] = []
    for pack, out, other in zip(packs, before, others, strict=True):
        known = {
            "old_logp": out.logp,
            "old_value": out.value,
            "old_entropy": out.entropy,
            "ref_logp": other,
        }
        given = {name: value for name, value in known.items() if value is not None}
        done.append(with_values(pack, given))
    return done


def totals(results: Sequence[StepResult]) -> StepResult:
    """Several optimizer steps as one row: means, and sums of tokens."""
    num = len(results)

    def mean(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
        return {name: sum(row[name] for row in rows) / num for name in rows[0]}

    return StepResult(
        loss=sum(result.loss for result in results) / num,
        metrics=mean([result.metrics for result in results]),
        grad_norm=sum(result.grad_norm for result in results) / num,
        lr=results[-1].lr,
        tokens=sum(result.tokens for result in results),
        memory_gib=results[-1].memory_gib,
        router=mean([result.router for result in results]),
    )


def summary(given: Outline, version: int, *, graded: bool = True) -> dict[str, Any]:
    """What there is to see in a batch that weights number `version` learn from, where its answers
    are; elsewhere nothing. graded: whether rewards say something of them.
    """
    batch = given.batch
    if batch is None:
        return {}
    num = len(given.rewards)
    groups = [given.rewards[given.group == i] for i in range(given.num_groups)]
    compared = [bool((one == one[0]).all()) for one in groups if len(one) > 1]
    figures: dict[str, Any] = {
        **turn_figures([answer.trajectory for answer in batch.answers]),
        "length/mean": int(given.lengths.sum()) / num,
        "length/max": float(given.lengths.max()),
        "length/truncated": int(given.cut.sum()) / num,
        "staleness": float(version - given.oldest),
        "staleness/share": _share_older(batch, version),
    }
    if batch.held:
        figures["groups/held"] = float(len(batch.held))
    if graded:
        deviation = torch.stack([one.mean() for one in groups]).std(correction=0)
        figures |= means(batch.answers, "reward")
        figures |= {"groups/graded": float(len(groups)), "groups/std": float(deviation)}
    if graded and compared:  # an answer alone is not compared with another
        figures["groups/no_signal"] = sum(compared) / len(compared)
    if batch.fault:
        figures["reward/fault"] = batch.fault
    figures |= {f"logged/{name}": value for name, value in batch.metrics.items()}
    return figures | {f"faults/{name}": float(n) for name, n in batch.counts.items()}


def _share_older(batch: Batch, version: int) -> float:
    """Of the model's tokens those that older weights drew."""
    branches = [branch for answer in batch.answers for branch in answer.trajectory.branches]
    older = sum(int((branch.by_token[branch.written] < version).sum()) for branch in branches)
    return older / sum(int(branch.written.sum()) for branch in branches)


def readable(given: Outline) -> Iterator[Answer]:
    """A batch's answers for people, where they are."""
    groups = () if given.batch is None else given.batch.groups
    pairs = [(group.prompt, answer) for group in groups for answer in group.answers]
    for number, (prompt, graded) in enumerate(pairs, 1):
        asked, columns = parted(prompt.columns)
        yield Answer(
            number=number,
            prompt=asked,
            columns=columns,
            text=said_in(graded.trajectory.text, graded.trajectory.messages),
            reward=graded.reward,
            parts=graded.parts,
            tokens=graded.trajectory.num_tokens,
            finish=graded.trajectory.finish,
            fault="",
        )
