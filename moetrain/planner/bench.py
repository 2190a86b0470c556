"""Writes a `Gpu` of the device at hand: its operations one by one, its collectives, and what of an
engine's step is neither. All ranks call it.
"""

import datetime
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml
from torch import Tensor

from moetrain import files
from moetrain.config.builtin import MODELS
from moetrain.config.load import recipe_from
from moetrain.config.recipe import Recipe
from moetrain.engine.world import World, open_world
from moetrain.errors import ConfigError
from moetrain.methods import METHODS
from moetrain.planner import measure
from moetrain.planner.calm import calmest
from moetrain.planner.cost import step_seconds
from moetrain.planner.gpu import Gpu, known_gpus
from moetrain.planner.measure import Clock
from moetrain.planner.packs import pack_of
from moetrain.planner.trace import Trace, watched_engine, watched_step
from moetrain.planner.watch import Watch

SMALL, LARGE = 2**10, 2**22  # bytes of messages
STEPS, ROUNDS = 25, 15
WORK, WORK_ON_GPU = 2**20, 2**26  # bytes that are worked on between collectives
TRIES = 6  # at a moment when the machine does nothing else
REPEATED = 8  # collectives of a round
LONGER = (8, 64)  # times the shortest work between them
# The step that launches are counted in: small, so that they are much of it, and large enough that
# its tensors drive what launches them out of a core's own cache, as those of any other do.
_SMALL: dict[str, Any] = {"hidden_size": 256, "moe_intermediate_size": 64, "vocab_size": 1024}
_TOKENS = 160


def main(like: Gpu | None, name: str | None, out: Path) -> None:
    """Measure this machine, and write it to `out`."""
    world = open_world(_recipe().parallel, 0)
    try:
        content = measured(world, like, name)
        if world.is_first:
            text = yaml.safe_dump(content, sort_keys=False, default_flow_style=None, width=100)
            files.write_text(out, text)
            print(f"{out}: measured. `moetrain plan RECIPE --gpu {out}` reckons with it.")
    finally:
        world.close()


def measured(world: World, like: Gpu | None, name: str | None) -> dict[str, Any]:
    """The content of a Gpu's file. Collective.

    like: what has the data sheet's numbers, on a GPU.
    """
    if (like is None) == (world.kind == "nccl"):
        raise ConfigError(
            "bench gpu: --like says which GPU's data sheet holds, so give it on a GPU, and on a CPU"
            f" leave it out. Known: {', '.join(known_gpus())}"
        )
    clock = Clock(world.device)
    how = _how(world)
    content = _operations(clock, like, how)
    content |= _fixed(world, how)
    if world.size > 1:
        content |= _links(world, clock, like, how)
    base = None if like is None else like.model_dump()
    content["name"] = name or how.partition(",")[0]
    content["asynchronous"] = clock.on_gpu
    content["launch_us"] = _number(0, how)
    without_launches = Gpu.model_validate(_complete(content, base))
    content["launch_us"] = _number(
        _launch(without_launches, world) * 1e6, f"{how}: steps of a small model"
    )
    return ({"like": like.name} if like is not None else _complete({}, None)) | content


def _how(world: World) -> str:
    kind = torch.cuda.get_device_name() if world.kind == "nccl" else "a core of a CPU"
    day = datetime.date.today().isoformat()
    command = f"measured by moetrain bench gpu --nproc {world.size}"
    return f"{kind}, {command}, torch {torch.__version__}, {day}"


def _number(value: float, source: str) -> dict[str, Any]:
    return {"value": float(f"{value:.4g}"), "source": source}


def _curve(points: measure.Points, over: float, source: str) -> dict[str, Any]:
    """Rates as shares of `over`."""
    shares = [[float(f"{x:.4g}"), float(f"{y / over:.4g}")] for x, y in points]
    return {"points": shares, "source": source}


