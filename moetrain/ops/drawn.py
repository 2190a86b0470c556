"""The distribution that an answer's token was drawn from: what a sampler makes of logits.

As vLLM 0.32 does it: the repetition penalty on logits, then the temperature, then what may not be
drawn is left out and the rest renormalised. Legend: m tokens, v vocabulary rows on this rank
(local), k tokens that could be drawn at most, s tokens of the pack (global).
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moetrain.ops.packed import Packed, prefixes

# Finite, so that a row without a token on this rank has no -inf - -inf; its exp is 0.
LEFT_OUT = -1e30


@dataclass(frozen=True)
class Drawn:
    """How each token's distribution differs from the model's, temperature aside."""

    kept: Tensor | None = None  # [m, k] int: ids that could be drawn, from 1; a row of 0: all
    penalty: Tensor | None = None  # [m] fp32: the repetition penalty, 1 for none
    tokens: Tensor | None = None  # [s] int64, which `seen` points into; with a penalty
    seen: Tensor | None = None  # [m, 2, 2] int64: the ranges of `tokens` that came before

    def part(self, chosen: slice) -> "Drawn":
        """That of some tokens."""
        fields = {"kept": self.kept, "penalty": self.penalty, "seen": self.seen}
        return replace(self, **{n: None if x is None else x[chosen] for n, x in fields.items()})

    def to(self, device: torch.device) -> "Drawn":
        """The same on `device`."""
        fields = {n: getattr(self, n) for n in ("kept", "penalty", "tokens", "seen")}
        return replace(self, **{n: None if x is None else x.to(device) for n, x in fields.items()})

    def penalise(self, logits: Tensor, vocab_start: int) -> Tensor | None:
        """Logits [m, v] of tokens that came before, in place: those above 0 divided by the penalty,
        others multiplied. Returns what each was multiplied with [m, v]; None where nothing was.
        """
        if self.penalty is None:
            return None
        before = self._came_before(logits, vocab_start)
        penalty = self.penalty.to(logits)[:, None]
        factor = torch.where(logits > 0, 1 / penalty, penalty).masked_fill_(~before, 1.0)
        logits.mul_(factor)
        return factor

    def leave_out(self, logits: Tensor, vocab_start: int) -> None:
        """What could not be drawn has no share in logits [m, v], in place."""
        if self.kept is None:
            return
        num_rows = logits.size(1)
        rows = self.kept.long() - 1 - vocab_start
        here = (self.kept > 0) & (rows >= 0) & (rows < num_rows)
        out = torch.ones(len(logits), num_rows + 1, dtype=torch.bool, device=logits.device)
        out.scatter_(1, rows.masked_fill(~here, num_rows), False)  # a last column for the others
        out[~(self.kept > 0).any(1)] = False
        logits.masked_fill_(out[:, :num_rows], LEFT_OUT)

    def _came_before(self, logits: Tensor, vocab_start: int) -> Tensor:
        """[m, v] bool."""
        assert self.tokens is not None and self.seen is not None
        starts, ends = self.seen.reshape(-1, 2).unbind(1)
        sizes = ends - starts
        first = torch.repeat_interleave(sizes.cumsum(0) - sizes - starts, sizes)
        places = torch.arange(len(first), device=first.device) - first
        row = torch.arange(len(sizes), device=sizes.device).div(2, rounding_mode="floor")
        row = torch.repeat_interleave(row, sizes)
        column = self.tokens[places] - vocab_start
        here = (column >= 0) & (column < logits.size(1))
        before = torch.zeros(logits.shape, dtype=torch.bool, device=logits.device)
        before[row[here], column[here]] = True
        return before


def drawn_of(pack: Packed, places: Tensor) -> Drawn | None:
    """How the distributions of the labels at `places` [m] of a pack differ from the model's: a
    token says in `per_token` what was kept, a sequence its penalty in `extras`. None: they do not.
    """
    ids = pack.per_token.get("kept")
    if ids is not None:
        ids = ids[places]
    factors = pack.extras.get("repetition_penalty")
    # 0: nothing of it was drawn
    if factors is None or bool(((factors == 1) | (factors == 0)).all()):
        return Drawn(ids) if ids is not None and bool(ids.any()) else None
    sequence = pack.sequence_ids[places]
    bounds = pack.cu_seqlens.long()
    before = prefixes(pack).long()[sequence]
    shared = torch.stack([bounds[before], bounds[before + 1]], 1).masked_fill_(
        (before < 0)[:, None], 0
    )
    mine = torch.stack([bounds[sequence], places + 1], 1)
    penalty = factors[sequence]
    penalty = torch.where(penalty == 0, 1.0, penalty)
    return Drawn(ids, penalty, pack.tokens, torch.stack([shared, mine], 1))
