#!/usr/bin/env python3
"""Train a slice of Qwen3-30B-A3B on one GPU and say how fast it goes and where the memory is.

The slice has the real dimensions (hidden 2048, 128 experts of 768, top 8, vocabulary 151,936) and
as many of the 48 layers as fit. Weights and tokens are random, so routing is that of an untrained
router: nobody forces it to be balanced.

    python tools/bench/gpu_step.py [--backend torch|te|both] [--layers N] [--json FILE]

FLOPs are the model's own: forward, and twice that for backward, causal attention counted as half a
square, recomputation not counted. The share of the matmul peak is of the peak measured here. The
whole model's 23.1 GFLOP a token at seq 4096 agree with the published 299.4 TFLOP/s at 13,011
tokens/s.
"""

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

NUM_LAYERS = 48
OUT_OF_MEMORY = 17  # exit code of a child whose slice did not fit
# Bytes per parameter of bf16 training with fp32 gradients, master weights and two moments.
TRAIN_BYTES = 2 + 4 + 4 + 4 + 4

QWEN3_30B_A3B: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "decoder_sparse_step": 1,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "max_position_embeddings": 40960,
    "mlp_only_layers": [],
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": NUM_LAYERS,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
    "vocab_size": 151936,
}

UNPROVEN = """No GPU here, so nothing was measured. What stays unproven on this machine:
  - that the engine trains on CUDA with NCCL at all, with either backend (torch, te)
  - TFLOP/s, share of the matmul peak and tokens/s of a Qwen3-30B-A3B-shaped slice in bf16
  - its peak memory, and how it splits into weights, gradients, optimizer and activations
Run `make gpu` on a machine with one NVIDIA GPU."""


def sizes() -> tuple[int, int, int]:
    """Parameters: (one layer, one layer's that a token meets, embedding and output together)."""
    c = QWEN3_30B_A3B
    hidden, heads, groups, d = (
        c["hidden_size"],
        c["num_attention_heads"],
        c["num_key_value_heads"],
        c["head_dim"],
    )
    attention = hidden * d * (2 * heads + 2 * groups)
    router = hidden * c["num_experts"]
    expert = 3 * hidden * c["moe_intermediate_size"]
    norms = 2 * hidden + 2 * d
    whole = attention + router + c["num_experts"] * expert + norms
    met = attention + router + c["num_experts_per_tok"] * expert
    return whole, met, 2 * c["vocab_size"] * hidden


def flops_per_token(layers: int, seq_len: int) -> float:
    """FLOPs of forward and backward for one token of a sequence of `seq_len`."""
    _, met, vocab = sizes()
    c = QWEN3_30B_A3B
    # Q.K and P.V, each 2 FLOPs for every pair of positions; a causal mask leaves half of them.
    attention = 2 * 2 * c["num_attention_heads"] * c["head_dim"] * seq_len / 2
    return 3 * (layers * (2 * met + attention) + 2 * vocab / 2)


def guess_layers(total_bytes: int, seq_len: int, micro_batch: int) -> int:
    """How many layers should fit, with a tenth of the memory left to the allocator."""
    layer, _, vocab = sizes()
    # About 40 hidden-sized bf16 activations a token and layer, most of them the top 8 experts'.
    activations = seq_len * micro_batch * QWEN3_30B_A3B["hidden_size"] * 2 * 40
    left = 0.9 * total_bytes - vocab * TRAIN_BYTES - 2 * 2**30
    return max(1, min(NUM_LAYERS, int(left / (layer * TRAIN_BYTES + activations))))


def matmul_peak(torch: Any, size: int = 8192, tries: int = 30) -> float:
    """FLOP/s of the best of a few square bf16 products."""
    a = torch.randn(size, size, device="cuda", dtype=torch.bfloat16)
    b = torch.randn(size, size, device="cuda", dtype=torch.bfloat16)
    best = float("inf")
    for _ in range(tries):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        torch.matmul(a, b)
        end.record()
        end.synchronize()
        best = min(best, start.elapsed_time(end) / 1e3)
    return 2 * size**3 / best


def recipe_content(args: argparse.Namespace, layers: int, run_dir: str) -> dict[str, Any]:
    """The recipe of the slice."""
    return {
        "run_dir": run_dir,
        "model": {
            "hf": QWEN3_30B_A3B | {"num_hidden_layers": layers},
            "dtype": "bf16",
            "backend": args.backend,
        },
        "method": {"name": "pretrain"},
        "data": {"train": ["none"], "seq_len": args.seq_len},
        "optim": {"lr": 1e-5, "schedule": "constant"},
        "train": {
            "steps": args.warmup + args.steps,
            "global_batch": args.global_batch,
            "micro_batch": args.micro_batch,
            "recompute": args.recompute,
        },
    }


def random_packs(torch: Any, args: argparse.Namespace) -> list[Any]:
    """A global batch of packs, each one sequence of random tokens."""
    from moetrain.ops.packed import from_tokens

    draw = torch.Generator().manual_seed(0)
    shape = (args.global_batch, args.seq_len)
    rows = torch.randint(QWEN3_30B_A3B["vocab_size"], shape, generator=draw)
    return [from_tokens(row.tolist(), id=f"random {i}") for i, row in enumerate(rows)]


def time_steps(torch: Any, engine: Any, args: argparse.Namespace) -> tuple[float, int, float]:
    """(seconds a step, peak bytes, last loss) over `args.steps` steps after warming up."""
    from moetrain.methods import METHODS

    packs, result = random_packs(torch, args), None
    for _ in range(args.warmup):
        engine.step(packs, METHODS["pretrain"])
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    begin = time.perf_counter()
    for _ in range(args.steps):
        result = engine.step(packs, METHODS["pretrain"])
    torch.cuda.synchronize()
    assert result is not None
    return (
        (time.perf_counter() - begin) / args.steps,
        torch.cuda.max_memory_allocated(),
        result.loss,
    )