def _operations(clock: Clock, like: Gpu | None, how: str) -> dict[str, Any]:
    dtypes = measure.DTYPES if like is None else {"bf16": torch.bfloat16}
    of_expert = measure.expert_seconds(clock)
    rates = measure.rates(clock, dtypes, of_expert)
    content: dict[str, Any] = {"expert_us": _number(of_expert * 1e6, how)}
    if like is None:
        peaks = {name: max(y for _, y in rates["gemm", name]) for name in dtypes}
        memory = max(y for (field, _), own in rates.items() if field == "memory" for _, y in own)
        content["tflops"] = {name: _number(y / 1e12, how) for name, y in peaks.items()}
        content["memory_gbps"] = _number(memory / 1e9, how)
    else:
        peaks = {name: like.peak(name) for name in dtypes}
        memory = like.memory_gbps.value * 1e9
    for (field, key), points in rates.items():
        curve = _curve(points, peaks.get(key, memory), how)
        if key:
            content.setdefault(field, {})[key] = curve
        else:
            content[field] = curve
    content["kernel_us"] = _number(0, "on a CPU an operation takes what its launch takes")
    if clock.on_gpu:
        small = clock.normal(8)
        times = [clock.once(lambda: small + small) for _ in range(ROUNDS)]
        content["kernel_us"] = _number(statistics.median(times) * 1e6, how)
    return content


def _fixed(world: World, how: str) -> dict[str, Any]:
    """Memory, and what of it is not for tensors."""
    if world.kind != "nccl":
        pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        none = _number(0, "a CPU has none")
        names = ("context_mib", "group_mib", "workspace_mib")
        return {"memory_gib": _number(pages / world.size / 2**30, how)} | dict.fromkeys(names, none)
    free, total = torch.cuda.mem_get_info()
    taken = total - free - torch.cuda.memory_reserved()
    return {
        "memory_gib": _number(total / 2**30, how),
        "context_mib": _number(taken / 2**20, f"{how}: with all that this process has loaded"),
    }


def _links(world: World, clock: Clock, like: Gpu | None, how: str) -> dict[str, Any]:
    """Of ranks on one node."""
    rates: dict[str, float] = {}
    least: list[float] = []
    for name, factor, make in _collectives(world):
        small, large = (_between_work(world, clock, make(size))[0] for size in (SMALL, LARGE))
        least.append(small)
        rates[name] = factor * LARGE / max(large - small, 1e-9)
    best = max(rates.values()) if like is None else like.nvlink_gbps.value * 1e9
    shares = {name: _number(rate / best, how) for name, rate in rates.items()}
    latency = _number(statistics.mean(least) * 1e6, how)
    content: dict[str, Any] = {"nvlink_share": shares, "collective_us": latency}
    content["skew"] = _skew(world, clock, statistics.mean(least), how)
    if like is None:
        rate = _number(best / 1e9, how)
        content |= {"nvlink_gbps": rate, "network_gbps": rate}
        content |= {"network_share": shares, "network_us": latency}
        content["dispatch_exposed"] = _number(1, "a CPU has no DeepEP")
        content["gpus_per_node"] = _number(world.size, how)
    return content


