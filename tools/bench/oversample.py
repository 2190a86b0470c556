"""Trajectories a second, and what is learned, where a step takes the answers that end first:
today's way, and `rollout.oversample` with and without `rollout.partial`, on real vLLM, with answers
whose lengths have a long tail.

    python tools/bench/oversample.py FOLDER [--steps 24] [--svg OUT.svg]

--steps 0 reads what is there.

A small model learns to answer with a row of two colours whose length is drawn from a log-normal
distribution (median 15 words, one in a hundred 13 times that); then every side learns by GRPO to
say one of them, which no length helps. Every side is a run with a server of its own, and they take
turns, a step each: a reward that waits for its turn holds a run between sampling and learning, so
that one side alone runs at a time, and whatever else the machine does falls on all of them. The
seconds of grading are the wait, and are left out.
"""

import argparse
import json
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean, median, quantiles
from typing import Any

from rich.console import Console
from rich.table import Table

SIDES: dict[str, tuple[str, ...]] = {
    "all are waited for": (),
    "1.5, late ones are lost": ("rollout.oversample=1.5",),
    "1.5, late ones go on": ("rollout.oversample=1.5", "rollout.partial=true"),
    "2, late ones go on": ("rollout.oversample=2", "rollout.partial=true"),
}
TOPICS = "sea sky sun fog ice ash oak fig hay ivy jam key log map net oil pit rug".split()
REWARD = '''"""The share of "blue" among the words, when it is this run's turn."""

import time
from pathlib import Path

def blue(completions, folder=None, **columns):
    parked, turn = Path(folder, "parked"), Path(folder, "turn")
    parked.touch()
    while not turn.exists():
        time.sleep(0.01)
    turn.unlink()
    parked.unlink()
    return [text.split().count("blue") / max(1, len(text.split())) for text in completions]
'''
WARM = """
run_dir: {folder}/warm
model: {{path: builtin:qwen3-moe-tiny, dtype: fp32}}
method: sft
data: {{train: {folder}/sft.jsonl, seq_len: 1024}}
optim: {{lr: 2e-3, min_lr: 2e-4, warmup: 5}}
train: {{steps: 120, global_batch: 4}}
checkpoint: {{every: 60, export_hf: true}}
observe: {{tensorboard: false}}
"""
LEARN = """
run_dir: {folder}/none
model: {{path: {folder}/warm/hf, dtype: fp32}}
method: grpo
data:
  train: {folder}/prompts.jsonl
  eval: {folder}/held_out.jsonl
  seq_len: 1024
rollout:
  engine: vllm
  engine_args: {{max_model_len: 1024, max_num_batched_tokens: 1024, max_num_seqs: 256}}
  prompts_per_step: 8
  group_size: 8
  max_tokens: 900
  eval_temperature: 1.0
  reward_workers: 1
  reward_seconds: 3600
rewards: [accuracy]
optim: {{lr: 3e-4, schedule: constant, warmup: 0, weight_decay: 0.0}}
train: {{steps: 30}}
checkpoint: {{every: 30, export_hf: false}}
observe: {{tensorboard: false}}
"""


def make(folder: Path) -> None:
    """The data, the recipes and the reward."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(0)

    def asked(number: int) -> str:
        return f"Paint the {rng.choice(TOPICS)} {number}."

    def answer() -> str:
        num = max(1, min(400, round(rng.lognormvariate(2.7, 1.1))))
        return " ".join(rng.choice(["red", "blue"]) for _ in range(num))

    def write(name: str, rows: Iterator[dict[str, Any]]) -> None:
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))

    turns = ({"question": asked(i), "answer": answer()} for i in range(4000))
    said = (("user", "question"), ("assistant", "answer"))
    write(
        "sft.jsonl", ({"messages": [{"role": r, "content": t[k]} for r, k in said]} for t in turns)
    )
    write("prompts.jsonl", ({"prompt": asked(i)} for i in range(5000)))
    write("held_out.jsonl", ({"prompt": asked(i)} for i in range(5000, 5064)))
    (folder / "colours.py").write_text(REWARD)
    (folder / "warm.yaml").write_text(WARM.format(folder=folder))
    (folder / "learn.yaml").write_text(LEARN.format(folder=folder))


def moetrain(*words: str) -> None:
    """Run a command to its end."""
    subprocess.run(
        [sys.executable, "-m", "moetrain", *words], check=True, stdout=subprocess.DEVNULL
    )


def rows(folder: Path, side: str) -> list[dict[str, Any]]:
    """Of a side's ledger; of a step that ran twice the later one."""
    file = folder / slug(side) / "ledger.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return [json.loads(line) for line in lines]


def steps(folder: Path, side: str) -> list[dict[str, Any]]:
    """Its steps."""
    found = {row["step"]: row for row in rows(folder, side) if "loss" in row}
    return [found[step] for step in sorted(found)]


def slug(side: str) -> str:
    return side.replace(",", "").replace(" ", "_")


