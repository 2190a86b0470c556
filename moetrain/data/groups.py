"""GradedAnswer answers as packs: each prompt once, its answers after it.

Legend: t tokens of a pack, n sequences of it. An answer's sequence is the prompt's last token and
all of the answer but its last, so that its labels are the answer.
"""

import heapq
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moetrain.data.samples import Prompt
from moetrain.data.trajectories import Branch, Trajectory
from moetrain.errors import DataError
from moetrain.ops.packed import ANSWER, Packed, blank, concat, pack_one
from moetrain.ops.routes import in_bytes


@dataclass(frozen=True)
class GradedAnswer:
    """A trajectory, its reward and the parts that the reward is made of (None: not applicable)."""

    trajectory: Trajectory
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
    num_experts: int = 0,
) -> list[Packed]:
    """Packs of at most `seq_len` tokens, at least `min_packs` of them, as even as they come.

    Args:
        values: name -> [answers], a number for each answer in the order of the groups: extras.
        beyond: an answer that was cut ends with its last token, which is not scored there: a place
            for the value of what would have followed.
        num_experts: of the model, which choices are packed for as `ops/routes.py` has them; 0: as
            int16.

    `extras` also has role and item (the answer's number), `per_token` rollout_logp, and, where they
    were recorded, routes, kept (ids from 1 of what could be drawn), a teacher's teacher_logp,
    teacher_ids and teacher_top. What the model
    wrote is scored, replies are not. Each branch of a trajectory is a sequence with its values.
    Where there are fewer sequences than packs, some are blank.
    Raises DataError when a prompt and one answer do not fit, and for experts that are not there.
    """
    pieces = list(_pieces(groups, beyond))
    width = max((_width(piece.branch) for group in pieces for piece in group), default=0)
    how = _How(values, width, num_experts)
    units = [unit for group in pieces for unit in _units(group, how, seq_len)]
    if len(units) < min_packs:
        units = [_unit([piece], how) for group in pieces for piece in group]
    units += [_blank(units[0])] * (min_packs - len(units))
    bins = _fill_packs(units, seq_len, min_packs)
    del units
    bins.reverse()
    packs: list[Packed] = []
    while bins:  # whose units are gone once they are in a pack
        packs.append(concat(bins.pop()))
    return packs


@dataclass(frozen=True)
class _How:
    """What all sequences of a batch have alike."""

    values: Mapping[str, Tensor]  # [answers]
    width: int  # tokens that could be drawn, at most at one place; 0: nothing was left out
    num_experts: int


@dataclass(frozen=True)
class _Piece:
    """A branch, and what stood before it."""

    context: Tensor  # [c] int64, the last of it the first input
    prompt_id: str
    branch: Branch
    id: str
    item: int  # the number of its answer
    beyond: bool  # with a place behind the last token

    @property
    def num_tokens(self) -> int:
        """Besides the context."""
        return len(self.branch.tokens) + self.beyond


def _pieces(groups: Sequence[Group], beyond: bool) -> Iterator[list[_Piece]]:
    """Those with one context together, in the order of the answers."""
    item = 0
    for group in groups:
        prompt = torch.tensor(group.prompt.tokens)
        together: dict[bytes, list[_Piece]] = {b"": []}  # by context; the prompt's first
        for answer in group.answers:
            one = answer.trajectory
            for number, branch in enumerate(one.branches):
                is_last = number == len(one.branches) - 1
                context, key = prompt, b""
                if branch.context is not None:
                    context = torch.from_numpy(branch.context.astype(np.int64))
                    key = branch.context.tobytes()
                name = f"{group.prompt.id}:{one.index}" + f".{number}" * bool(number)
                cut = beyond and is_last and one.is_cut
                piece = _Piece(context, group.prompt.id, branch, name, item, cut)
                together.setdefault(key, []).append(piece)
            item += 1
        yield from filter(None, together.values())  # agents may all have words of their own


def _width(branch: Branch) -> int:
    return 0 if branch.kept is None else int(branch.kept.sizes.max(initial=0))


def _blank(like: Packed) -> Packed:
    """A token of padding that belongs to no answer, with the fields that `like` has."""
    one = blank(1, like)
    return replace(one, extras=one.extras | {"item": torch.full((1,), -1)})


def _units(pieces: Sequence[_Piece], how: _How, seq_len: int) -> list[Packed]:
    """Pieces of one context as one unit, or as several where they do not fit one pack."""
    parts: list[list[_Piece]] = [[]]
    used = context = pieces[0].context.numel() - 1
    for piece in pieces:
        size = piece.num_tokens
        if context + size > seq_len:
            raise DataError(
                f"An answer of {size} tokens to a prompt of {context + 1} does not fit"
                f" data.seq_len={seq_len}. Raise it, or lower rollout.max_tokens."
            )
        if used + size > seq_len:
            parts.append([])
            used = context
        parts[-1].append(piece)
        used += size
    return [_unit(part, how) for part in parts]


