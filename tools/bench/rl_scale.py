"""What a step of reinforcement learning costs outside the model, at the size of
examples/grpo_235b.yaml: 64 prompts with 16 answers of up to 12,288 tokens, with and without the
experts that were chosen in 94 layers.

    python tools/bench/rl_scale.py                        # all answers, no routes
    python tools/bench/rl_scale.py --prompts 16 --routes  # a quarter of them

One process does what the first rank does, and each target's part as if it were sent; then all of
what the ranks do before the first step, with log-probs that no model made. Lengths are log-normal.
Prints seconds, bytes and anonymous memory (RssAnon, the peak of samples).
"""

import argparse
import cProfile
import pstats
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from moetrain.config.load import load_recipe
from moetrain.config.recipe import Recipe
from moetrain.data.groups import GradedAnswer, Group
from moetrain.data.samples import Prompt, Sample
from moetrain.data.trajectories import Trajectory
from moetrain.engine import scatter
from moetrain.layout.mesh import plan_mesh
from moetrain.loops.batch_values import with_targets
from moetrain.loops.learn import all_packs, answer_values, with_known
from moetrain.loops.outline import Outline, outline_of
from moetrain.loops.parts import Packs, Parts
from moetrain.loops.store import Batch, Store
from moetrain.methods import METHODS
from moetrain.methods.base import Out
from moetrain.models import read_model
from moetrain.ops.packed import Packed, pad_to
from moetrain.testing.scattered import bytes_of

EXAMPLE = Path(__file__).parents[2] / "examples" / "grpo_235b.yaml"
HF = {  # what of Qwen3-235B-A22B sets the size of a batch; the rest is small
    "model_type": "qwen3_moe", "vocab_size": 151936, "hidden_size": 128, "num_hidden_layers": 94,
    "num_attention_heads": 64, "num_key_value_heads": 4, "head_dim": 128, "intermediate_size": 128,
    "max_position_embeddings": 40960, "num_experts": 128, "num_experts_per_tok": 8,
    "moe_intermediate_size": 128, "norm_topk_prob": True, "rms_norm_eps": 1e-6,
}  # fmt: skip
METHODS_SHOWN = ("grpo", "ppo", "reinforce_pp")
MEDIAN, SPREAD = 3500, 0.9  # of the lengths of answers


class Clock:
    """Seconds and peak anonymous memory of phases."""

    def __init__(self, *, profiled: bool):
        self.profiled, self.seconds = profiled, dict[str, float]()
        self.start = self.peak = anonymous()
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while True:
            self.peak = max(self.peak, anonymous())
            time.sleep(0.01)

    def phase[T](self, name: str, do: Callable[[], T]) -> T:
        profile = cProfile.Profile()
        started, used = time.perf_counter(), time.process_time()
        out = profile.runcall(do) if self.profiled else do()
        self.seconds[name], used = time.perf_counter() - started, time.process_time() - used
        held = (anonymous() - self.start) / 1e6
        peak = (self.peak - self.start) / 1e6
        print(
            f"{name:34} {self.seconds[name]:7.2f} s, {used:7.2f} of CPU, {held:7.0f} MB, peak"
            f" {peak:.0f}",
            flush=True,
        )
        if self.profiled:
            pstats.Stats(profile).sort_stats("tottime").print_stats(8)
        return out


