"""Training cost side by side with TRL: the same model, records, number of steps and threads.

    python tools/bench/against_trl.py --trl-python ENV/bin/python [--folder DIR] [--records 160]

The model is a tiny Qwen3-MoE with a real-sized vocabulary (151,936), in fp32; prompts and answers
have log-normal lengths, short and long mixed. Both sides learn all records once, moetrain in as
many optimizer steps as TRL or some more (a step takes whole packs). Tokens are those of the records
as they are (a pair is two whole sequences), whatever either side computes. TRL runs in every
setting that may be its best here (trl_side.py: sorted by length, one record at a time,
padding-free; liger has no CPU kernels), reference log-probs computed before the clock starts; the
ratio is to the fastest. Memory is anonymous memory (RssAnon), the peak of samples.
"""

import argparse
import json
import math
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
SEQ_LEN = 1024
RECORDS_A_STEP = 8
HF: dict[str, Any] = {
    "vocab_size": 151936,
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "moe_intermediate_size": 96,
    "intermediate_size": 256,
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
}


def words(rng: random.Random, mean: float, spread: float, most: int) -> str:
    """Text of a log-normal number of words."""
    num = min(most, max(2, round(rng.lognormvariate(math.log(mean), spread))))
    return " ".join(rng.choice(WORDS) for _ in range(num))


# glibc gives large blocks back at once and takes them page by page again, which trebles TRL's time:
# both sides are told not to.
MALLOC = {
    "MALLOC_TRIM_THRESHOLD_": "100000000000",
    "MALLOC_MMAP_THRESHOLD_": "100000000000",
    "MALLOC_TOP_PAD_": "100000000",
}
WORDS = "value list name type file data error path line text class number index return key".split()


def write_records(folder: Path, num: int) -> dict[str, Path]:
    """sft.jsonl and pairs.jsonl: prompts of about 60 words, answers of about 25, long tails."""
    rng = random.Random(1)
    rows = [
        {
            "prompt": words(rng, 60, 0.8, 300),
            "chosen": words(rng, 25, 1.0, 200),
            "rejected": words(rng, 25, 1.0, 200),
        }
        for _ in range(num)
    ]
    files = {"sft": folder / "sft.jsonl", "dpo": folder / "pairs.jsonl"}
    plain = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows]
    for name, content in (("sft", plain), ("dpo", rows)):
        files[name].write_text("".join(json.dumps(row) + "\n" for row in content))
    return files


def make_model(folder: Path) -> Path:
    """Random weights, and the tokenizer that comes with moetrain."""
    from moetrain.data import assets
    from moetrain.testing.tiny import save_model

    model = folder / "model"
    if not model.is_dir():
        save_model("qwen3_moe", model, **HF)
        shutil.copytree(assets.resolve("builtin:stdlib-tokenizer"), model, dirs_exist_ok=True)
    return model


class Memory(threading.Thread):
    """The peak of a process's anonymous memory."""

    def __init__(self, pid: int):
        super().__init__(daemon=True)
        self.status = Path(f"/proc/{pid}/status")
        self.peak_gib = 0.0
        self.start()

    def run(self) -> None:
        while True:
            try:
                lines = self.status.read_text().splitlines()
            except OSError:
                return
            for line in lines:
                if line.startswith("RssAnon:"):
                    self.peak_gib = max(self.peak_gib, int(line.split()[1]) / 2**20)
            time.sleep(0.02)


def run(command: Sequence[str | Path], threads: int) -> tuple[str, float]:
    """(stdout, peak GiB)."""
    env = os.environ | MALLOC | {"OMP_NUM_THREADS": str(threads), "TRL_EXPERIMENTAL_SILENCE": "1"}
    process = subprocess.Popen(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env
    )
    memory = Memory(process.pid)
    out, err = process.communicate()
    if process.returncode:
        sys.exit(f"{command[0]}: exit code {process.returncode}\n{err[-3000:]}")
    return out, memory.peak_gib


# As in trl_side.py, which this environment cannot import.
TRL_SETTINGS = {"sft": ("sorted", "one by one", "padding-free"), "dpo": ("sorted", "one by one")}