def measure(folder: Path, num_steps: int) -> None:
    """All sides, a step each in turn."""
    runs: dict[str, subprocess.Popen[bytes]] = {}
    for side, more in SIDES.items():
        own = folder / slug(side)
        shutil.rmtree(own, ignore_errors=True)
        words = [f"run_dir={own}", f"train.steps={num_steps}", f"train.eval_every={num_steps}"]
        words += [f"rewards=[{{name: {folder}/colours.py:blue, options: {{folder: {own}}}}}]"]
        log = (folder / f"{slug(side)}.log").open("wb")
        command = [sys.executable, "-m", "moetrain", "train", str(folder / "learn.yaml")]
        runs[side] = subprocess.Popen([*command, *words, *more], stdout=log, stderr=log)
    try:
        for side, process in runs.items():
            _wait(folder / slug(side), process)
        while any(process.poll() is None for process in runs.values()):
            for side, process in runs.items():
                if process.poll() is None:
                    (folder / slug(side) / "turn").touch()
                    _wait(folder / slug(side), process)
    finally:
        for process in runs.values():
            process.terminate()
    assert not any(process.wait() for process in runs.values()), "a run failed: see its log"


def _wait(own: Path, process: "subprocess.Popen[bytes]") -> None:
    """Until a run that has its turn has used it."""
    while process.poll() is None:
        if (own / "parked").exists() and not (own / "turn").exists():
            return
        time.sleep(0.01)


def in_common(folder: Path, side: str) -> list[dict[str, Any]]:
    """The steps of a side that all have."""
    num = min(len(steps(folder, each)) for each in SIDES)
    return steps(folder, side)[:num]


def lengths(folder: Path, side: str, num_steps: int) -> list[int]:
    """Tokens of the answers that a side has learned from."""
    files = sorted((folder / slug(side) / "rollouts").glob("????????.jsonl"))[:num_steps]
    groups = [json.loads(line) for file in files for line in file.read_text().splitlines()[1:]]
    return [answer["tokens"] for group in groups for answer in group["answers"]]


def told(folder: Path) -> Table:
    """A row a side, of the steps that all have."""
    table = Table("side", "answers/s sampling, median", "answers/s of a step")
    table.add_column("mean length")
    table.add_column("median, 99 %")
    for name in ("tokens older", "oldest", "late answers lost", "reward, last 5", "held out"):
        table.add_column(name)
    for side in SIDES:
        found = in_common(folder, side)
        num = sum(row["reward/graded"] for row in found)
        sampled = num / sum(row["seconds/sample"] for row in found)
        typical = median(row["reward/graded"] / row["seconds/sample"] for row in found)
        whole = num / sum(row["seconds"] - row["seconds/score"] for row in found)
        own = lengths(folder, side, len(found))
        held_out = [r["eval_reward/mean"] for r in rows(folder, side) if "eval_reward/mean" in r]
        cuts = quantiles(own, n=100)
        table.add_row(
            side,
            f"{sampled:.1f}, {typical:.1f}",
            f"{whole:.1f}",
            f"{fmean(own):.1f}",
            f"{cuts[49]:.0f}, {cuts[98]:.0f}",
            f"{fmean(row['staleness/share'] for row in found):.3f}",
            f"{max(row['staleness'] for row in found):.0f}",
            f"{sum(row.get('faults/dropped/late', 0) for row in found):.0f}",
            f"{fmean(row['reward/mean'] for row in found[-5:]):.3f}",
            " ".join(f"{value:.3f}" for value in held_out),
        )
    return table


def draw(folder: Path, out: Path) -> None:
    """Reward by step and by the seconds of sampling, as SVG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    by_step, by_time = figure.subplots(1, 2, sharey=True)
    for side in SIDES:
        found = in_common(folder, side)
        spent, seconds = 0.0, list[float]()
        for row in found:
            spent += row["seconds/sample"]
            seconds.append(spent)
        reward = [row["reward/mean"] for row in found]
        by_step.plot([row["step"] for row in found], reward, label=side, linewidth=1.2)
        by_time.plot(seconds, reward, linewidth=1.2)
    by_step.set_xlabel("step")
    by_time.set_xlabel("seconds of sampling")
    by_step.set_ylabel("reward of a step's answers")
    by_step.legend(frameon=False, fontsize=8)
    figure.savefig(out, format="svg")


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="sampling that does not wait for the longest")
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument("--steps", type=int, default=24, metavar="N", help="of each side")
    parser.add_argument("--svg", type=Path, metavar="OUT", help="draw the curves")
    args = parser.parse_args(words)
    folder = args.folder.absolute()
    if not (folder / "warm" / "hf").is_dir():
        make(folder)
        moetrain("train", str(folder / "warm.yaml"))
    if min(len(steps(folder, side)) for side in SIDES) < args.steps:
        measure(folder, args.steps)
    Console(width=200).print(told(folder))
    if args.svg:
        draw(folder, args.svg)


if __name__ == "__main__":
    main()
