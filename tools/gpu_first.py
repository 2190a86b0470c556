#!/usr/bin/env python3
"""The first minutes on a GPU: what only a GPU can show, the riskiest first, and a table of it.

    python tools/gpu_first.py 10min

`make gpu FIRST=10min` calls it. Each row of the table is one command, which can be run alone. What
no longer fits, or needs what this machine has not (a second GPU, vLLM), stays unproven, and the
table says so. docs/production.md says what is proved without a GPU.
"""

import importlib.util
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PYTHON = ".venv/bin/python"


@dataclass(frozen=True)
class Check:
    """What is shown, the command that shows it, and the seconds that it may take."""

    claim: str
    command: str
    seconds: int
    needs: tuple[str, ...] = ()


def _tests(words: str) -> str:
    return f'{PYTHON} -m pytest -q -m gpu tests/test_gpu.py -k "{words}"'


CHECKS = [
    Check("te backend: kernels, bf16 follows fp32", _tests("follow_fp32 and te"), 120, ("te",)),
    Check("torch backend: fp32 gradients on CUDA", _tests("gradients_equal"), 60),
    Check("torch backend: flash attention, grouped matmul", _tests("follow_fp32 and torch"), 60),
    Check("checkpoints on CUDA, te", _tests("restored and te"), 90, ("te",)),
    Check("checkpoints on CUDA, torch", _tests("restored and torch"), 60),
    Check("weights in and out", _tests("round_trip"), 30),
    Check("memory and speed of a slice of 30B", f"{PYTHON} tools/bench/gpu_step.py", 120),
    Check("deterministic mode", _tests("deterministic"), 60),
    Check("recomputation, optimizer on the host", _tests("savers or offloaded"), 60),
    Check("NCCL: every group of a layout", ".venv/bin/moetrain doctor --nproc 2", 60, ("2 GPUs",)),
    Check(
        "weights to vLLM by CUDA IPC, sleep mode, graphs",
        ".venv/bin/moetrain train examples/grpo_tiny.yaml rollout.engine=vllm",
        300,
        ("vLLM",),
    ),
]


def _missing() -> set[str]:
    """What this machine has not."""
    import torch

    num = torch.cuda.device_count()
    has = {
        "GPU": num > 0,
        "2 GPUs": num > 1,
        "te": importlib.util.find_spec("transformer_engine") is not None,
        "vLLM": (ROOT / ".venv-vllm" / "bin" / "python").exists(),
    }
    return {name for name, here in has.items() if not here}


def run(check: Check, left: float) -> str:
    """What came of it: "shown", or why not."""
    log = ROOT / "build" / "gpu_first.log"
    log.parent.mkdir(exist_ok=True)
    with log.open("a") as file:
        file.write(f"\n$ {check.command}\n")
        file.flush()
        try:
            done = subprocess.run(
                check.command, shell=True, cwd=ROOT, stdout=file, stderr=file, timeout=left
            )
        except subprocess.TimeoutExpired:
            return "out of time"
    if done.returncode == 0:
        return "shown"
    return "no test of this name" if done.returncode == 5 else f"FAILED ({log.name})"


def table(
    minutes: float,
    missing: set[str],
    run: Callable[[Check, float], str],
    clock: Callable[[], float] = time.monotonic,
) -> list[tuple[str, str, int, str]]:
    """(claim, what came of it, seconds, command) of every check, within so many minutes."""
    end = clock() + 60 * minutes
    rows: list[tuple[str, str, int, str]] = []
    for check in CHECKS:
        started = clock()
        lacking = [need for need in ("GPU", *check.needs) if need in missing]
        if lacking:
            found = f"unproven: no {lacking[0]}"
        elif end - started < check.seconds:
            found = "unproven: out of time"
        else:
            found = run(check, end - started)
        rows.append((check.claim, found, round(clock() - started), check.command))
    return rows


def main(given: str) -> int:
    minutes = re.fullmatch(r"(\d+)(?:min)?", given)
    if minutes is None:
        print(f"FIRST={given}: give minutes, such as FIRST=10min")
        return 2
    rows = table(int(minutes[1]), _missing(), run)
    print("| what | came of it | seconds | command |\n| --- | --- | --- | --- |")
    for claim, found, seconds, command in rows:
        print(f"| {claim} | {found} | {seconds} | `{command}` |")
    return int(any("FAILED" in found for _, found, *_ in rows))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