def _unit(pieces: Sequence[_Piece], how: _How) -> Packed:
    """The context once and these pieces after it."""
    first, numbers = pieces[0], [piece.item for piece in pieces]
    shared = first.context.numel() - 1
    answers = [_answer(piece, how) for piece in pieces]
    parts = [replace(part, position_ids=part.position_ids + shared) for part in answers]
    if shared:
        zeros = torch.zeros(shared)
        per_token = {"rollout_logp": zeros} | _routes(first.branch, 0, shared, how)
        if how.width:
            per_token["kept"] = torch.zeros(shared, how.width, dtype=torch.int32)
        per_token |= {
            name: x.new_zeros(shared, *x.shape[1:]) for name, x in _word(first.branch).items()
        }
        context = first.context[:-1]
        parts.insert(0, pack_one(context, zeros, zeros, id=first.prompt_id, per_token=per_token))
    pack = concat(parts)
    num_before = len(parts) - len(answers)
    extras = {
        "role": torch.tensor([0] * num_before + [ANSWER] * len(answers)),
        "item": torch.tensor([-1] * num_before + numbers),
    }
    for name, value in how.values.items():
        extras[name] = torch.cat([value.new_zeros(num_before), value[numbers]])
    prefix = torch.zeros(len(parts), dtype=torch.int32)
    prefix[0] = -1
    return replace(pack, extras=extras, prefix=prefix if shared else None)


def _answer(piece: _Piece, how: _How) -> Packed:
    branch = piece.branch
    labels = torch.from_numpy(branch.tokens.astype(np.int64))
    tokens = torch.cat([piece.context[-1:], labels[:-1]])
    per_token = {"rollout_logp": torch.from_numpy(branch.logprobs.astype(np.float32))}
    per_token |= _routes(branch, piece.context.numel() - 1, None, how)
    if how.width:
        per_token["kept"] = _kept(branch, how.width)
    per_token |= _word(branch)
    mask = torch.from_numpy(branch.written.astype(np.float32))
    if piece.beyond:
        tokens = torch.cat([tokens, labels[-1:]])
        labels, mask = (torch.cat([x, x.new_zeros(1)]) for x in (labels, mask))
        # No routes were recorded there: the router chooses by itself.
        per_token = {
            name: torch.cat([x, x.new_zeros(1, *x.shape[1:])]) for name, x in per_token.items()
        }
    return pack_one(tokens, labels, mask, id=piece.id, per_token=per_token)


def _kept(branch: Branch, width: int) -> Tensor:
    """[answer, width] int32: ids of what could be drawn, counted from 1; the rest is 0."""
    kept = torch.zeros(len(branch.tokens), width, dtype=torch.int32)
    if branch.kept is not None:
        sizes = torch.from_numpy(branch.kept.sizes.astype(np.int64))
        rows = torch.repeat_interleave(torch.arange(len(sizes)), sizes)
        columns = torch.arange(len(rows)) - (sizes.cumsum(0) - sizes)[rows]
        kept[rows, columns] = torch.from_numpy(branch.kept.ids.astype(np.int32)) + 1
    return kept


def _word(branch: Branch) -> dict[str, Tensor]:
    """A teacher's, where one was asked."""
    if branch.word is None:
        return {}
    logp, ids, top = (np.ascontiguousarray(x) for x in branch.word)
    word = {"teacher_logp": torch.from_numpy(logp.astype(np.float32))}
    if ids.size:
        word["teacher_ids"] = torch.from_numpy(ids.astype(np.int32))
        word["teacher_top"] = torch.from_numpy(top.astype(np.float32))
    return word


def _routes(branch: Branch, start: int, end: int | None, how: _How) -> dict[str, Tensor]:
    """The sampler's choices of experts, counted from 1, at positions [start, end)."""
    if branch.routes is None:
        return {}
    chosen = branch.routes[start:end]
    if how.num_experts and chosen.max(initial=0) >= how.num_experts:
        raise DataError(
            f"An answer's router chose expert {chosen.max()}, and the model has {how.num_experts}"
            " of them: it was sampled from another one. Leave rollout.routing_replay out, or give"
            " rollouts of this model."
        )
    is_byte = how.num_experts and in_bytes(how.num_experts, chosen.shape[-1])
    # In a byte the number after 255 is 0, as `ops/routes.py` writes the last of 256 experts.
    kind = np.uint8 if is_byte else np.int16
    return {"routes": torch.from_numpy(np.add(chosen, 1, dtype=kind, casting="unsafe"))}


def _fill_packs(units: Sequence[Packed], seq_len: int, min_packs: int) -> list[list[Packed]]:
    """Units into packs, the largest first into the emptiest pack; more packs until all fit."""
    total = sum(unit.num_tokens for unit in units)
    num = max(min_packs, -(-total // seq_len))
    order = sorted(range(len(units)), key=lambda i: -units[i].num_tokens)
    while True:
        bins: list[list[int]] = [[] for _ in range(num)]
        lightest = [(0, number) for number in range(num)]  # a heap of (tokens, pack)
        for i in order:
            size, number = lightest[0]
            bins[number].append(i)
            heapq.heapreplace(lightest, (size + units[i].num_tokens, number))
        if max(lightest)[0] <= seq_len:
            return [[units[i] for i in sorted(members)] for members in bins if members]
        num += 1
