#!/usr/bin/env python3
"""Predicted against published throughput of training on H100: two figures fit, the others predict.

    python tools/bench/calibrate.py FOLDER

Traces are kept in FOLDER. What the peers' runs have and a trace here has not is said in `RUNS`:
their layouts' uneven stages are ours without vpp, and the bubble is theirs; Transformer Engine's
kernels (`roofline.FUSIONS`); the cross-entropy that keeps its logits; launches by CUDA graphs.
"""

import argparse
import pickle
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(Path(__file__).parent))
BIG = {
    **{"hidden_size": 4096, "intermediate_size": 12288, "moe_intermediate_size": 1536},
    **{"num_attention_heads": 64, "num_hidden_layers": 94},
}


@dataclass(frozen=True)
class Run:
    """A published run.

    stages: that are traced, each standing for those up to the next.
    overlap: the dispatcher's traffic runs beside another micro-batch's computation.
    """

    name: str
    source: str
    gpus: int
    parallel: dict[str, int]
    hf: dict[str, Any]
    seq: int
    num_micro: int
    published: float  # TFLOP/s a GPU
    nvlink: float | None = None  # GB/s one way
    stages: tuple[int, ...] = (0,)
    vpp: int = 1
    flex: bool = False
    overlap: bool = False
    recompute: str = "none"


ARCHIVE = "Megatron-Bridge"
RUNS = {
    "30B": Run(
        *("30B, 16 H100, HybridEP, CUDA graphs, forced balance", ARCHIVE, 16, {"ep": 16}, {}),
        *(4096, 64, 299.4),
        flex=True,
    ),
    "30B natural": Run(
        *("the same, natural routing", f"{ARCHIVE}, its card", 16, {"ep": 16}, {}),
        *(4096, 64, 199.1),
        flex=True,
    ),
    "235B": Run(
        *("235B, 256 H100, DeepEP, 1F1B overlap, forced balance", "Megatron-MoE-ModelZoo", 256),
        *({"tp": 2, "pp": 8, "ep": 32}, BIG, 4096, 128, 276.0),
        stages=(0, 1, 7),
        vpp=4,
        flex=True,
        overlap=True,
    ),
    "235B H800": Run(
        *("235B, 256 H800, selective recompute, forced balance", "Pai-Megatron-Patch #658", 256),
        *({"tp": 2, "pp": 32, "ep": 8}, BIG, 4096, 512, 217.0),
        nvlink=200.0,
        stages=(0, 1, 31),
        vpp=3,
        recompute="selective",
    ),
}
FIT = ("30B", "30B natural")


def recipe_of(run: Run) -> Any:
    """Its layout, with a micro-batch a step."""
    from gpu_step import QWEN3_30B_A3B

    from moetrain.config.load import recipe_from

    return recipe_from(
        {
            "run_dir": "none",
            "model": {"hf": QWEN3_30B_A3B | run.hf, "dtype": "bf16", "init": "random"},
            "method": {"name": "pretrain"},
            "data": {"train": ["none"], "seq_len": run.seq},
            "train": {"steps": 1, "global_batch": run.gpus, "recompute": run.recompute},
            "megatron": {"moe_token_dispatcher_type": "flex"} if run.flex else {},
            "parallel": run.parallel,
        }
    )


def traced(name: str, folder: Path) -> list[Any]:
    """Of its stages, made once, in a process of its own."""
    path = folder / f"{name.replace(' ', '-')}.pickle"
    if not path.exists():
        own = [sys.executable, "-W", "ignore", __file__, str(folder), "--trace", name]
        subprocess.run(own, check=True)
    return pickle.loads(path.read_bytes())


def trace(name: str, folder: Path) -> None:
    """Write the traces of a run."""
    from moetrain.planner.packs import pack_of
    from moetrain.planner.trace import trace as of_rank

    run = RUNS[name]
    recipe = recipe_of(run).model_copy(update={"megatron": {}})  # DeepEP has no kernels on meta
    ranks = [stage * run.gpus // recipe.parallel.pp for stage in run.stages]
    found = [of_rank(recipe, rank, run.gpus, packs=[pack_of(recipe)]) for rank in ranks]
    (folder / f"{name.replace(' ', '-')}.pickle").write_bytes(pickle.dumps(found))


def without_second_logits(traces: list[Any]) -> None:
    """Megatron's cross-entropy keeps the logits that ours makes again for the backward pass."""
    for one in traces:
        ops = one.profile.ops
        head = [op for op in ops if op.part == "head" and op.name == "exp_"]
        for like in head:
            logits = like.shapes[-1]
            for op in [op for op in ops if op.part == "backward" and op.shapes[-1] == logits]:
                if op.name in ("mm", "sub_", "exp_"):
                    del ops[op]


def predict(run: Run, traces: list[Any], exposed: float, load: float = 1.0) -> Any:
    """Seconds with so much of a dispatcher's traffic waited for."""
    from moetrain.models import read_model
    from moetrain.planner.cost import step_seconds
    from moetrain.planner.gpu import Number, find_gpu

    recipe = recipe_of(run)
    gpu, fit = find_gpu("H100-80GB"), "this fit"
    numbers = {"launch_us": 0.0, "dispatch_exposed": 0.0 if run.overlap else exposed}
    if run.nvlink is not None:
        numbers["nvlink_gbps"] = run.nvlink
    gpu = gpu.model_copy(update={k: Number(value=v, source=fit) for k, v in numbers.items()})
    return step_seconds(
        *(recipe, run.gpus, traces, gpu, read_model(recipe.model.hf)),
        **{"num_micro": run.num_micro, "load": load, "fused": True, "vpp": run.vpp},
    )


def solve(reached: Any, wanted: float, low: float, high: float) -> float:
    """Where `reached`, which falls, is `wanted`; an end of the range where it is nowhere."""
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if reached(middle) > wanted else (low, middle)
    return (low + high) / 2


def main() -> int:
    """Print the fit, and published beside predicted."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="of the traces")
    parser.add_argument("--trace", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.trace:
        trace(args.trace, args.folder)
        return 0
    found = {name: traced(name, args.folder) for name in RUNS}
    for traces in found.values():
        without_second_logits(traces)
    runs = {name: (run, found[name]) for name, run in RUNS.items()}
    first, second = (runs[name] for name in FIT)
    exposed = solve(lambda x: predict(*first, x).tflops, first[0].published, 0.0, 1.0)
    load = solve(lambda x: predict(*second, exposed, x).tflops, second[0].published, 1.0, 8.0)
    print(f"fitted: dispatch_exposed {exposed:.3f}, natural load {load:.2f}\n")
    print("| run | published | predicted | residual | |\n|---|---|---|---|---|")
    for name, (run, traces) in runs.items():
        own = predict(run, traces, exposed, load if name == FIT[1] else 1.0)
        residual = own.tflops / run.published - 1
        use = "fits" if name in FIT else "predicted"
        print(
            f"| {run.name} ({run.source}) | {run.published:.1f} | {own.tflops:.1f} | "
            f"{residual:+.1%} | {use} |"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
