#!/usr/bin/env python3
"""Predicted against measured seconds of a step on CPUs: two ranks of one thread, gloo.

    moetrain bench gpu --nproc 2 --out /tmp/cpu.yaml
    python tools/bench/plan.py /tmp/cpu.yaml [--cases 0 3 5] [--json FILE]

The file knows operations, collectives and what of a tiny step is neither; none of these layouts and
shapes. Routing is balanced in both. On a machine that does other things the numbers say nothing.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RANKS, BOUND = 2, 0.2
WARM_UP, STEPS, TRIES = 2, 5, 30  # the calmest steps of so many
WIDE = {"hidden_size": 512, "moe_intermediate_size": 256, "num_hidden_layers": 3}
DEEP = {"hidden_size": 192, "moe_intermediate_size": 64, "num_hidden_layers": 8}
MANY = {"num_experts": 32, "num_experts_per_tok": 4, "moe_intermediate_size": 32}
LORA = {"adapter": {"rank": 8, "target": ["all-linear"]}}
# (parallel, model, tokens of a pack, other sections)
CASES: list[tuple[dict[str, int], dict[str, Any], int, dict[str, Any]]] = [
    ({}, {}, 512, {}),
    ({"ep": 2}, WIDE, 256, {}),
    ({"tp": 2}, {}, 1024, {}),
    ({"tp": 2, "ep": 2}, WIDE, 512, {}),
    ({"pp": 2}, DEEP, 384, {}),
    ({"pp": 2, "vpp": 2}, DEEP, 512, {}),
    ({"cp": 2}, {}, 1024, {}),
    ({"ep": 2}, MANY, 512, {"train": {"recompute": "full"}}),
    ({"ep": 2}, {}, 512, {"method": {"name": "dpo"}}),
    ({"pp": 2}, WIDE, 256, LORA),
]


def recipe_of(number: int) -> Any:
    """The recipe of a case."""
    from moetrain.config.builtin import MODELS
    from moetrain.config.load import recipe_from

    parallel, model, tokens, more = CASES[number]
    content: dict[str, Any] = {
        "run_dir": "none",
        "model": {"hf": MODELS["qwen3-moe-tiny"] | model, "dtype": "bf16", "init": "random"},
        "method": {"name": "pretrain"},
        "data": {"train": ["none"], "seq_len": tokens},
        "train": {"steps": 1, "global_batch": 8, "micro_batch": 1},
        "parallel": parallel,
    }
    content["train"] |= more.get("train", {})
    return recipe_from(content | {key: v for key, v in more.items() if key != "train"})


def packs_of(recipe: Any, plan: Any) -> list[Any]:
    """Full packs of a data-parallel rank, whose tokens go to all experts evenly."""
    import torch

    from moetrain.layout.activations import num_micro_batches
    from moetrain.planner.packs import pack_of

    pack, hf = pack_of(recipe), recipe.model.hf
    layers, k, num = (
        hf[key] for key in ("num_hidden_layers", "num_experts_per_tok", "num_experts")
    )
    chosen = torch.arange(pack.num_tokens * k).view(-1, 1, k) % num + 1
    routes = chosen.expand(-1, layers, -1).int()
    pack = replace(pack, per_token=pack.per_token | {"routes": routes})
    return [pack] * num_micro_batches(recipe, plan)


def predict(gpu: str, numbers: list[int]) -> list[dict[str, Any]]:
    """Seconds of a step of each case, by a trace of each stage."""
    from moetrain.layout.mesh import plan_mesh
    from moetrain.models import read_model
    from moetrain.planner.cost import step_seconds
    from moetrain.planner.gpu import find_gpu
    from moetrain.planner.trace import trace

    found: list[dict[str, Any]] = []
    for number in numbers:
        recipe = recipe_of(number)
        plan = plan_mesh(recipe.parallel, RANKS)
        packs = packs_of(recipe, plan)
        firsts = [stage * RANKS // plan.pp for stage in range(plan.pp)]
        traces = [trace(recipe, rank, RANKS, "cpu", packs) for rank in firsts]
        model = read_model(recipe.model.hf)
        seconds = step_seconds(recipe, RANKS, traces, find_gpu(gpu), model, num_micro=len(packs))
        work = sum(seconds.compute.values()) + seconds.optimizer
        found.append({**vars(seconds), "operations": work})
    return found


def measure(number: int, tries: int = TRIES) -> dict[str, float]:
    """Of this rank: the median step of a case, and what of it its thread computed."""
    import torch

    from moetrain.engine import Engine
    from moetrain.engine.world import open_world
    from moetrain.methods import METHODS
    from moetrain.planner.calm import calmest

    torch.set_num_threads(1)
    recipe = recipe_of(number)
    world = open_world(recipe.parallel, 1)
    engine = Engine(recipe, world)
    packs, method = packs_of(recipe, world.plan), METHODS[recipe.method.name]

    def step() -> tuple[float, float]:
        start, busy = time.perf_counter(), time.thread_time()
        engine.step(packs, method)
        return time.perf_counter() - start, time.thread_time() - busy

    for _ in range(WARM_UP):
        step()
    calm = calmest(world, step, tries, STEPS)
    wall, busy = (statistics.median(column) for column in zip(*(s for s, _ in calm), strict=True))
    world.close()
    return {"measured": wall, "busy": busy, "others": max(share for _, share in calm)}


def both(gpu: str, numbers: list[int]) -> list[dict[str, Any]]:
    """[{case, predicted, measured, ...}]: each case in ranks of its own, since what gloo has of a
    world that was left goes on waking up; predicted in one process, which trains nothing.
    """
    from moetrain.cluster.launch import run_local

    own = [sys.executable, "-W", "ignore", __file__, gpu]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "found.json")
        measured: list[dict[str, float]] = []
        for number in numbers:
            child = ["--cases", str(number), "--child", "measure", "--json", str(out)]
            code = run_local([*own, *child], RANKS)
            if code:
                raise SystemExit(f"plan: a rank failed with exit code {code}")
            measured.append(json.loads(out.read_text()))
        child = ["--cases", *map(str, numbers), "--child", "predict", "--json", str(out)]
        subprocess.run([*own, *child], check=True)
        predicted = json.loads(out.read_text())
    return [
        {"case": n, **seconds, **one}
        for n, seconds, one in zip(numbers, measured, predicted, strict=True)
    ]


def show(rows: list[dict[str, Any]]) -> bool:
    """Print them; whether all are within the bound."""
    head = "layout | model, tokens | measured s | predicted s | residual | computing | residual"
    print(f"| {head} | others |")
    print("|---|---|---|---|---|---|---|---|")
    worst = 0.0
    for row in rows:
        parallel, model, tokens, more = CASES[row["case"]]
        residual = row["total"] / row["measured"] - 1
        worst = max(worst, abs(residual))
        layout = " ".join(f"{k}{v}" for k, v in parallel.items()) or "dp2"
        extra = "".join(f", {json.dumps(v)}" for v in more.values())
        name = {id(WIDE): "wide", id(DEEP): "deep", id(MANY): "32 experts"}.get(id(model), "tiny")
        seconds = f"{row['measured']:.3f} | {row['total']:.3f}"
        seconds += f" | {residual:+.1%} | {row['busy']:.3f}"
        computing = f"{row['operations'] / row['busy'] - 1:+.1%} | {row['others']:.0%}"
        print(f"| {layout} | {name}, {tokens}{extra} | {seconds} | {computing} |")
    print(f"worst {worst:.1%}, bound {BOUND:.0%}")
    return worst <= BOUND


def main() -> int:
    """0 where all are within the bound."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("gpu", help="what moetrain bench gpu wrote")
    parser.add_argument("--cases", nargs="+", type=int, default=list(range(len(CASES))))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", choices=["measure", "predict"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    sys.path.insert(0, str(ROOT))
    if args.child:
        is_rank = args.child == "measure"
        found = measure(args.cases[0]) if is_rank else predict(args.gpu, args.cases)
        if os.environ.get("RANK", "0") == "0":
            args.json.write_text(json.dumps(found))
        return 0
    rows = both(args.gpu, args.cases)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))
    return 0 if show(rows) else 1


if __name__ == "__main__":
    sys.exit(main())
