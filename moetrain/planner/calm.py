"""Measuring on a machine that others use too: what was taken while it did least else."""

import os
import time
from collections.abc import Callable
from pathlib import Path

import torch

from moetrain.engine.world import World

CALM = 0.03  # of the machine's cores that others may have
BUSY = (0, 1, 2, 5, 6, 7)  # user, nice, system, interrupts and what another machine took


def calmest[T](
    world: World, do: Callable[[], T], tries: int, wanted: int = 1
) -> list[tuple[T, float]]:
    """The `wanted` results of the calmest of `tries`, with the share of the cores that others had;
    it ends early once so many were calm. Collective.
    """
    taken: list[tuple[T, float]] = []
    while len(taken) < tries and sum(share < CALM for _, share in taken) < wanted:
        world.barrier()
        start, before = time.perf_counter(), _seconds_of_others(world)
        result = do()
        others = _seconds_of_others(world) - before
        cores = (time.perf_counter() - start) * (os.cpu_count() or 1)
        taken.append((result, world.share(max(0.0, others) / cores)))
    return sorted(taken, key=lambda one: one[1])[:wanted]


def _seconds_of_others(world: World) -> float:
    """Of the machine's cores: all that have been used, but for those of the ranks. 0 where the
    kernel does not say. Collective.
    """
    try:
        ticks = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    except OSError:
        return 0.0
    used = sum(int(ticks[i]) for i in BUSY) / os.sysconf("SC_CLK_TCK")
    ours = world.sum(torch.tensor([time.process_time()], dtype=torch.float64))
    return used - float(ours[0])
