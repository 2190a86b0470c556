"""The ranks of a run as one object: the device, the mesh of process groups, and agreement.

Three kinds: `nccl` on GPUs, `gloo` on CPUs, and `meta`, where one process is any rank of any layout
and nothing has values.
"""

import datetime
import math
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from torch import Tensor
from torch.distributed import ProcessGroup

from moetrain import garbage
from moetrain.config.recipe import ParallelConfig
from moetrain.engine import compat_meta, device, meeting, scatter
from moetrain.engine.axis_groups import shared_by_ranks
from moetrain.engine.scheduling import non_preempting_threads
from moetrain.errors import MoetrainError
from moetrain.layout.mesh import MeshPlan, plan_mesh
from moetrain.ops.reduce import add_up, largest
from moetrain.pulse import beat

T = TypeVar("T")
ROUND = 2.0  # seconds between two heartbeats of ranks that wait for the first
type Kind = Literal["nccl", "gloo", "meta"]


@dataclass(frozen=True)
class World:
    """Sizes of the axes in `plan`, this rank's coordinates, and the groups that it talks over.

    What is collective says so: all ranks call it in the same order.
    """

    kind: Kind
    device: torch.device
    plan: MeshPlan
    rank: int
    size: int
    tp_rank: int
    pp_rank: int
    ep_rank: int
    etp_rank: int
    cp_rank: int
    dp_rank: int
    dp_size: int
    tp_group: ProcessGroup
    etp_group: ProcessGroup
    cp_group: ProcessGroup
    tp_cp_group: ProcessGroup
    pp_group: ProcessGroup
    dp_group: ProcessGroup

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pp_rank == self.plan.pp - 1

    @property
    def adds_loss(self) -> bool:
        """Whether this rank adds the loss of its data once: one rank per data-parallel replica
        does.
        """
        return self.is_last_stage and self.tp_rank == 0 and self.cp_rank == 0

    # Numbers

    def sum(self, values: Tensor, group: ProcessGroup | None = None) -> Tensor:
        """The sum over the group's ranks (None: all), where `values` lie (on meta: there).
        Collective.
        """
        return self._back(add_up(self._on_device(values), group), values)

    def max(self, values: Tensor, group: ProcessGroup | None = None) -> Tensor:
        """As `sum`, elementwise maxima. Collective."""
        return self._back(largest(self._on_device(values), group), values)

    def _on_device(self, values: Tensor) -> Tensor:
        return values.to(self.device, copy=True).contiguous()

    def _back(self, reduced: Tensor, values: Tensor) -> Tensor:
        return reduced if self.kind == "meta" else reduced.to(values.device)

    def max_counts(self, *counts: int) -> list[int]:
        """The largest of all ranks, of each count. Collective."""
        if self.kind == "meta":
            return list(counts)
        return [int(n) for n in self.max(torch.tensor(counts)).tolist()]

    def any(self, here: bool) -> bool:
        """Whether it is so on any rank. Collective."""
        return bool(self.max_counts(int(here))[0])

    def all(self, here: bool) -> bool:
        """Whether it is so on every rank. Collective."""
        return not self.any(not here)

    def broadcast(self, values: Tensor, source: int) -> Tensor:
        """What rank `source` has, in `values`, which is contiguous. Collective."""
        if self.size > 1:
            dist.broadcast(values, source)
        return values

    def transfer(self, values: Tensor, source: int, target: int) -> Tensor:
        """What rank `source` has, in rank `target`'s `values`; both contiguous. Of those two."""
        if source != target:
            if self.rank == source:
                dist.send(values, target)
            elif self.rank == target:
                dist.recv(values, source)
        return values

    def from_last_stage(self, values: Tensor) -> Tensor:
        """What the last stage of this rank's pipeline has, in `values`. Collective."""
        if self.plan.pp > 1:
            dist.broadcast(values, group_src=self.plan.pp - 1, group=self.pp_group)
        return values

    # Objects, which are pickled

    def gather(self, value: T) -> list[T]:
        """Every rank's value, on every rank. Collective."""
        if self.size == 1 or self.kind == "meta":
            return [value] * self.size
        gathered: list[Any] = [None] * self.size
        dist.all_gather_object(gathered, value)
        return gathered

    def to_first(self, value: T) -> list[T] | None:
        """Every rank's value on the first rank, None on others. Collective."""
        if self.size == 1 or self.kind == "meta":
            return [value] * self.size
        gathered: list[Any] | None = [None] * self.size if self.is_first else None
        dist.gather_object(value, gathered)
        return gathered

    def share(self, value: T, source: int = 0) -> T:
        """What rank `source` gives, on every rank. Collective."""
        if self.size == 1 or self.kind == "meta":
            return value
        box: list[Any] = [value]
        dist.broadcast_object_list(box, src=source, device=self.device)
        return box[0]

    def scatter(self, part: Callable[[int, int], T]) -> T:
        """What `part` (data-parallel rank, stage) gives on the first rank, on the ranks of that
        replica and stage; its tensors lie on the host. The first rank alone calls it, for one
        target after the other, and has one part at a time beside its own. Collective.
        """
        if self.size == 1 or self.kind == "meta":
            return part(self.dp_rank, self.pp_rank)
        if not self.is_first:
            return scatter.receive(partial(self._carry, self.dp_rank, self.pp_rank), self.device)
        first_part = part(self.dp_rank, self.pp_rank)
        if self.tp_cp_group.size() > 1:
            scatter.send(first_part, partial(self._carry, self.dp_rank, self.pp_rank), self.device)
        for stage in range(self.plan.pp):
            for replica in range(self.dp_size):
                if (replica, stage) != (self.dp_rank, self.pp_rank):
                    carry = partial(self._carry, replica, stage)
                    scatter.send(part(replica, stage), carry, self.device)
        return first_part

    def _carry(self, replica: int, stage: int, values: Tensor) -> Tensor:
        """From the first rank to one of the target's, and from there to its tensor and context
        ranks. Of these and the first.
        """
        leader = self.plan.tp * self.plan.cp * (replica + self.dp_size * stage)
        self.transfer(values, 0, leader)
        is_mine = (replica, stage) == (self.dp_rank, self.pp_rank)
        if is_mine and self.tp_cp_group.size() > 1:
            dist.broadcast(values, group_src=0, group=self.tp_cp_group)
        return values

    # Agreement

    def first(self, do: Callable[[], T]) -> T:
        """What `do` gives on the first rank, which alone does it; its MoetrainError on every rank.
        Collective.
        """
        problem, result = None, None
        if self.is_first or self.kind == "meta":
            try:
                result = do()
            except MoetrainError as error:
                problem = error
        problem, result = self.share((problem, result))
        if problem is not None:
            raise problem
        return result  # type: ignore[return-value]

    def first_slowly(self, do: Callable[[], T]) -> T:
        """As `first`, for what takes minutes and is no collective itself: the other ranks wait in
        rounds of ROUND seconds, so no collective waits for long, and the watchdog hears all of
        them. `do` runs in a thread. Collective.
        """
        with ThreadPoolExecutor(1) as pool:
            work = pool.submit(do) if self.is_first else None

            def ended() -> bool:
                assert work is not None
                return bool(wait([work], ROUND).done)

            while not self.first(ended):
                beat()
            return self.first(lambda: work.result() if work is not None else do())

    def agree(self, problem: MoetrainError | None) -> None:
        """Raise the first rank's problem on every rank, where any has one. Collective."""
        for each in self.gather(problem):
            if each is not None:
                raise each

    def together(
        self,
        do: Callable[[], T],
        describe: Callable[[BaseException], MoetrainError],
        errors: type[BaseException] | tuple[type[BaseException], ...] = Exception,
    ) -> T:
        """What `do` gives here; when it fails on one rank with one of `errors`, every rank raises
        what `describe` makes of it. Collective.
        """
        problem: MoetrainError | None = None
        given: Any = None
        try:
            given = do()
        except errors as error:
            problem = describe(error)
        self.agree(problem)
        return given

    def barrier(self) -> None:
        """Wait for all ranks. Collective."""
        if self.kind != "meta":
            dist.barrier()

    def close(self) -> None:
        """Leave it. Collective."""
        leave()


