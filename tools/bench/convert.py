"""Conversions against plain copies of the same files: seconds, and the anonymous memory of all
their processes together.

    python tools/bench/convert.py FOLDER [--shape NAME] [--layers N] [--rounds N]

Makes a model with Qwen3-30B-A3B's layers and vocabulary, or another's, of random bf16 numbers in
FOLDER (3.7 GB with two layers; three times as much room is needed) and removes it in the end. Sides
take turns in every round. `cp -r` is timed with and without waiting for the disk; conversions
always wait. The shortest times are compared: a virtual machine's host adds to any side by chance.
Files lie in the system's cache, but for the sides that say "from the disk".
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from moetrain.config.hub_models import PUBLISHED  # noqa: E402
from moetrain.models import read_model  # noqa: E402
from moetrain.weights import hf_files  # noqa: E402
from moetrain.weights.fused import file_shapes  # noqa: E402
from moetrain.weights.stream import put  # noqa: E402

# https://huggingface.co/Qwen/Qwen3-30B-A3B and -235B-A22B, config.json
SHAPES = {
    "30b": dict(hidden_size=2048, moe_intermediate_size=768, num_attention_heads=32,
                intermediate_size=6144, num_layers=2),
    "235b": dict(hidden_size=4096, moe_intermediate_size=1536, num_attention_heads=64,
                 intermediate_size=12288, num_layers=1),
    "gpt-oss": dict(num_layers=1),  # 20b's, of which 120b has more experts
}  # fmt: skip
SAMPLE_S = 0.02


@dataclass(frozen=True)
class Cost:
    """Of one run of one side."""

    seconds: float
    anonymous_mb: float


def config(shape: str, layers: int | None) -> dict[str, object]:
    """A config.json."""
    sizes = dict(SHAPES[shape])
    num = sizes.pop("num_layers")
    if shape == "gpt-oss":
        published: dict[str, object] = PUBLISHED["gpt-oss-20b"]
        return {**published, "num_hidden_layers": layers or num, "torch_dtype": "bfloat16"}
    return dict(
        sizes,
        architectures=["Qwen3MoeForCausalLM"],
        model_type="qwen3_moe",
        num_hidden_layers=layers or num,
        num_key_value_heads=4,
        head_dim=128,
        num_experts=128,
        num_experts_per_tok=8,
        norm_topk_prob=True,
        vocab_size=151936,
        max_position_embeddings=40960,
        rope_theta=1e6,
        rms_norm_eps=1e-6,
        tie_word_embeddings=False,
        hidden_act="silu",
        torch_dtype="bfloat16",
    )


def make(folder: Path, hf: dict[str, object]) -> None:
    """A model of random numbers between -0.06 and 0.06, in shards of 5 GB."""
    folder.mkdir(parents=True)
    model = read_model(hf)
    shapes = {
        name: shape
        for rule in model.table.values()
        for name, shape in zip(rule.hf, rule.hf_shapes, strict=True)
    }
    of_files = file_shapes(model.table, shapes)
    wanted = [hf_files.Target(name, "BF16", shape) for name, shape in of_files.items()]
    groups = hf_files.shards(wanted, hf_files.SHARD_BYTES)
    files = dict(zip(hf_files.shard_names(len(groups)), groups, strict=True))
    rng = np.random.default_rng(0)
    block = rng.integers(0x3C00, 0x3D80, 1 << 24, np.uint16) | (
        rng.integers(0, 2, 1 << 24, np.uint16) << 15
    )
    noise = block.tobytes()
    for file, group in files.items():
        handle = os.open(folder / file, os.O_WRONLY | os.O_CREAT, 0o644)
        first = hf_files.header(group)
        put(handle, first, 0)
        at, end = len(first), len(first) + sum(one.num_bytes for one in group)
        while at < end:
            start = 2 * int(rng.integers(0, len(noise) // 4))
            piece = memoryview(noise)[start : start + min(end - at, len(noise) // 2)]
            put(handle, piece, at)
            at += len(piece)
        os.close(handle)
    hf_files.write_index(folder, files)
    (folder / "config.json").write_text(json.dumps(hf, indent=1))


def forget(folders: Sequence[Path]) -> None:
    """Take the files of folders out of the system's cache."""
    for path in (path for folder in folders for path in folder.iterdir()):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def run(command: Sequence[str | Path]) -> Cost:
    """One side, once."""
    begun = time.monotonic()
    process = subprocess.Popen([str(word) for word in command], stdout=subprocess.DEVNULL)
    most = 0
    while process.poll() is None:
        most = max(most, _anonymous(process.pid))
        time.sleep(SAMPLE_S)
    if process.returncode:
        raise SystemExit(f"{' '.join(map(str, command))} ended with {process.returncode}")
    return Cost(time.monotonic() - begun, most / 1e6)


