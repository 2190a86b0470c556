#!/usr/bin/env python3
"""Answers that a reward model scores a second, of a long-tailed mix of lengths: by a padded model
of transformers in one process (`path`), and by `moetrain serve --reward-model` (`address`), on the
same cores. The sides take turns, so that load on the machine falls on both; seconds of the CPU, of
all processes of a side, are told beside the clock's. Prints a table.
"""

import argparse
import os
import random
import secrets
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

KEY = "REWARD_MODEL_API_KEY"
SHAPE: dict[str, Any] = dict(
    vocab_size=2048, hidden_size=256, num_hidden_layers=6, num_attention_heads=8,
    num_key_value_heads=4, head_dim=32, intermediate_size=512, moe_intermediate_size=192,
    num_experts=16, num_experts_per_tok=4, max_position_embeddings=4096,
)  # fmt: skip
LONGEST = 2048


def answers(num: int) -> list[str]:
    """Log-normal lengths: half of them below about 110 tokens, one in a hundred above 1100."""
    rng = random.Random(0)
    words = ["value", "return", "list", "of", "the", "function", "is", "a", "string", "when"]
    sizes = [min(int(rng.lognormvariate(4.4, 1.0)) + 1, 1800) for _ in range(num)]
    return [" ".join(rng.choice(words) for _ in range(size)) for size in sizes]


def model(folder: Path) -> None:
    """A reward model of random weights, with a tokenizer."""
    from moetrain.data.assets import resolve
    from moetrain.testing.tiny import save_reward_model

    shutil.copytree(resolve("builtin:stdlib-tokenizer", folder.parent), folder)
    save_reward_model("qwen3_moe", folder, **SHAPE)


@contextmanager
def served(folder: Path, num: int, words: list[str]) -> Iterator[tuple[str, list[int]]]:
    """(address, processes) of a server with `num` ranks."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "moetrain", "serve", folder, "--reward-model"]
    command += ["--port", str(port), "--nproc", str(num), f"data.seq_len={LONGEST}", *words]
    env = os.environ | {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // num))}
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=env, text=True) as process:
        try:
            assert process.stdout is not None
            next(line for line in process.stdout if line.startswith("ready"))
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
            yield f"http://127.0.0.1:{port}", [int(pid) for pid in children.split()]
        finally:
            process.terminate()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--answers", type=int, default=192)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--nproc", type=int, default=2)
    parser.add_argument(
        "--threads",
        type=int,
        nargs="+",
        default=[1, os.cpu_count() or 1],
        help="of the padded model, each number a side; on busy cores two wait for each other",
    )
    parser.add_argument("words", nargs="*", help="of the server, such as parallel.ep=2")
    args = parser.parse_args()
    os.environ[KEY] = secrets.token_hex(16)
    import torch

    from moetrain.config.rewards import RewardConfig
    from moetrain.rewards.base import Completion
    from moetrain.rewards.reward_model import RewardModel
    from moetrain.rewards.reward_servers import RewardServers

    asked = [{"role": "user", "content": "What does it return?"}]
    items = [Completion(i, text, {"prompt": asked}) for i, text in enumerate(answers(args.answers))]

    def config(**options: Any) -> RewardConfig:
        own = {"path": str(folder), "max_tokens": LONGEST, **options}
        return RewardConfig(name="reward_model", options=own)

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        model(folder)
        with served(folder, args.nproc, args.words) as (address, ranks):
            padded, servers = RewardModel([config()]), RewardServers([config(address=address)])
            batch = padded.options.batch_size

            def in_batches(threads: int) -> dict[int, Any]:
                torch.set_num_threads(threads)
                parts = [items[i : i + batch] for i in range(0, len(items), batch)]
                return {n: g for part in parts for n, g in padded.grade(part)}

            sides: dict[str, Callable[[], dict[int, Any]]] = {
                f"padded, {batch} at a time, threads: {n}": partial(in_batches, n)
                for n in args.threads
            }
            sides[f"served by {args.nproc} ranks, in packs"] = lambda: dict(servers.grade(items))
            report(sides, args.rounds, ranks, [len(padded.tokens(item)) for item in items])
            servers.close()


def cpu(pids: list[int]) -> float:
    """Seconds of the CPU that this process and others have taken."""
    fields = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split() for pid in pids]
    ticks = sum(int(own[11]) + int(own[12]) for own in fields)
    return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")


def report(
    sides: dict[str, Callable[[], dict[int, Any]]],
    rounds: int,
    ranks: list[int],
    lengths: list[int],
) -> None:
    """Run and print; both sides have to say the same."""
    rates: dict[str, list[float]] = {name: [] for name in sides}
    by_cpu: dict[str, list[float]] = {name: [] for name in sides}
    said: list[list[float]] = []
    for number in range(rounds + 1):
        for name, side in sides.items():
            started, before = time.perf_counter(), cpu(ranks)
            found = side()
            seconds, taken = time.perf_counter() - started, cpu(ranks) - before
            if number:  # the first warms up
                rates[name].append(len(found) / seconds)
                by_cpu[name].append(len(found) / taken)
            else:
                said.append([next(iter(found[i].values.values())) for i in sorted(found)])
    gap = max(max(own) - min(own) for own in zip(*said, strict=True))
    assert gap < 1e-3, gap
    lengths = sorted(lengths)
    print(f"{len(lengths)} answers of {lengths[0]} to {lengths[-1]} tokens, half of them below")
    print(
        f"{lengths[len(lengths) // 2]}, {sum(lengths)} in all; scores differ by {gap:.1g} at most"
    )
    for name, own in rates.items():
        middle, of_cpu = statistics.median(own), statistics.median(by_cpu[name])
        print(f"| {name} | {middle:.1f} ({min(own):.1f} to {max(own):.1f}) | {of_cpu:.1f} |")
    for what, found in (("second", rates), ("CPU second", by_cpu)):
        *others, own = (statistics.median(own) for own in found.values())
        print(f"times as many a {what} as the better of the others: {own / max(others):.2f}")


if __name__ == "__main__":
    main()
