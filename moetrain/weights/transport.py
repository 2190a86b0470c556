"""Moving weights between Hugging Face names and live shards, by the table. Knows groups of ranks,
no family and no Megatron.

A canonical name (global layer and expert numbers) lives on one pipeline stage and one
expert-parallel rank, split over a tensor-parallel group, and is repeated over data-parallel
replicas. Its owner is the smallest global rank that holds its first tensor-parallel shard.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from moetrain.errors import WeightsError
from moetrain.models import Model, Rule
from moetrain.models.sharding import Shape
from moetrain.pulse import beat
from moetrain.weights.checks import check_tensors, some
from moetrain.weights.doubles import contradiction
from moetrain.weights.ranks import ALONE, Ranks
from moetrain.weights.reader import Reader

Table = Mapping[str, Rule]
To = Literal["all", "first", "owner"]


@dataclass(frozen=True)
class LocalParam:
    """One weight of this rank: `tensor` is its local shard, a view that can be written."""

    name: str
    tensor: Tensor
    tp_rank: int
    tp_size: int
    tp_group: ProcessGroup | None


def check_names(local: Iterable[str], table: Table, reader: Reader, model: Model) -> None:
    """Every local weight has one rule, and the reader holds exactly the table's tensors in the
    table's shapes; what it holds beside them says nothing else than they do.
    """
    unknown = sorted(set(local) - set(table))
    if unknown:
        raise WeightsError(f"No rule for {some(unknown)}. The family's table is incomplete.")
    check_tensors(reader, table, model.ignored_keys)
    problem = contradiction(reader, model)
    if problem:
        raise WeightsError(f"{reader}: {problem}")


def load(local: Iterable[LocalParam], table: Table, reader: Reader, model: Model) -> None:
    """Fill each local shard in place, reading only the slices it is made of; values are cast to the
    shard's dtype.

    Raises WeightsError when the reader's tensors are not exactly the table's, or a shard is not of
    its rule's shape.
    """
    params = list(local)
    check_names((p.name for p in params), table, reader, model)
    _check_shards(params, table)
    for param in params:
        beat()
        rule = table[param.name]
        slices = rule.sharding.parts(param.tp_rank, param.tp_size)
        parts = tuple(reader.read(key, cut) for key, cut in zip(rule.hf, slices, strict=True))
        with torch.no_grad():
            param.tensor.copy_(rule.sharding.pack(parts, param.tp_rank, param.tp_size))


def _check_shards(params: list[LocalParam], table: Table) -> None:
    """`copy_` would broadcast into a shard of another shape, and a name held twice hides another
    that is held by nobody.
    """
    twice = sorted(name for name, n in Counter(p.name for p in params).items() if n > 1)
    if twice:
        raise WeightsError(f"{some(twice)}: on this rank more than once.")
    for param in params:
        shape = table[param.name].local_shape(param.tp_rank, param.tp_size)
        if tuple(param.tensor.shape) != shape:
            raise WeightsError(
                f"{param.name} is {list(param.tensor.shape)} on tensor-parallel rank "
                f"{param.tp_rank} of {param.tp_size}, its rule asks for {list(shape)}."
            )


def export(
    local: Iterable[LocalParam], table: Table, ranks: Ranks = ALONE, *, to: To
) -> Iterator[tuple[str, Tensor]]:
    """Yield (Hugging Face name, whole tensor) in the table's order.

    Collective. With to="all" every rank yields every tensor, sent by its owner; with to="first"
    the first rank does, and the others nothing; with to="owner" each rank yields what it owns and
    nothing crosses pipeline stages or expert ranks. A yielded tensor is valid until the next one.
    """
    mine = {p.name: p for p in local}
    owners = _owners(mine, ranks)
    missing = sorted(set(table) - set(owners))
    if missing:
        raise WeightsError(f"No rank holds {some(missing)}. Nothing was exported.")
    for name, rule in table.items():
        beat()
        owner, dtype = owners[name]
        param = mine.get(name)
        parts: tuple[Tensor, ...] | None = None
        if param is not None and _in_owners_group(param, owner, ranks):
            parts = _whole(param, rule)
        wanted = _is_wanted(to, owner, ranks)
        gives = to == "first" and ranks.rank == owner
        if not wanted and not gives:
            continue
        for i, (key, shape) in enumerate(zip(rule.hf, rule.hf_shapes, strict=True)):
            tensor = (
                parts[i].contiguous()
                if parts is not None
                else torch.empty(shape, dtype=dtype, device=ranks.device)
            )
            if to == "all":
                ranks.broadcast(tensor, owner)
            elif to == "first":
                ranks.transfer(tensor, owner, 0)
            if wanted:
                yield key, tensor


def _is_wanted(to: To, owner: int, ranks: Ranks) -> bool:
    """Whether this rank yields what `owner` has."""
    return {"all": True, "first": ranks.rank == 0, "owner": ranks.rank == owner}[to]


def exported_shapes(
    local: Iterable[LocalParam], table: Table, ranks: Ranks = ALONE, *, to: To
) -> dict[str, Shape]:
    """Hugging Face name -> global shape of what `export` yields here, in its order. Collective."""
    owners = _owners({p.name: p for p in local}, ranks)
    return {
        key: shape
        for name, rule in table.items()
        if name in owners and _is_wanted(to, owners[name][0], ranks)
        for key, shape in zip(rule.hf, rule.hf_shapes, strict=True)
    }


def exported_dtypes(
    local: Iterable[LocalParam], table: Table, ranks: Ranks = ALONE
) -> dict[str, torch.dtype]:
    """Hugging Face name -> dtype of all that is exported, on every rank. Collective."""
    owners = _owners({p.name: p for p in local}, ranks)
    return {key: owners[name][1] for name in table if name in owners for key in table[name].hf}


def _owners(mine: Mapping[str, LocalParam], ranks: Ranks) -> dict[str, tuple[int, torch.dtype]]:
    """name -> (owning global rank, dtype), the same on every rank."""
    owners: dict[str, tuple[int, torch.dtype]] = {}
    everyone = ranks.gather({name: (p.tp_rank, p.tensor.dtype) for name, p in mine.items()})
    for rank, names in enumerate(everyone):
        for name, (tp_rank, dtype) in names.items():
            if tp_rank == 0:
                owners.setdefault(name, (rank, dtype))
    return owners


def _in_owners_group(param: LocalParam, owner: int, ranks: Ranks) -> bool:
    if param.tp_size == 1 or param.tp_group is None:
        return ranks.rank == owner
    return owner in dist.get_process_group_ranks(param.tp_group)


def _whole(param: LocalParam, rule: Rule) -> tuple[Tensor, ...]:
    """The Hugging Face tensors of one weight, whole; takes part in a gather over the
    tensor-parallel group.
    """
    if param.tp_size == 1 or rule.sharding.dim is None:
        return rule.sharding.unpack(param.tensor, param.tp_rank, param.tp_size)
    shards = [
        torch.empty_like(param.tensor, memory_format=torch.contiguous_format)
        for _ in range(param.tp_size)
    ]
    dist.all_gather(shards, param.tensor.contiguous(), group=param.tp_group)
    unpacked = [rule.sharding.unpack(shard, r, param.tp_size) for r, shard in enumerate(shards)]
    return tuple(torch.cat(parts, rule.sharding.dim) for parts in zip(*unpacked, strict=True))
