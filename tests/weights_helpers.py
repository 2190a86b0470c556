"""A model spread over ranks by hand, without Megatron, for the tests of weights/."""

import resource
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from moetrain.errors import WeightsError
from moetrain.models import Model, Rule, read_model
from moetrain.models.adapter import AdapterSpec, adapter_table
from moetrain.weights.adapter_init import InitialAdapter
from moetrain.weights.dtypes import NAMES
from moetrain.weights.hf_files import Target
from moetrain.weights.peft_reader import PeftReader
from moetrain.weights.peft_writer import write_peft
from moetrain.weights.reader import RandomReader, Reader, SafetensorsReader
from moetrain.weights.side_files import SideFiles
from moetrain.weights.transport import LocalParam, export, exported_dtypes, exported_shapes, load
from moetrain.weights.writer import write_hf


@dataclass(frozen=True)
class Spread:
    """Rank order is tp-dp-pp for most weights and etp-ep-(replicas)-pp for experts'."""

    pp: int = 1
    tp: int = 1
    ep: int = 1
    etp: int = 1


def local_params(
    table: Mapping[str, Rule], model: Model, spread: Spread, dtype: torch.dtype = torch.float32
) -> list[LocalParam]:
    """This rank's shards, all NaN; collective, since it makes the groups."""
    world, rank = dist.get_world_size(), dist.get_rank()
    tp_group, etp_group = _group(spread.tp), _group(spread.etp)
    per_stage = world // spread.pp
    stage, within = divmod(rank, per_stage)
    ep_rank = within // spread.etp % spread.ep
    params: list[LocalParam] = []
    for name, rule in table.items():
        last = spread.pp - 1
        if rule.layer is not None:
            homes = {rule.layer * spread.pp // model.num_layers}
        elif name.startswith("embedding."):
            homes = {0, last} if model.heads.tied else {0}
        else:
            homes = {last}
        if stage not in homes:
            continue
        at: tuple[int, int, ProcessGroup | None] = (rank % spread.tp, spread.tp, tp_group)
        if rule.expert is not None:
            if rule.expert * spread.ep // model.num_experts != ep_rank:
                continue
            at = (rank % spread.etp, spread.etp, etp_group)
        shard = torch.full(rule.local_shape(at[0], at[1]), torch.nan, dtype=dtype)
        params.append(LocalParam(name, shard, *at))
    return params


def _group(size: int) -> ProcessGroup:
    """The group of this rank among groups of `size` neighbours."""
    mine: Any = None
    for first in range(0, dist.get_world_size(), size):
        group = dist.new_group(list(range(first, first + size)))
        if first <= dist.get_rank() < first + size:
            mine = group
    return mine


class AllRanks:
    """What weights/ asks of a world, of all ranks of the process group."""

    @property
    def rank(self) -> int:
        return dist.get_rank()

    @property
    def size(self) -> int:
        return dist.get_world_size()

    device = torch.device("cpu")

    def gather(self, value: Any) -> list[Any]:
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value)
        return found

    def share(self, value: Any, source: int = 0) -> Any:
        return self.gather(value)[source]

    def broadcast(self, values: Tensor, source: int) -> Tensor:
        dist.broadcast(values, source)
        return values

    def transfer(self, values: Tensor, source: int, target: int) -> Tensor:
        if source != target and self.rank == source:
            dist.send(values, target)
        elif source != target and self.rank == target:
            dist.recv(values, source)
        return values


ALL = AllRanks()


class Counting:
    """A reader that counts the elements it gave out."""

    def __init__(self, reader: Reader):
        self.reader, self.num_read = reader, 0
        self.names, self.shape, self.dtype = reader.names, reader.shape, reader.dtype

    def read(self, name: str, slices: tuple[slice, ...]) -> Tensor:
        found = self.reader.read(name, slices)
        self.num_read += found.numel()
        return found


def reader_of(hf: dict[str, Any], folder: Path | None) -> tuple[Model, Reader]:
    """Of a folder, or weights made from scratch."""
    model = read_model(hf)
    if folder is None:
        return model, RandomReader(model, 7, 0.02)
    return model, SafetensorsReader(folder, model)


def start() -> None:
    from moetrain.engine.world import join

    join()


def through_shards(
    hf: dict[str, Any], folder: Path | None, spread: Spread
) -> tuple[dict[str, Tensor], list[str], int, int]:
    """(all that export yields here, names this rank owns, elements read, elements held)."""
    start()
    model, reader = reader_of(hf, folder)
    table, counting = model.table, Counting(reader)
    local = local_params(table, model, spread)
    load(local, table, counting, model)
    owned = [name for name, _ in export(local, table, ALL, to="owner")]
    whole = {name: tensor.clone() for name, tensor in export(local, table, ALL, to="all")}
    brought = {name: tensor.clone() for name, tensor in export(local, table, ALL, to="first")}
    assert brought.keys() == (whole.keys() if dist.get_rank() == 0 else set())
    assert all(torch.equal(whole[name], tensor) for name, tensor in brought.items())
    return whole, owned, counting.num_read, sum(param.tensor.numel() for param in local)


def rewrite(
    hf: dict[str, Any],
    folder: Path,
    out: Path,
    spread: Spread,
    shard_bytes: int,
    failing: int | None = None,
) -> None:
    """Load `folder` into shards and write it to `out`; rank `failing` cannot write 20 kB files."""
    start()
    model, reader = reader_of(hf, folder)
    table = model.table
    local = local_params(table, model, spread)
    load(local, table, reader, model)
    with short_files(20_000 if failing == dist.get_rank() else None):
        write_hf(
            export(local, table, ALL, to="owner"),
            [
                Target(name, NAMES[reader.dtype(name)], shape)
                for name, shape in exported_shapes(local, table, ALL, to="owner").items()
            ],
            out,
            ALL,
            side_files=SideFiles.of(folder),
            config=hf,
            shard_bytes=shard_bytes,
        )


@contextmanager
def short_files(num_bytes: int | None) -> Iterator[None]:
    """The kernel refuses to let this process grow a file beyond `num_bytes` (None: lets it)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft if num_bytes is None else num_bytes, hard))
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def attempt(*args: Any) -> str:
    """What `rewrite` fails with."""
    try:
        rewrite(*args)
    except WeightsError as error:
        return str(error)
    return "it did not fail"


def readapt(
    hf: dict[str, Any],
    base: Path,
    adapter: Path | None,
    out: Path,
    spec: AdapterSpec,
    spread: Spread,
) -> str:
    """Load an adapter (None: one made from seed 3) into shards and write it to `out`; what that
    fails with, or "".
    """
    start()
    model, reader = reader_of(hf, base)
    table = adapter_table(model, spec)
    initial = InitialAdapter(reader, table, 3)
    local = local_params(table, model, spread)
    first = initial if adapter is None else PeftReader(adapter, model, reader)
    load(local, table, first, model)
    try:
        tensors = export(local, table, ALL, to="first")
        dtypes = exported_dtypes(local, table, ALL)
        write_peft(tensors, dtypes, out, table, "base", initial, ranks=ALL)
    except WeightsError as error:
        return str(error)
    return ""