def memory_split(torch: Any, engine: Any, peak: int) -> dict[str, int]:
    """Bytes by category: what lives between steps by name, and what the step puts on top of it."""
    weights = sum(p.numel() * p.element_size() for c in engine.chunks for p in c.parameters())
    gradients = 0
    for chunk in engine.wrapped:
        for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers):
            gradients += buffer.grad_data.numel() * buffer.grad_data.element_size()
    lives = torch.cuda.memory_allocated()
    return {
        "weights": weights,
        "gradients": gradients,
        "optimizer": lives - weights - gradients,
        "activations": peak - lives,
        "peak": peak,
    }


def measure(args: argparse.Namespace, layers: int) -> dict[str, Any]:
    """Build the slice, train it, and return the figures."""
    import torch

    from moetrain.config.load import recipe_from
    from moetrain.engine import Engine

    peak_flops = matmul_peak(torch)
    with tempfile.TemporaryDirectory() as run_dir:
        engine = Engine(recipe_from(recipe_content(args, layers, run_dir)))
        seconds, peak, loss = time_steps(torch, engine, args)
        memory = memory_split(torch, engine, peak)
        backend = engine.backend
        engine.close()
    tokens = args.global_batch * args.seq_len
    achieved = tokens * flops_per_token(layers, args.seq_len) / seconds
    return {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "backend": backend,
        "layers": layers,
        "seq_len": args.seq_len,
        "global_batch": args.global_batch,
        "micro_batch": args.micro_batch,
        "recompute": args.recompute,
        "seconds_per_step": seconds,
        "tflops": achieved / 1e12,
        "matmul_tflops": peak_flops / 1e12,
        "share_of_peak": achieved / peak_flops,
        "tokens_per_s": tokens / seconds,
        "loss": loss,
        "memory_gib": {name: size / 2**30 for name, size in memory.items()},
    }


def show(row: dict[str, Any]) -> None:
    """Print one measurement."""
    print(
        f"{row['gpu']}, torch {row['torch']}, backend {row['backend']}: "
        f"{row['layers']} of {NUM_LAYERS} layers, bf16, seq {row['seq_len']}, "
        f"global batch {row['global_batch']}, micro-batch {row['micro_batch']}, "
        f"recompute {row['recompute']}"
    )
    print(f"  {row['tflops']:8.1f} TFLOP/s of the model's own")
    print(
        f"  {row['share_of_peak']:8.1%} of the matmul peak measured here, "
        f"{row['matmul_tflops']:.0f} TFLOP/s"
    )
    print(f"  {row['tokens_per_s']:8.0f} tokens/s, {row['seconds_per_step']:.3f} s a step")
    split = ", ".join(f"{name} {gib:.1f}" for name, gib in row["memory_gib"].items())
    print(f"  peak memory, GiB: {split}", flush=True)


def fit(args: argparse.Namespace, backend: str) -> dict[str, Any] | None:
    """The largest slice that fits. Each try is its own process, so that nothing of it stays."""
    import torch

    total = torch.cuda.get_device_properties(0).total_memory
    guess = guess_layers(total, args.seq_len, args.micro_batch)
    for layers in [args.layers] if args.layers else range(guess, 0, -1):
        with tempfile.NamedTemporaryFile(suffix=".json") as out:
            own = ["--child", out.name, "--layers", str(layers), "--backend", backend]
            names = ("seq_len", "global_batch", "micro_batch", "recompute", "steps", "warmup")
            given = [f"--{n.replace('_', '-')}={getattr(args, n)}" for n in names]
            code = subprocess.run([sys.executable, __file__, *own, *given], check=False).returncode
            if code == 0:
                return json.loads(Path(out.name).read_text())
        if code != OUT_OF_MEMORY:
            raise SystemExit(
                f"gpu_step: the run with backend {backend} failed with exit code {code}"
            )
        print(f"  {layers} layers do not fit", flush=True)
    return None


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backend", choices=["torch", "te", "both"], default="both")
    parser.add_argument("--layers", type=int, help="how many layers; default: as many as fit")
    parser.add_argument("--seq-len", type=int, default=4096)
    parser.add_argument("--global-batch", type=int, default=8, help="sequences a step")
    parser.add_argument("--micro-batch", type=int, default=1, help="sequences a forward")
    parser.add_argument("--recompute", choices=["none", "selective", "full"], default="none")
    parser.add_argument("--steps", type=int, default=8, help="steps timed")
    parser.add_argument("--warmup", type=int, default=3, help="steps before them")
    parser.add_argument("--json", type=Path, help="write the figures there too")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def child(args: argparse.Namespace) -> int:
    """One try, for `fit`."""
    import torch

    try:
        args.child.write_text(json.dumps(measure(args, args.layers)))
    except torch.OutOfMemoryError:
        return OUT_OF_MEMORY
    return 0


def main() -> int:
    """Measure every backend there is; 0 when there is no GPU to measure on."""
    args = parse()
    import torch

    if not torch.cuda.is_available():
        print(UNPROVEN)
        return 0
    if args.child:
        return child(args)
    backends = ["torch", "te"] if args.backend == "both" else [args.backend]
    if args.backend == "both" and importlib.util.find_spec("transformer_engine") is None:
        print("Transformer Engine is not installed: the te backend stays unproven here.")
        backends = ["torch"]
    rows = [row for backend in backends if (row := fit(args, backend))]
    for row in rows:
        show(row)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))
    return 0 if len(rows) == len(backends) else 1


if __name__ == "__main__":
    sys.exit(main())
