"""GradedAnswer answers as packs: each prompt once, its answers after it.

Legend: t tokens of a pack, n sequences of it. An answer's sequence is the prompt's last token and
all of the answer but its last, so that its labels are the answer.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moetrain.data.samples import Prompt, Sample
from moetrain.errors import DataError
from moetrain.ops.packed import ANSWER, Packed, blank, concat, pack_one


@dataclass(frozen=True)
class GradedAnswer:
    """An answer, its reward and the parts that the reward is made of (None: not applicable)."""

    sample: Sample
    reward: float
    parts: Mapping[str, float | None] = field(default_factory=dict[str, float | None])
    extra: Mapping[str, Any] = field(default_factory=dict[str, Any])  # what rewards have logged


@dataclass(frozen=True)
class Group:
    """A prompt and its graded answers."""

    prompt: Prompt
    answers: tuple[GradedAnswer, ...]


def pack_groups(
    groups: Sequence[Group],
    values: Mapping[str, Tensor],
    *,
    seq_len: int,
    min_packs: int,
    beyond: bool = False,
) -> list[Packed]:
    """Packs of at most `seq_len` tokens, at least `min_packs` of them, as even as they come.

    Args:
        values: name -> [answers], a number for each answer in the order of the groups: extras.
        beyond: an answer that was cut ends with its last token, which is not scored there: a place
            for the value of what would have followed.

    `extras` also has role and item (the answer's number), `per_token` rollout_logp, and
    routes and kept (ids from 1 of what could be drawn) where they were recorded. Where there are
    fewer answers than packs, some are blank.
    Raises DataError when a prompt and one answer do not fit.
    """
    width = max((_width(a.sample) for group in groups for a in group.answers), default=0)
    how = _How(values, beyond, width)
    units: list[Packed] = []
    item = 0
    for group in groups:
        numbers = range(item, item + len(group.answers))
        item += len(group.answers)
        units += _units(group, numbers, how, seq_len)
    if len(units) < min_packs:
        units = [
            unit
            for group, first in zip(groups, _firsts(groups), strict=True)
            for i in range(len(group.answers))
            for unit in [_unit(group, [first + i], first, how)]
        ]
    units += [_blank(units[0])] * (min_packs - len(units))
    return [concat(own) for own in _fill_packs(units, seq_len, min_packs)]


@dataclass(frozen=True)
class _How:
    """What all sequences of a batch have alike."""

    values: Mapping[str, Tensor]  # [answers]
    beyond: bool
    width: int  # tokens that could be drawn, at most at one place; 0: nothing was left out


def _width(sample: Sample) -> int:
    return 0 if sample.kept is None else int(sample.kept.sizes.max(initial=0))


def _firsts(groups: Sequence[Group]) -> list[int]:
    firsts = [0]
    for group in groups:
        firsts.append(firsts[-1] + len(group.answers))
    return firsts[:-1]


def _blank(like: Packed) -> Packed:
    """A token of padding that belongs to no answer, with the fields that `like` has."""
    one = blank(1, like)
    return replace(one, extras=one.extras | {"item": torch.full((1,), -1)})


def _units(group: Group, numbers: range, how: _How, seq_len: int) -> list[Packed]:
    """The group as one unit, or as several where its answers do not fit one pack."""
    parts: list[list[int]] = [[]]
    used = prompt = len(group.prompt.tokens) - 1
    for number, answer in zip(numbers, group.answers, strict=True):
        size = len(answer.sample.tokens) + (how.beyond and answer.sample.finish == "length")
        if prompt + size > seq_len:
            raise DataError(
                f"An answer of {size} tokens to a prompt of {prompt + 1} does not fit"
                f" data.seq_len={seq_len}. Raise it, or lower rollout.max_tokens."
            )
        if used + size > seq_len:
            parts.append([])
            used = prompt
        parts[-1].append(number)
        used += size
    return [_unit(group, part, numbers.start, how) for part in parts]


def _unit(group: Group, numbers: Sequence[int], first: int, how: _How) -> Packed:
    """The prompt once and the answers with these numbers."""
    prompt = torch.tensor(group.prompt.tokens)
    shared = prompt.numel() - 1
    chosen = [group.answers[number - first].sample for number in numbers]
    answers = [_answer(group.prompt, sample, how) for sample in chosen]
    parts = [replace(part, position_ids=part.position_ids + shared) for part in answers]
    if shared:
        zeros = torch.zeros(shared)
        own = {"rollout_logp": zeros} | _routes(chosen[0], 0, shared)
        if how.width:
            own["kept"] = torch.zeros(shared, how.width, dtype=torch.int32)
        parts.insert(0, pack_one(prompt[:-1], zeros, zeros, id=group.prompt.id, per_token=own))
    pack = concat(parts)
    num_before = len(parts) - len(answers)
    extras = {
        "role": torch.tensor([0] * num_before + [ANSWER] * len(answers)),
        "item": torch.tensor([-1] * num_before + list(numbers)),
    }
    for name, value in how.values.items():
        extras[name] = torch.cat([value.new_zeros(num_before), value[list(numbers)]])
    prefix = torch.zeros(len(parts), dtype=torch.int32)
    prefix[0] = -1
    return replace(pack, extras=extras, prefix=prefix if shared else None)


def _answer(prompt: Prompt, sample: Sample, how: _How) -> Packed:
    labels = torch.tensor(sample.tokens)
    tokens = torch.cat([torch.tensor(prompt.tokens[-1:]), labels[:-1]])
    own = {"rollout_logp": torch.tensor(sample.logprobs)}
    own |= _routes(sample, len(prompt.tokens) - 1, None)
    if how.width:
        own["kept"] = _kept(sample, how.width)
    mask = torch.ones(labels.numel())
    if how.beyond and sample.finish == "length":
        tokens = torch.cat([tokens, labels[-1:]])
        labels, mask = (torch.cat([x, x.new_zeros(1)]) for x in (labels, mask))
        # No routes were recorded there: the router chooses by itself.
        own = {name: torch.cat([x, x.new_zeros(1, *x.shape[1:])]) for name, x in own.items()}
    return pack_one(tokens, labels, mask, id=f"{prompt.id}:{sample.index}", per_token=own)


def _kept(sample: Sample, width: int) -> Tensor:
    """[answer, width] int32: ids of what could be drawn, counted from 1; the rest is 0."""
    found = torch.zeros(len(sample.tokens), width, dtype=torch.int32)
    if sample.kept is not None:
        sizes = torch.from_numpy(sample.kept.sizes).long()
        rows = torch.repeat_interleave(torch.arange(len(sizes)), sizes)
        columns = torch.arange(len(rows)) - (sizes.cumsum(0) - sizes)[rows]
        found[rows, columns] = torch.from_numpy(sample.kept.ids) + 1
    return found


def _routes(sample: Sample, start: int, end: int | None) -> dict[str, Tensor]:
    """The sampler's choices of experts, counted from 1, at positions [start, end)."""
    if sample.routes is None:
        return {}
    return {"routes": torch.from_numpy(sample.routes[start:end].astype(np.int16)) + 1}


def _fill_packs(units: Sequence[Packed], seq_len: int, min_packs: int) -> list[list[Packed]]:
    """Units into packs, the largest first into the emptiest pack; more packs until all fit."""
    total = sum(unit.num_tokens for unit in units)
    num = max(min_packs, -(-total // seq_len))
    order = sorted(range(len(units)), key=lambda i: -units[i].num_tokens)
    while True:
        bins: list[list[int]] = [[] for _ in range(num)]
        sizes = [0] * num
        for i in order:
            lightest = sizes.index(min(sizes))
            bins[lightest].append(i)
            sizes[lightest] += units[i].num_tokens
        if max(sizes) <= seq_len:
            return [[units[i] for i in sorted(own)] for own in bins if own]
        num += 1