def is_lost(error: RuntimeError) -> bool:
    """Whether a collective failed because another rank is gone."""
    return isinstance(error, dist.DistError) or "/gloo/" in str(error)


def join(*, far: bool = False) -> tuple[Kind, torch.device]:
    """Join the process group that RANK and WORLD_SIZE name, one process without them; far: of
    `meeting.join`.
    """
    garbage.all_imported()
    device_here = device.prepare()
    kind: Kind = "nccl" if device_here.type == "cuda" else "gloo"
    if not dist.is_initialized():
        with non_preempting_threads() if kind == "gloo" else nullcontext():
            meeting.join(
                kind,
                int(os.environ.get("RANK", 0)),
                int(os.environ.get("WORLD_SIZE", 1)),
                datetime.timedelta(minutes=timeout_minutes()),
                device_here if kind == "nccl" else None,
                far=far,
            )
    return kind, device_here


def timeout_minutes() -> float:
    """How long a collective may take: the launcher gives what its watchdog waits for, and more."""
    return float(os.environ.get("MOETRAIN_TIMEOUT_MINUTES", 10))


def leave() -> None:
    """Leave the process group; another world can be opened after it."""
    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


def open_world(parallel: ParallelConfig, seed: int, *, far: bool = False) -> World:
    """`join`, and make Megatron's groups for `parallel`. Raises LayoutError when the layout does
    not divide the ranks.
    """
    return with_groups(*join(far=far), parallel, seed)


