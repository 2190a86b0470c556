"""What is measured between ranks: bandwidth of collectives, and how far their clocks differ.

The same code runs over NCCL and over gloo; over gloo, which no link is bought for, it is reported
and not judged.
"""

import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moetrain.cluster.doctor.base import Finding, Level, Ranks, Subject, fail, ok, skip, warn, worst
from moetrain.cluster.doctor.links import (
    FAIL_BELOW,
    WARN_BELOW,
    between_nodes,
    nics_of_node,
    nvlink_of,
    pcie_of,
)
from moetrain.errors import plural

BYTES = {"nccl": 256 * 2**20, "gloo": 4 * 2**20}  # of one collective, on each rank
TIMED = {"nccl": 5, "gloo": 3}
ROUNDS = 8  # of a clock's comparison; the quickest counts
SKEW_WARN, SKEW_FAIL = 1.0, 60.0  # seconds

ALONE = "one process alone: run it under srun or torchrun, or with --nproc 2"


def in_node(subject: Subject) -> Finding:
    """All-reduce and all-to-all between the ranks of each node."""
    ranks = subject.ranks
    if ranks is None:
        return skip(subject.meeting or ALONE)
    sizes = {node: ranks.nodes.count(node) for node in ranks.nodes}
    if min(sizes.values()) < 2:
        return skip(f"{min(sizes.values())} rank on {min(sizes, key=lambda n: sizes[n])}")
    mine = (*bus_bandwidth(ranks, ranks.node, len(ranks.node_ranks)), _local_link(ranks))
    speeds = [ranks.gather(mine)[leader] for leader in ranks.leaders]
    slowest = min(range(len(speeds)), key=lambda n: speeds[n][0])
    reduce, exchange, link = speeds[slowest]
    where = f" on {ranks.nodes[ranks.leaders[slowest]]}, the slowest" if len(speeds) > 1 else ""
    name, gb_s = link
    message = (
        f"all-reduce {reduce:.1f} GB/s, all-to-all {exchange:.1f} GB/s, {ranks.backend}{where}"
    )
    return judged(message, name, [(reduce, gb_s), (exchange, gb_s)], NODE_REMEDY)


def across_nodes(subject: Subject) -> Finding:
    """The same between all ranks, where they stand on several nodes."""
    ranks = subject.ranks
    if ranks is None:
        return skip(subject.meeting or ALONE)
    if len(ranks.leaders) < 2:
        return skip("one node")
    reduce, exchange = bus_bandwidth(ranks, ranks.all, ranks.world_size)
    nics = nics_of_node() if ranks.backend == "nccl" else None
    figures = [gb for gb in ranks.gather(nics.gb_s if nics else None) if gb is not None]
    per_node = len(ranks.node_ranks)
    limits: tuple[float | None, float | None] = (None, None)
    if figures:
        limits = between_nodes(min(figures), per_node, ranks.world_size)
    message = (
        f"all-reduce {reduce:.1f} GB/s, all-to-all {exchange:.1f} GB/s, {ranks.backend}, "
        f"{plural(ranks.world_size, 'rank')} on {plural(len(ranks.leaders), 'node')}"
    )
    name = nics.name if nics else ""
    return judged(message, name, [(reduce, limits[0]), (exchange, limits[1])], NET_REMEDY)


NODE_REMEDY = (
    "look at `nvidia-smi topo -m` and `nvidia-smi nvlink -s`, and run with NCCL_DEBUG=INFO: P2P"
    " may be off (NCCL_P2P_DISABLE, ACS, a container without /dev/shm)"
)
NET_REMEDY = (
    "run with NCCL_DEBUG=INFO and look for NET/IB, not NET/Socket; set NCCL_IB_HCA and"
    " NCCL_SOCKET_IFNAME; leave the slowest node out (sbatch --exclude)"
)


def judged(said: str, link: str, pairs: list[tuple[float, float | None]], remedy: str) -> Finding:
    """A finding by the smallest share of the link that was reached: `pairs` of (measured, link)."""
    shares = [measured / gb_s for measured, gb_s in pairs if gb_s]
    if not shares:
        return ok(f"{said} (not judged: {link or 'no link'} has no figure)")
    share = min(shares)
    said = f"{said}: {100 * share:.0f} % of {link}"
    if share < FAIL_BELOW:
        return fail(said, remedy)
    return warn(said, remedy) if share < WARN_BELOW else ok(said)