def anonymous() -> int:
    """Bytes of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no RssAnon")


def batch_of(recipe: Recipe, args: argparse.Namespace) -> Batch:
    """Answers as a rollout engine would give them."""
    rng = np.random.default_rng(0)
    _, rollout = recipe.sampling
    groups: list[Group] = []
    for p in range(args.prompts):
        prompt = Prompt(
            f"p{p}", tuple(rng.integers(0, 150_000, rng.integers(100, 600)).tolist()), {}
        )
        answers: list[GradedAnswer] = []
        for index in range(rollout.group_size):
            drawn = int(rng.lognormal(np.log(MEDIAN), SPREAD)) + 1
            size = rollout.max_tokens if args.longest else min(drawn, rollout.max_tokens)
            shape = (len(prompt.tokens) + size - 1, 94, 8)
            sample = Sample(
                prompt.id,
                index,
                tuple(rng.integers(0, 150_000, size).tolist()),
                tuple(rng.normal(-0.5, 0.3, size).tolist()),
                "word" * size,
                "length" if drawn > size else "stop",
                0,
                rng.integers(0, 128, shape, dtype=np.int16) if args.routes else None,
            )
            answers.append(GradedAnswer(Trajectory.of(sample), float(rng.integers(0, 2)), {}))
        groups.append(Group(prompt, tuple(answers)))
    return Batch(1, tuple(groups), args.prompts, temperature=1.0)


def sent(parts: Parts, steps: Packs, replica: int, stage: int) -> int:
    """Bytes that a target gets: they are put into pieces, as for sending."""
    total = 0

    def carry(values: torch.Tensor) -> torch.Tensor:
        nonlocal total
        total += values.nbytes
        return values

    scatter.send(parts.of_rank(steps, replica, stage), carry, torch.device("cpu"))
    return total


def book(recipe: Recipe, given: Outline, packs: list[Packed]) -> None:
    """What ranks do with log-probs once a model has made them, for these packs."""
    method = METHODS[recipe.method.name]
    assert method.online is not None
    cfg, _ = recipe.sampling
    longest = max(pack.num_tokens for pack in packs)
    batches = [pad_to(pack, longest) for pack in packs]
    rng = torch.Generator().manual_seed(0)
    outs: list[Out] = []
    for pack, batch in zip(packs, batches, strict=True):
        rows = torch.rand(3, batch.num_tokens, generator=rng)[:, : pack.num_tokens]
        outs.append(Out(-rows[0], rows[1], rows[2] if cfg.value_head else None))
    others = [out.logp if cfg.beta else None for out in outs]
    known = with_known(packs, outs, others)
    rewards = answer_values(recipe, method.online, given)["reward"]
    with_targets(known, method.online, cfg, rewards, given.group, None)


def main() -> None:
    parser = argparse.ArgumentParser(description="what a step costs outside the model")
    parser.add_argument("--prompts", type=int, default=64, help="with 16 answers each")
    parser.add_argument("--routes", action="store_true", help="with choices of experts")
    parser.add_argument("--ranks", type=int, default=32)
    parser.add_argument("--longest", action="store_true", help="all answers of 12,288 tokens")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--profile", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    recipe = load_recipe(EXAMPLE, [f"rollout.routing_replay={str(args.routes).lower()}"])
    model, plan = read_model(HF), plan_mesh(recipe.parallel, args.ranks)
    clock = Clock(profiled=args.profile)
    batch = clock.phase("(make answers)", partial(batch_of, recipe, args))
    clock.peak = anonymous()
    known = clock.phase("outline", partial(outline_of, batch))
    print(f"{len(known.lengths)} answers, {int(known.lengths.sum())} tokens")
    online = METHODS[recipe.method.name].online
    assert online is not None
    values = answer_values(recipe, online, known)
    given = replace(known, batch=batch)
    packs = clock.phase("pack", partial(all_packs, recipe, given, values, plan.dp, 128))
    parts = Parts.of(recipe, model, plan.dp)
    targets = [(replica, stage) for stage in range(plan.pp) for replica in range(plan.dp)]
    shares = clock.phase("split", lambda: [sent(parts, packs, *target) for target in targets])
    whole = Parts([range(94)], 1, parts.num_experts, parts.with_routes).of_rank(packs, 0, 0)
    report(shares, clock.peak - clock.start, whole)
    plain = Parts([range(94)], 1, parts.num_experts, with_routes=False).of_rank(packs, 0, 0)
    del whole
    for name in METHODS_SHOWN:
        more = ["method.top_entropy_quantile=0.2"] if name == "reinforce_pp" else []
        other = load_recipe(EXAMPLE, [f"method={{name: {name}, beta: 0.05}}", *more])
        clock.phase(f"before the first step, {name}", partial(book, other, known, plain[0]))
    with tempfile.TemporaryDirectory() as folder:
        clock.phase("write", partial(Store(Path(folder)).write, batch))
    shown = ("outline", "pack", "split", "write", "before the first step, ppo")
    print(f"together, with ppo: {sum(clock.seconds[name] for name in shown):.1f} s")


def report(shares: list[int], peak: int, whole: Packs) -> None:
    """Bytes of the batch, each rank's and the driver's."""
    packs = [pack for step in whole for pack in step]
    num_bytes = bytes_of(whole)
    tokens, even = sum(pack.num_tokens for pack in packs), sum(shares) / len(shares)
    print(
        f"{len(packs)} packs of {tokens} tokens, {num_bytes / 1e6:.0f} MB with choices in bytes\n"
        f"a rank gets {even / 1e6:.0f} MB, at most {max(shares) / 1e6:.0f}:"
        f" {max(shares) / even:.3f} of even\n"
        f"the driver's peak: {peak / 1e6:.0f} MB, {peak / num_bytes:.2f} times the packs"
    )


if __name__ == "__main__":
    main()
