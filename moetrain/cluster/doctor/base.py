"""What a check is given, and what it answers."""

import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from pathlib import Path

from moetrain.config.recipe import Recipe
from moetrain.layout import memory
from moetrain.models import Model, Rule
from moetrain.run import dry_run

GIB = 2**30


class Level(IntEnum):
    """How a check came out; the worst of all decides the exit code."""

    OK = 0
    SKIP = 1  # could not be looked at here, which is no fault
    WARN = 2
    FAIL = 3


EXIT_CODES = {Level.OK: 0, Level.SKIP: 0, Level.WARN: 1, Level.FAIL: 2}


@dataclass(frozen=True)
class Finding:
    """One line. `remedy` is what to do about a warning or a failure."""

    level: Level
    text: str
    remedy: str = ""


def ok(text: str) -> Finding:
    return Finding(Level.OK, text)


def skip(text: str) -> Finding:
    return Finding(Level.SKIP, text)


def warn(text: str, remedy: str) -> Finding:
    return Finding(Level.WARN, text, remedy)


def fail(text: str, remedy: str) -> Finding:
    return Finding(Level.FAIL, text, remedy)


def worst(findings: Sequence[Finding], otherwise: str) -> Finding:
    """The worst of several things one check looked at; `otherwise` is its line when none is bad."""
    bad = [finding for finding in findings if finding.level >= Level.WARN]
    if not bad:
        return ok(otherwise)
    first = max(bad, key=lambda finding: finding.level)
    return Finding(first.level, "; ".join(finding.text for finding in bad), first.remedy)


def node_name(environ: Mapping[str, str] = os.environ) -> str:
    """This node: by Slurm's name where there is one, since several may run on one machine."""
    return environ.get("SLURMD_NODENAME") or platform.node()


@dataclass(frozen=True)
class Planned:
    """A recipe and what follows from it without a model. Raises ConfigError or LayoutError."""

    recipe: Recipe
    num_procs: int | None  # ranks that are there or asked for; None: what the recipe says

    @cached_property
    def num_ranks(self) -> int:
        return dry_run.world_size(self.recipe, self.num_procs)

    @cached_property
    def ranks_of_a_node(self) -> int:
        return min(self.num_ranks, self.recipe.cluster.gpus_per_node)

    @cached_property
    def num_nodes(self) -> int:
        return self.recipe.cluster.nodes or -(-self.num_ranks // self.recipe.cluster.gpus_per_node)

    @cached_property
    def model(self) -> Model:
        """A published model need not be here."""
        return dry_run.check(self.recipe, self.num_ranks, dry=True)

    @cached_property
    def learns(self) -> Mapping[str, Rule]:
        """The table of what is trained: a checkpoint holds its optimizer state."""
        return memory.trained(self.recipe, self.model)


@dataclass
class Subject:
    """What is examined: this machine, and a recipe if one was given.

    `ranks` is None where one process looks alone.
    """

    plan: Planned | None
    ranks: "Ranks | None" = None
    recipe_path: Path | None = None
    image: bool = False  # it is an image's packages that are looked at
    meeting: str = ""  # why the ranks did not meet, when they should have

    @property
    def recipe(self) -> Recipe:
        assert self.plan is not None, "asked by a check that needs a recipe"
        return self.plan.recipe


class Ranks:
    """The processes that were started together, which may ask each other. All calls are collective.

    Objects travel over gloo; `nccl` is the group on GPUs, None where not every rank has one.
    """

    def __init__(self, rank: int, world_size: int, seconds: float) -> None:
        import torch
        import torch.distributed as dist

        self.rank, self.world_size, self.seconds = rank, world_size, seconds
        local = int(os.environ.get("LOCAL_RANK", 0))
        has_gpu = torch.cuda.is_available() and local < torch.cuda.device_count()
        gathered = self.gather((node_name(), has_gpu))
        self.nodes = [node for node, _ in gathered]
        self.device = torch.device("cpu")
        self.backend = "gloo"
        if all(gpu for _, gpu in gathered):
            self.backend, self.device = "nccl", torch.device("cuda", local)
            torch.cuda.set_device(self.device)
        self.all = dist.new_group(backend=self.backend)
        self.leaders = sorted(self.nodes.index(node) for node in set(self.nodes))
        self.node_ranks = [r for r, node in enumerate(self.nodes) if node == self.nodes[rank]]
        for leader in self.leaders:  # every rank makes every group
            members = [r for r, node in enumerate(self.nodes) if node == self.nodes[leader]]
            group = dist.new_group(members, backend=self.backend)
            if rank in members:
                self.node = group

    @property
    def leads(self) -> bool:
        """Whether this is the first rank of its node."""
        return self.rank == self.node_ranks[0]

    @property
    def job(self) -> int | None:
        """Ranks of the job that these stand for; None where a launcher on each node has not started
        its ranks yet, so that the recipe says how many they will be.
        """
        return None if len(self.leaders) == self.world_size else self.world_size

    def gather[T](self, value: T) -> list[T]:
        """The value of every rank, on every rank."""
        import torch.distributed as dist

        values: list[T | None] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values  # type: ignore[return-value]

    def barrier(self) -> None:
        import torch.distributed as dist

        dist.barrier()