def meta_world(
    parallel: ParallelConfig, rank: int, size: int, stands_for: Literal["cpu", "cuda"] = "cpu"
) -> World:
    """Rank `rank` of `size` in one process, without values, with the kernels of a device that it
    `stands_for`. What it changes in torch and Megatron stays changed: a process that has opened one
    trains nothing afterwards.
    """
    meta_device = compat_meta.install(rank, size, stands_for)
    return with_groups("meta", meta_device, parallel, 0)


@contextmanager
def _gloo_groups() -> Iterator[None]:
    with non_preempting_threads(), shared_by_ranks():
        yield


def with_groups(kind: Kind, own: torch.device, parallel: ParallelConfig, seed: int) -> World:
    """The world of a process group that is there, with Megatron's groups for `parallel`."""
    plan = plan_mesh(parallel, dist.get_world_size())
    ps = parallel_state
    if ps.model_parallel_is_initialized():
        ps.destroy_model_parallel()
    with _gloo_groups() if kind == "gloo" else nullcontext():
        ps.initialize_model_parallel(
            tensor_model_parallel_size=plan.tp,
            pipeline_model_parallel_size=plan.pp,
            virtual_pipeline_model_parallel_size=plan.vpp if plan.vpp > 1 else None,
            context_parallel_size=plan.cp,
            expert_model_parallel_size=plan.ep,
            expert_tensor_parallel_size=plan.etp,
            create_gloo_process_groups=kind == "nccl",
            # Megatron's own 30 would end what the launcher's watchdog still waits for.
            distributed_timeout_minutes=max(30, math.ceil(timeout_minutes())),
        )
    model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
    return World(
        kind=kind,
        device=own,
        plan=plan,
        rank=dist.get_rank(),
        size=dist.get_world_size(),
        tp_rank=ps.get_tensor_model_parallel_rank(),
        pp_rank=ps.get_pipeline_model_parallel_rank(),
        ep_rank=ps.get_expert_model_parallel_rank(),
        etp_rank=ps.get_expert_tensor_parallel_rank(),
        cp_rank=ps.get_context_parallel_rank(),
        dp_rank=ps.get_data_parallel_rank(),
        dp_size=ps.get_data_parallel_world_size(),
        tp_group=ps.get_tensor_model_parallel_group(),
        etp_group=ps.get_expert_tensor_parallel_group(),
        cp_group=ps.get_context_parallel_group(),
        tp_cp_group=ps.get_tensor_and_context_parallel_group(),
        pp_group=ps.get_pipeline_model_parallel_group(),
        dp_group=ps.get_data_parallel_group(),
    )
