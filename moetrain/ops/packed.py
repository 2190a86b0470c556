"""The one batch layout: sequences laid end to end.

Legend: t tokens of the pack (global: before any slicing over context or tensor ranks), n sequences
    of the pack, tail included.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

# `role` of a sequence: a sampled answer, one that somebody else gave; 0: a prompt or padding.
ANSWER, DEMONSTRATION = 1, 2


@dataclass(frozen=True)
class Packed:
    """A pack of sequences. When it is padded, the padding is its last sequence and `valid` is False
    there.
    """

    tokens: Tensor  # [t] int64
    labels: Tensor  # [t] int64: what is predicted at each position; 0 where nothing is
    position_ids: Tensor  # [t] int64, from 0 in every sequence
    cu_seqlens: Tensor  # [n+1] int32
    loss_mask: Tensor  # [t] float32, aligned with labels
    valid: Tensor  # [t] bool: False in the padding tail
    extras: dict[str, Tensor] = field(
        default_factory=dict[str, Tensor]
    )  # name -> [n], a value per sequence
    per_token: dict[str, Tensor] = field(
        default_factory=dict[str, Tensor]
    )  # name -> [t, ...], a value per label; 0 where nothing is
    ids: tuple[str, ...] = ()  # [n], where each sequence came from, for messages
    # [n] int32: the sequence of this pack whose tokens come before this one's, -1 for none; None is
    # all -1. A prompt stands once before several answers; position_ids go on from its length.
    prefix: Tensor | None = None

    @property
    def num_tokens(self) -> int:
        return self.tokens.numel()

    @property
    def num_sequences(self) -> int:
        return self.cu_seqlens.numel() - 1

    @property
    def sequence_ids(self) -> Tensor:
        """[t] int64: which sequence each token belongs to."""
        lengths = self.cu_seqlens.diff().long()
        return torch.repeat_interleave(torch.arange(lengths.numel()), lengths)

    def to(self, device: torch.device) -> "Packed":
        """The same pack on `device`; cu_seqlens stays, since shapes are read from it."""
        return replace(
            self,
            tokens=self.tokens.to(device),
            labels=self.labels.to(device),
            position_ids=self.position_ids.to(device),
            loss_mask=self.loss_mask.to(device),
            valid=self.valid.to(device),
            extras={name: value.to(device) for name, value in self.extras.items()},
            per_token={name: value.to(device) for name, value in self.per_token.items()},
        )


def pack_one(
    tokens: Tensor,
    labels: Tensor,
    loss_mask: Tensor,
    *,
    id: str = "",
    extras: dict[str, Tensor] | None = None,
    per_token: dict[str, Tensor] | None = None,
) -> Packed:
    """A pack of one sequence from `[t]` tokens, `[t]` labels and a `[t]` mask over the labels."""
    t = tokens.numel()
    return Packed(
        tokens=tokens.long(),
        labels=labels.long(),
        position_ids=torch.arange(t),
        cu_seqlens=torch.tensor([0, t], dtype=torch.int32),
        loss_mask=loss_mask.float(),
        valid=torch.ones(t, dtype=torch.bool),
        extras=extras or {},
        per_token=per_token or {},
        ids=(id,),
    )


def from_tokens(tokens: Sequence[int], *, id: str = "") -> Packed:
    """A pack of one sequence in which every token after the first is scored."""
    ids = torch.tensor(list(tokens), dtype=torch.int64)
    labels = torch.cat([ids[1:], ids.new_zeros(1)])
    mask = torch.ones(ids.numel())
    mask[-1] = 0
    return pack_one(ids, labels, mask, id=id)


def concat(packs: Sequence[Packed]) -> Packed:
    """Lay packs end to end; [t] is the sum of theirs. All must have the same extras and
    values per token. One alone stays as it is.
    """
    if len(packs) == 1:
        return packs[0]
    starts = [0]
    for pack in packs:
        starts.append(starts[-1] + pack.num_tokens)
    bounds = [pack.cu_seqlens[1:] + start for pack, start in zip(packs, starts, strict=False)]
    prefix = None
    if any(p.prefix is not None for p in packs):
        shifted: list[Tensor] = []
        num_before = 0
        for pack in packs:
            parents = prefixes(pack)
            shifted.append(torch.where(parents < 0, parents, parents + num_before))
            num_before += pack.num_sequences
        prefix = torch.cat(shifted)
    return Packed(
        tokens=torch.cat([p.tokens for p in packs]),
        labels=torch.cat([p.labels for p in packs]),
        position_ids=torch.cat([p.position_ids for p in packs]),
        cu_seqlens=torch.cat([torch.zeros(1, dtype=torch.int32), *bounds]).to(torch.int32),
        loss_mask=torch.cat([p.loss_mask for p in packs]),
        valid=torch.cat([p.valid for p in packs]),
        extras=_joined([p.extras for p in packs]),
        per_token=_joined([p.per_token for p in packs]),
        ids=tuple(i for p in packs for i in p.ids),
        prefix=prefix,
    )


def _joined(parts: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def prefixes(pack: Packed) -> Tensor:
    """[n] int32: `pack.prefix`, all -1 where it is None."""
    if pack.prefix is not None:
        return pack.prefix
    return torch.full((pack.num_sequences,), -1, dtype=torch.int32)


def select(pack: Packed, keep: Tensor) -> Packed:
    """The sequences that `keep` [n] bool names, and the prefixes that they need; [t] shrinks."""
    keep = keep.cpu().clone()
    parents = prefixes(pack)
    needed = parents[keep]
    keep[needed[needed >= 0].long()] = True
    tokens = keep[pack.sequence_ids]
    number = keep.cumsum(0, dtype=torch.int32) - 1  # of each sequence among those that stay
    chosen_parents = parents[keep]
    lengths = pack.cu_seqlens.diff()[keep]
    return Packed(
        tokens=pack.tokens[tokens],
        labels=pack.labels[tokens],
        position_ids=pack.position_ids[tokens],
        cu_seqlens=torch.cat([lengths.new_zeros(1), lengths.cumsum(0, dtype=torch.int32)]),
        loss_mask=pack.loss_mask[tokens],
        valid=pack.valid[tokens],
        extras={name: value[keep] for name, value in pack.extras.items()},
        per_token={name: value[tokens] for name, value in pack.per_token.items()},
        ids=tuple(pack.ids[i] for i in range(len(pack.ids)) if keep[i]),
        prefix=None
        if pack.prefix is None
        else torch.where(chosen_parents < 0, chosen_parents, number[chosen_parents.long()]),
    )


def blank(t: int, like: Packed | None = None) -> Packed:
    """A pack of `t` tokens that is padding throughout, with the fields that `like` has."""

    def empty(part: dict[str, Tensor], num: int) -> dict[str, Tensor]:
        return {name: value.new_zeros(num, *value.shape[1:]) for name, value in part.items()}

    return Packed(
        tokens=torch.zeros(t, dtype=torch.int64),
        labels=torch.zeros(t, dtype=torch.int64),
        position_ids=torch.arange(t),
        cu_seqlens=torch.tensor([0, t], dtype=torch.int32),
        loss_mask=torch.zeros(t),
        valid=torch.zeros(t, dtype=torch.bool),
        extras={} if like is None else empty(like.extras, 1),
        per_token={} if like is None else empty(like.per_token, t),
        ids=("",),
    )


def pad_to(pack: Packed, t: int) -> Packed:
    """The same pack with `t` tokens: a tail sequence outside loss and statistics fills it up."""
    missing = t - pack.num_tokens
    assert missing >= 0, f"a pack of {pack.num_tokens} tokens does not fit {t}"
    return pack if missing == 0 else concat([pack, blank(missing, pack)])
