"""What the model says of packs, brought from the last stage to every rank of a replica.

Legend: t tokens of a pack, k likeliest tokens of a place.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from moetrain.engine.step import Head, micro_batches
from moetrain.engine.world import World
from moetrain.methods.base import Out
from moetrain.ops.packed import Packed

Columns = Callable[[Out], list[Tensor]]
"""What of an output is wanted: [t] each."""
Forward = Callable[[Sequence[Packed], Head], list[dict[str, Any]]]


def rows_of(
    packs: Sequence[Packed], columns: Columns, num: int, world: World, forward: Forward
) -> list[Tensor]:
    """The `num` columns of each pack, [num, t] fp32 on the CPU, its own t. Collective."""
    batches = micro_batches(packs, 1, world)

    def head(out: Out, pack: Packed) -> tuple[Tensor, dict[str, Any]]:
        return out.logp.sum(), {"given": torch.stack(columns(out))}

    results = forward(batches, head)
    shape = (len(batches), num, batches[0].num_tokens)
    table = torch.zeros(shape, device=world.device)
    if results:
        table = torch.stack([row["given"] for row in results])
    rows = world.from_last_stage(table).cpu()
    return [rows[i, :, : pack.num_tokens] for i, pack in enumerate(packs)]


def likeliest_columns(out: Out) -> list[Tensor]:
    """The label's log-prob, k log-probs and the k tokens that they are of, where there are any."""
    if out.at_teacher is None or out.likeliest is None:
        return [out.logp]
    ids = out.likeliest.float()  # exact: a vocabulary has fewer than 2^24
    return [out.logp, *out.at_teacher.t(), *ids.t()]


def likeliest_of(rows: Sequence[Tensor], k: int) -> list[Out]:
    """From rows of these columns."""
    return [
        Out(row[0], at_teacher=row[1 : 1 + k].t(), likeliest=row[1 + k :].t().long())
        for row in rows
    ]