def bus_bandwidth(ranks: Ranks, group: Any, size: int) -> tuple[float, float]:
    """(all-reduce, all-to-all) in GB/s as nccl-tests counts it: bytes that cross each rank's link.

    2 (n-1)/n of a rank's bytes for an all-reduce over n ranks, (n-1)/n for an all-to-all.
    """
    import torch
    import torch.distributed as dist

    num = BYTES[ranks.backend] // 4 // size * size
    data = torch.zeros(num, device=ranks.device)
    out = torch.empty_like(data)
    reduce = _seconds(ranks, lambda: dist.all_reduce(data, group=group))
    exchange = _seconds(ranks, lambda: dist.all_to_all_single(out, data, group=group))
    crossing = 4 * num * (size - 1) / size / 1e9
    return 2 * crossing / reduce, crossing / exchange


def _seconds(ranks: Ranks, collective: Callable[[], Any]) -> float:
    """The quickest of several runs after one that sets up connections."""
    import torch

    def once() -> float:
        started = time.perf_counter()
        collective()
        if ranks.device.type == "cuda":
            torch.cuda.synchronize(ranks.device)
        return time.perf_counter() - started

    once()
    return min(once() for _ in range(TIMED[ranks.backend]))


def _local_link(ranks: Ranks) -> tuple[str, float | None]:
    if ranks.backend != "nccl":
        return "gloo", None
    import torch

    try:
        topology = subprocess.run(
            ["nvidia-smi", "topo", "-m"], capture_output=True, text=True, timeout=10, check=False
        ).stdout
    except (OSError, subprocess.TimeoutExpired):
        topology = ""
    properties = torch.cuda.get_device_properties(ranks.device)
    link = nvlink_of(topology, properties.name)
    if link is None or link.gb_s is None:
        bus = f"{properties.pci_domain_id:04x}:{properties.pci_bus_id:02x}"
        link = pcie_of(Path(f"/sys/bus/pci/devices/{bus}:{properties.pci_device_id:02x}.0")) or link
    return (link.name, link.gb_s) if link else ("no link", None)


def clocks(subject: Subject, clock: Callable[[], float] = time.time) -> Finding:
    """How far each node's clock is from the first rank's, and whether this one jumps."""
    jump = abs(clock() - time.monotonic() - _STARTED)
    jumped = (
        warn(f"{node_of(subject)}'s clock moved by {jump:.1f} s while this looked", CLOCK_REMEDY)
        if jump > SKEW_WARN
        else None
    )
    ranks = subject.ranks
    if ranks is None:
        return jumped or skip(f"steady; {subject.meeting or ALONE}")
    offsets = _offsets(ranks, clock)
    node, offset, error = max(offsets, key=lambda found: abs(found[1]))
    message = f"at most {abs(offset) * 1e3:.0f} ms (+- {error * 1e3:.1f}) from the first rank's"
    found = ok(message)
    if abs(offset) > SKEW_WARN:
        ahead = "ahead of" if offset > 0 else "behind"
        message = f"{node}'s clock is {abs(offset):.1f} s {ahead} that of {ranks.nodes[0]}"
        found = (fail if abs(offset) > SKEW_FAIL else warn)(message, CLOCK_REMEDY)
    return worst([found, *([jumped] if jumped else [])], found.text)


_STARTED = time.time() - time.monotonic()
CLOCK_REMEDY = (
    "let the nodes' chrony or ntpd follow one server (chronyc tracking); Slurm's munge refuses"
    " what is 5 minutes off"
)


def node_of(subject: Subject) -> str:
    from moetrain.cluster.doctor.base import node_name

    return subject.ranks.nodes[subject.ranks.rank] if subject.ranks else node_name()


def _offsets(ranks: Ranks, clock: Callable[[], float]) -> list[tuple[str, float, float]]:
    """(node, seconds ahead of rank 0, half the round trip) of each node's first rank.

    As NTP does it: rank 0 asks, and takes its own middle between question and answer.
    """
    import torch
    import torch.distributed as dist

    offsets = [(ranks.nodes[0], 0.0, 0.0)]
    stamp = torch.zeros(1, dtype=torch.float64)
    for leader in (r for r in ranks.leaders if r):
        best = (float("inf"), 0.0)
        for _ in range(ROUNDS):
            if ranks.rank == 0:
                asked = clock()
                dist.send(stamp, leader)
                dist.recv(stamp, leader)
                answered = clock()
                best = min(best, (answered - asked, float(stamp) - (asked + answered) / 2))
            elif ranks.rank == leader:
                dist.recv(stamp, 0)
                stamp[0] = clock()
                dist.send(stamp, 0)
        offsets.append((ranks.nodes[leader], best[1], best[0] / 2))
    return ranks.gather(offsets)[0]


__all__ = ["Level", "across_nodes", "clocks", "in_node", "os"]