def _anonymous(pid: int) -> int:
    """Bytes of a process and all that it started."""
    total = 0
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                total += int(line.split()[1]) * 1024
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            total += _anonymous(int(child))
    except OSError:  # it has just ended
        pass
    return total


LOAD_AND_SAVE = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
model.save_pretrained(sys.argv[2])
"""


def sides(folder: Path, *, with_transformers: bool) -> dict[str, list[str | Path]]:
    """name -> command; what it writes is `out`."""
    python = [sys.executable, "-m", "moetrain", "convert"]
    hf, mcore, out = folder / "hf", folder / "mcore", folder / "out"
    on_disk = f"; sync -f {folder}"
    found: dict[str, list[str | Path]] = {
        "cp -r of the Hugging Face folder": ["sh", "-c", f"cp -r {hf} {out}"],
        "the same, and on disk": ["sh", "-c", f"cp -r {hf} {out}{on_disk}"],
        "hf2mcore": [*python, "hf2mcore", hf, out],
        "cp -r of the Megatron folder": ["sh", "-c", f"cp -r {mcore} {out}"],
        "the same, and on disk ": ["sh", "-c", f"cp -r {mcore} {out}{on_disk}"],
        "mcore2hf": [*python, "mcore2hf", mcore, out],
        "reading both": ["sh", "-c", f"cat {hf}/* {mcore}/* > /dev/null"],
        "verify": [*python, "verify", hf, mcore],
        "inspect": [*python, "inspect", mcore],
        "reading both from the disk": ["sh", "-c", f"cat {hf}/* {mcore}/* > /dev/null"],
        "verify, from the disk": [*python, "verify", hf, mcore],
    }
    if with_transformers:
        saved = [sys.executable, "-c", LOAD_AND_SAVE, hf, out]
        found["transformers, load and save"] = saved
    return found


def once(command: Sequence[str | Path], folder: Path, *, is_cold: bool) -> Cost:
    """One side, once. What the last one wrote goes right before, so that this one writes into
    memory that the machine has: a virtual one may have to ask its host for what was free for long.
    """
    if is_cold:
        forget([folder / "hf", folder / "mcore"])
    shutil.rmtree(folder / "out", ignore_errors=True)
    return run(command)


def main() -> None:
    parser = argparse.ArgumentParser(description="conversions against copies")
    parser.add_argument("folder", type=Path, help="a disk with room; a new folder is made there")
    parser.add_argument("--shape", choices=SHAPES, default="30b")
    parser.add_argument("--layers", type=int, help="of the model")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--with-transformers", action="store_true")
    args = parser.parse_args()
    os.environ["PYTHONPATH"] = f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"
    folder = Path(tempfile.mkdtemp(prefix="convert-", dir=args.folder))
    try:
        make(folder / "hf", config(args.shape, args.layers))
        size = sum(path.stat().st_size for path in (folder / "hf").iterdir())
        commands = sides(folder, with_transformers=args.with_transformers)
        run([*commands["hf2mcore"][:-1], folder / "mcore"])
        found: dict[str, list[Cost]] = {}
        for is_cold in (False, True):
            for _ in range(args.rounds):
                for name, command in commands.items():
                    if ("from the disk" in name) == is_cold:
                        found.setdefault(name, []).append(once(command, folder, is_cold=is_cold))
    finally:
        shutil.rmtree(folder)
    print(f"{size / 1e9:.2f} GB, {args.rounds} rounds: the shortest (median, longest)\n")
    print("| side | seconds | times cp -r | anonymous MB, most |\n| --- | --- | --- | --- |")
    plain = min(cost.seconds for cost in found["cp -r of the Hugging Face folder"])
    for name, costs in found.items():
        seconds = sorted(cost.seconds for cost in costs)
        memory = max(cost.anonymous_mb for cost in costs)
        span = f"{seconds[0]:.2f} ({median(seconds):.2f}, {seconds[-1]:.2f})"
        print(f"| {name.strip()} | {span} | {seconds[0] / plain:.2f} | {memory:.0f} |")


if __name__ == "__main__":
    main()
