#!/usr/bin/env python
"""On-policy distillation against GRPO from the same start: reward by answers drawn.

    python tools/bench/distill.py --out docs/images/distill.png

The teacher is what GRPO makes of examples/emoji in 40 steps. Then, for each seed and one after the
other: GRPO with 64 answers a step (as it ships) and with 16, on_policy_distill and gkd with 16. It
prints the answers drawn until the mean reward of five steps is within 0.1 of the teacher's.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from statistics import fmean

import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parents[2]
GRPO = "examples/emoji/2_grpo.yaml"
DISTILL = "examples/on_policy_distill_tiny.yaml"
ALL = ["data.eval_share=0", "train.eval_every=null"]  # all prompts are answered, as by GRPO
SIDES: dict[str, tuple[str, int, list[str]]] = {
    "GRPO, 64 a step": (GRPO, 64, ["train.steps=40"]),
    "GRPO, 16 a step": (GRPO, 16, ["train.steps=80", "rollout.group_size=4",
                                   "rollout.prompts_per_step=4"]),
    "on_policy_distill": (DISTILL, 16, []),
    "gkd": (DISTILL, 16, ["method={name: gkd, top_k: 8}"]),
}  # fmt: skip
NEAR, WINDOW = 0.1, 5


def train(recipe: str, run: Path, *more: str) -> list[float]:
    """Mean rewards by step, of a run that may be there already."""
    words = [*more, f"run_dir={run}", "observe.progress=false", "observe.tensorboard=false"]
    command = [sys.executable, "-m", "moetrain", "train", recipe, *words]
    if not (run / "done").is_file():
        subprocess.run(command, cwd=ROOT, check=True)
        (run / "done").touch()
    rows = map(json.loads, (run / "ledger.jsonl").read_text().splitlines())
    return [row["reward/mean"] for row in rows if "reward/mean" in row]


def smooth(rewards: list[float]) -> list[float]:
    return [fmean(rewards[max(0, i + 1 - WINDOW) : i + 1]) for i in range(len(rewards))]


def until(rewards: list[float], goal: float, answers: int) -> int | None:
    """Answers drawn until the smoothed reward is there."""
    there = (i for i, x in enumerate(smooth(rewards), 1) if i >= WINDOW and x >= goal)
    step = next(there, None)
    return None if step is None else step * answers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("runs/bench-distill"))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    args = parser.parse_args()
    folder: Path = args.folder.resolve()
    train("examples/emoji/1_sft.yaml", folder / "start")
    start = f"model.path={folder}/start/hf"
    made = train(GRPO, folder / "teacher", start, "train.steps=40")
    teacher = fmean(made[-WINDOW:])
    print(f"the teacher: {teacher:.3f}; the start: {made[0]:.3f}")
    figure, axes = plt.subplots(figsize=(7, 4))
    axes.axhline(teacher, color="grey", linestyle=":", label="teacher")
    for name, (recipe, answers, more) in SIDES.items():
        rows: list[list[float]] = []
        for seed in args.seeds:
            own = [f"teacher.path={folder}/teacher", *ALL] if recipe == DISTILL else []
            run = folder / f"{name.replace(',', '').replace(' ', '-')}-{seed}"
            rows.append(train(recipe, run, start, f"seed={seed}", *own, *more))
        reached = [until(row, teacher - NEAR, answers) for row in rows]
        last = fmean(fmean(row[-WINDOW:]) for row in rows)
        print(f"{name}: answers until within {NEAR} of it {reached}; at the end {last:.3f}")
        mean = [fmean(x) for x in zip(*map(smooth, rows), strict=False)]
        axes.plot([answers * (i + 1) for i in range(len(mean))], mean, label=name)
    axes.set_xlabel("answers drawn")
    axes.set_ylabel(f"mean reward, of {WINDOW} steps and {len(args.seeds)} seeds")
    axes.set_xlim(0, 1280)
    axes.legend()
    axes.grid(alpha=0.3)
    figure.tight_layout()
    if args.out is not None:
        figure.savefig(args.out, dpi=90)


if __name__ == "__main__":
    main()
