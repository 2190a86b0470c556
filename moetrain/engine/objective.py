"""What a method makes of a global batch: counts first, then sums, and one division between them.

Micro-batches, data-parallel ranks and packs only decide where a sum is taken.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moetrain.engine.device import numbers
from moetrain.engine.world import World
from moetrain.errors import DataError, DivergedError
from moetrain.methods.base import COUNTED, Known, Method, Out
from moetrain.ops.packed import Packed, select

Kept = list[dict[str, Any]]  # what a head kept of each micro-batch, on the last stage; else []


@dataclass(frozen=True)
class Objective:
    """A method with its section of the recipe. Collective but for `head` and `estimate`."""

    method: Method
    cfg: Any
    world: World

    def parted(self, packs: Sequence[Packed]) -> tuple[Sequence[Packed] | None, Sequence[Packed]]:
        """(packs of the sequences to estimate from, packs of the others to learn from)."""
        estimate = self.method.estimate
        if estimate is None:
            return None, packs
        chosen = [estimate.select(pack, self.cfg).cpu() for pack in packs]
        pairs = list(zip(packs, chosen, strict=True))
        others = [select(p, ~keep) for p, keep in pairs]
        if not estimate.wanted(self.cfg):
            return None, others
        return [select(p, keep) for p, keep in pairs], others

    def counts(self, batches: Sequence[Packed]) -> tuple[dict[str, float], float]:
        """(the counts of the method's terms, valid tokens) of the whole global batch, before
        anything is computed. A term without anything to count is divided by 1. Where sequences
        are there to estimate from alone, a batch may hold nothing else.
        """
        batch_counts = [self.method.count(batch, self.cfg) for batch in batches]
        names = sorted(batch_counts[0])
        sums = [sum(float(counts[name]) for counts in batch_counts) for name in names]
        sums.append(sum(float(batch.valid.sum()) for batch in batches))
        table = torch.tensor(sums, dtype=torch.float64)
        *totals, tokens = numbers(self.world.sum(table, self.world.dp_group))
        if not any(totals) and self.method.estimate is None:
            raise DataError(
                "A global batch has nothing to learn from. Check the loss mask and data.seq_len."
            )
        return {name: count or 1.0 for name, count in zip(names, totals, strict=True)}, tokens

    def head(self, counts: dict[str, float], known: Known) -> Any:
        """A micro-batch's outputs -> (its share of the global loss, sums to report)."""

        def head(out: Out, pack: Packed) -> tuple[Tensor, dict[str, Any]]:
            terms, metrics = self.method.loss(out, pack, self.cfg, known)
            assert terms.keys() == counts.keys(), f"{self.method.name}: terms and counts differ"
            loss = torch.stack([terms[name] / counts[name] for name in sorted(terms)]).sum()
            sums = {name: (total.detach(), n) for name, (total, n) in metrics.items()}
            return loss, {"loss": loss.detach(), "metrics": sums, "ids": pack.ids}

        return head

    def estimate(self, out: Out, pack: Packed) -> tuple[Tensor, dict[str, Any]]:
        """As a head: no loss, and the sums of `Method.estimate`."""
        assert self.method.estimate is not None
        zero = torch.zeros((), device=self.world.device)
        return zero, {"loss": zero, "metrics": self.method.estimate.values(out, pack, self.cfg)}

    def totals(self, kept: Kept) -> dict[str, float]:
        """Global means from the micro-batches' sums, and the loss, of which they are shares; only
        one rank of each data-parallel replica contributes.
        """
        rank_names: list[str] = sorted(kept[0]["metrics"]) if kept else []
        names = self.world.share(rank_names, self.world.size - 1)  # which is on the last stage
        device = self.world.device
        sums = torch.zeros(1 + 2 * len(names), dtype=torch.float64, device=device)
        if self.world.adds_loss:
            for row in kept:
                flat = [x for name in names for x in row["metrics"][name]]
                values = [torch.as_tensor(x).double() for x in (row["loss"], *flat)]
                sums += torch.stack([x.to(device) for x in values])
        loss, *pairs = numbers(self.world.sum(sums))
        means = {n: pairs[2 * i] / max(pairs[2 * i + 1], 1e-12) for i, n in enumerate(names)}
        counts = {COUNTED[n]: pairs[2 * i + 1] for i, n in enumerate(names) if n in COUNTED}
        return {"loss": loss, **means, **counts}

    def check(
        self, step: int, loss: float, grad_norm: float, kept: Kept, batches: Sequence[Packed]
    ) -> None:
        """Raise DivergedError when the loss or the gradient is not finite."""
        if math.isfinite(loss) and math.isfinite(grad_norm):
            return
        names = self._suspects(loss, kept, batches)
        raise DivergedError(
            f"Step {step}: loss {loss:.4g}, gradient norm {grad_norm:.4g}. Nothing was updated. "
            f"Sequences: {names}. Look at them, lower optim.lr, or resume from the last checkpoint "
            f"without them."
        )

    def _suspects(self, loss: float, kept: Kept, batches: Sequence[Packed]) -> str:
        """The sequences of the micro-batches whose loss is not finite; where only a gradient is
        not, all of them.
        """
        bad = [i for row in kept if not torch.isfinite(row["loss"]) for i in row["ids"] if i]
        if math.isfinite(loss):
            bad = [i for batch in batches for i in batch.ids if i]
        names = sorted({i for part in self.world.gather(bad) for i in part})
        more = f" and {len(names) - 8} more" if len(names) > 8 else ""
        return ", ".join(names[:8]) + more if names else "-"