def trl(
    python: str, method: str, setting: str, model: Path, data: Path, threads: int
) -> dict[str, float]:
    side = [python, HERE / "trl_side.py", method, setting, model, data, str(RECORDS_A_STEP)]
    out, peak = run(side, threads)
    return json.loads(out.splitlines()[-1]) | {"gib": peak}


def ours(
    method: str, model: Path, data: Path, folder: Path, num_steps: int, threads: int
) -> dict[str, float]:
    """A run by the command line; seconds are those of its ledger."""
    run_dir = folder / f"run_{method}"
    shutil.rmtree(run_dir, ignore_errors=True)
    num_steps, num_packs = once(method, model, data, folder, num_steps)
    settings = [
        f"run_dir={run_dir}",
        f"model.path={model}",
        "model.dtype=fp32",
        f"method={method}",
        f"data.train={data}",
        f"data.seq_len={SEQ_LEN}",
        f"data.cache={folder / 'cache'}",
        "optim.lr=1e-4",
        f"train.steps={num_steps}",
        f"train.global_batch={num_packs}",
        "observe.progress=false",
        "observe.tensorboard=false",
        "checkpoint.save_optimizer=false",
    ]
    recipe = folder / "recipe.yaml"
    recipe.write_text("run_dir: unset\nmodel: {path: unset}\nmethod: sft\ndata: {train: unset}\n"
                      "train: {steps: 1}\n")  # fmt: skip
    command = [sys.executable, "-m", "moetrain", "train", recipe, *settings]
    if method == "dpo":  # the reference is cached by a first run, as the sweep's other runs find it
        run([*command, f"run_dir={folder / 'warm'}", "train.steps=1"], threads)
        shutil.rmtree(folder / "warm")
    _, peak = run(command, threads)
    rows = [json.loads(line) for line in (run_dir / "ledger.jsonl").read_text().splitlines()]
    return {"seconds": sum(row["seconds"] for row in rows), "steps": len(rows), "gib": peak}


def once(method: str, model: Path, data: Path, folder: Path, num_steps: int) -> tuple[int, int]:
    """(steps, packs a step) in which the records are learned once, in `num_steps` or a few more."""
    from moetrain.config.load import recipe_from
    from moetrain.data.loader import RunData

    recipe = recipe_from(
        {
            "run_dir": str(folder / "unused"),
            "model": {"path": str(model)},
            "method": method,
            "data": {"train": str(data), "seq_len": SEQ_LEN, "cache": str(folder / "cache")},
            "train": {"steps": num_steps},
        }
    )
    num_packs = RunData(recipe).prepare().num_packs
    a_step = max(1, num_packs // num_steps)
    return math.ceil(num_packs / a_step), a_step


def show(method: str, side: str, found: dict[str, float], tokens: float) -> None:
    speed, step = tokens / found["seconds"], found["seconds"] / found["steps"]
    print(f"| {method} | {side} | {speed:,.0f} | {step:.2f} | {found['gib']:.2f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trl-python", required=True)
    parser.add_argument("--folder", type=Path, default=Path("runs/against_trl"))
    parser.add_argument("--records", type=int, default=160)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    model, files = make_model(args.folder), write_records(args.folder, args.records)
    print("| method | side | tokens/s | s a step | peak GiB, anonymous |")
    print("| --- | --- | --- | --- | --- |")
    for method, data in files.items():
        sides: dict[str, dict[str, float]] = {}
        for setting in TRL_SETTINGS[method]:
            found = trl(args.trl_python, method, setting, model, data, args.threads)
            sides[f"TRL {found['version']}, {setting}"] = found
            show(method, f"TRL {found['version']}, {setting}", found, found["tokens"])
        best = min(sides.values(), key=lambda side: side["seconds"])
        own = ours(method, model, data, args.folder, int(best["steps"]), args.threads)
        show(method, "moetrain", own, best["tokens"])
        ratio, memory = best["seconds"] / own["seconds"], own["gib"] / best["gib"]
        print(f"| {method} | ratio to the best | {ratio:.2f}x | | {memory:.2f}x |", flush=True)


if __name__ == "__main__":
    main()