def _collectives(world: World) -> list[tuple[str, float, Callable[[int], Callable[[], Any]]]]:
    """(name, share of the bytes that a rank sends, what does it with so many bytes)."""
    n, device = world.size, world.device

    def floats(size: int) -> Tensor:
        return torch.ones(size // 4, device=device)

    def reduce(size: int) -> Callable[[], Any]:
        x = floats(size)
        return lambda: dist.all_reduce(x.fill_(1))

    def gather(size: int) -> Callable[[], Any]:
        whole, part = floats(size), floats(size // n)
        return lambda: dist.all_gather_into_tensor(whole, part)

    def scatter(size: int) -> Callable[[], Any]:
        whole, part = floats(size), floats(size // n)
        return lambda: dist.reduce_scatter_tensor(part, whole)

    def exchange(size: int) -> Callable[[], Any]:
        x, y = floats(size), floats(size)
        return lambda: dist.all_to_all_single(y, x)

    def ring(size: int) -> Callable[[], Any]:
        x, y = floats(size), floats(size)

        def send() -> None:
            ahead, behind = (world.rank + 1) % n, (world.rank - 1) % n
            work = [dist.isend(x, ahead), dist.irecv(y, behind)]
            for each in work:
                assert each is not None, "every rank is of the group"
                each.wait()

        return send

    part = (n - 1) / n
    return [
        *(("allgather", part, gather), ("alltoall", part, exchange), ("send", 1.0, ring)),
        *(("allreduce", 2 * part, reduce), ("reduce_scatter", part, scatter)),
    ]


def _skew(world: World, clock: Clock, least: float, how: str) -> dict[str, Any]:
    """A curve: what ranks wait for each other beside `least`, as a share of the work between."""
    points: measure.Points = []
    for times in LONGER:
        waits = [
            _between_work(world, clock, make(SMALL), times) for _, _, make in _collectives(world)
        ]
        wait, work = (statistics.mean(column) for column in zip(*waits, strict=True))
        points.append([work, max(wait - least, 1e-6)])
    return _curve([[work, wait / work] for work, wait in points], 1, how)


def _between_work(
    world: World, clock: Clock, do: Callable[[], Any], times: int = 1
) -> tuple[float, float]:
    """(seconds of a collective, seconds of the work before each); all ranks do it as often.

    It comes behind work, as in a step: ranks are never quite as fast as each other, and who waits
    on a CPU sleeps and has to be woken. An all-to-all of 1 KiB took 0.2 ms without work between,
    0.4 with 0.2 ms of it, 1.2 with 12 ms.
    """
    x = torch.ones((WORK_ON_GPU if clock.on_gpu else WORK) // 4, device=world.device)

    def work() -> None:
        for _ in range(times):
            x.mul_(1.0).exp_().clamp_(max=1.0)

    def rounds() -> tuple[float, float]:
        rounds_taken: list[tuple[float, float]] = []
        for _ in range(ROUNDS):
            world.barrier()
            start, worked = time.perf_counter(), 0.0
            for _ in range(REPEATED):
                worked += clock.once(work)
                do()
            clock.finish()
            rounds_taken.append((time.perf_counter() - start - worked, worked))
        wait, worked = (
            statistics.median(column) / REPEATED for column in zip(*rounds_taken, strict=True)
        )
        return wait, worked

    return calmest(world, rounds, TRIES)[0][0]


def _launch(gpu: Gpu, world: World) -> float:
    """Seconds that the host takes for an operation: a step of a small model but for what its
    operations and collectives take.
    """
    recipe = _recipe()
    packs = [pack_of(recipe)] * 2
    watch = Watch(world.device)
    with watch:
        engine = watched_engine(recipe, world, watch)
        watched_step(engine, packs, watch)
    trace = Trace(world.rank, world.pp_rank, 0, len(packs), watch.profile)
    method = METHODS[recipe.method.name]
    host_seconds: list[float] = []
    for _ in range(STEPS):
        start = time.thread_time()  # of the host: it does not wait
        engine.step(packs, method)
        host_seconds.append(time.thread_time() - start)
    trace.profile.collectives.clear()
    without = step_seconds(recipe, world.size, [trace], gpu, engine.model, num_micro=len(packs))
    one = gpu.model_copy(update={"launch_us": type(gpu.launch_us)(value=1, source="one")})
    one = one.model_copy(update={"asynchronous": False})
    with_one = step_seconds(recipe, world.size, [trace], one, engine.model, num_micro=len(packs))
    launches = (with_one.total - without.total) * 1e6
    rest = statistics.median(host_seconds) - (0.0 if gpu.asynchronous else without.total)
    return max(0.0, rest) / launches


def _recipe() -> Recipe:
    model = {"hf": MODELS["qwen3-moe-tiny"] | _SMALL, "dtype": "bf16", "init": "random"}
    return recipe_from(
        {
            "run_dir": "none",
            "model": model,
            "method": {"name": "pretrain"},
            "data": {"train": ["none"], "seq_len": _TOKENS},
            "train": {"steps": 1, "global_batch": 2},
        }
    )


def _complete(content: dict[str, Any], base: dict[str, Any] | None) -> dict[str, Any]:
    """With what a rank alone cannot measure."""
    if base is not None:
        return base | content
    alone = _number(1, "not measured: one rank, which talks to none")
    names = (
        "dispatch_exposed",
        "nvlink_gbps",
        "network_gbps",
        "collective_us",
        "network_us",
        "gpus_per_node",
    )
    shares = {"nvlink_share": {"allgather": alone}, "network_share": {"allgather": alone}}
    return dict.fromkeys(names, alone) | shares | content
