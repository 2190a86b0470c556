"""Every command that writes, on a disk that takes no more: what `test_disks.py` and `make prove`
judge.

    unshare --user --map-root-user --mount python tests/disk_cases.py FOLDER

In a mount namespace of its own, where a small disk can be mounted, filled and made read-only. All
that is heavy is imported once; each command then runs in a fork.
"""

import argparse
import contextlib
import hashlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from multiprocessing import forkserver
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
ROOT = Path(__file__).parents[1]
DISK = "64m"
STATES = ("full", "half", "read-only", "killed")
TINY = "builtin:qwen3-moe-tiny"

Words = Callable[[Path, Path, int], list[str]]
"""(what lies on a good disk, the bad disk, 0 for what was there before or 1) -> a command."""


@dataclass(frozen=True)
class Case:
    """A command that writes.

    grows: it goes on where it was, so that what it has made so far may stay.
    once: it refuses what is there, so that nothing was there before.
    room: bytes that are left when the disk is half full; 0: half of what the command writes.
    long: it starts processes of its own, so that it is not run to its end here.
    temporary: the disk is where temporary files go.
    """

    words: Words
    grows: bool = False
    once: bool = False
    room: int = 0
    long: bool = False
    temporary: bool = False


@dataclass
class Run:
    """How one run of a command ended, and what its disk held before and after."""

    code: int = 0
    said: str = ""
    before: dict[str, str] = field(default_factory=dict[str, str])
    after: dict[str, str] = field(default_factory=dict[str, str])
    seconds: float = 0.0


def train(work: Path, disk: Path, number: int) -> list[str]:
    return ["train", f"{work}/train.yaml", f"run_dir={disk}/run{number}"]


def sample(work: Path, disk: Path, number: int) -> list[str]:
    settings = ["rollout.max_tokens=8", f"rewards=[{work}/own.py:even]"]
    out = f"{disk}/samples{number}.jsonl"
    return ["sample", TINY, f"{work}/prompts.jsonl", "--out", out, "-k", "2", *settings]


def evaluate(work: Path, disk: Path, number: int) -> list[str]:
    out = f"{disk}/answers{number}.jsonl"
    own = ["samples=1", "limit=8", "pass_at=[1]", "rollout.max_tokens=8"]
    return ["eval", TINY, f"{ROOT}/examples/evals/checkable.yaml", "--out", out, *own]


CASES: dict[str, Case] = {
    "train": Case(train, grows=True),
    "train, the curves": Case(
        lambda w, d, n: [*train(w, d, n), "observe.tensorboard=true"], grows=True, room=24576
    ),
    "train, the cache": Case(
        lambda w, d, n: [*train(w, d, n)[:2], f"data.cache={d}/cache{n}"], grows=True
    ),
    "train, online": Case(
        lambda w, d, n: ["train", f"{w}/grpo.yaml", f"run_dir={d}/run{n}"], grows=True
    ),
    "init": Case(
        lambda w, d, n: [
            *("init", "sft", "--model", f"{w}/model", "--data", f"{w}/train.jsonl"),
            *("--out", f"{d}/new.yaml"),
        ],
        once=True,
    ),
    "score": Case(
        lambda w, d, n: ["score", f"{w}/model", f"{w}/rows{n}.jsonl", "--out", f"{d}/out.jsonl"]
    ),
    "score, a reference": Case(
        lambda w, d, n: ["score", f"{w}/dpo.yaml", f"data.cache={d}/c{n}"], grows=True
    ),
    "sample": Case(sample, grows=True),
    "pairs": Case(
        lambda w, d, n: ["pairs", f"{w}/graded.jsonl", "--out", f"{d}/p{n}.jsonl"], grows=True
    ),
    "sample, temporary files": Case(
        lambda w, d, n: sample(w, w, n), grows=True, room=8192, temporary=True
    ),
    "eval": Case(evaluate, grows=True),
    "grade": Case(
        lambda w, d, n: [
            *("grade", f"{w}/completions{n}.jsonl"),
            *("--rewards", "length", "--out", f"{d}/grades.jsonl"),
        ]
    ),
    "tokenizer train": Case(
        lambda w, d, n: [
            *("tokenizer", "train", f"{w}/text0.txt", "--vocab-size", "400"),
            *("--out", f"{d}/tok"),
        ],
        once=True,
    ),
    "data index": Case(
        lambda w, d, n: [
            *("data", "index", f"{w}/text{n}.jsonl"),
            *("--tokenizer", f"{w}/model", "--out", f"{d}/corpus"),
        ],
        grows=True,
    ),
    "convert hf2mcore": Case(
        lambda w, d, n: ["convert", "hf2mcore", f"{w}/model", f"{d}/mcore"], once=True
    ),
    "convert mcore2hf": Case(
        lambda w, d, n: ["convert", "mcore2hf", f"{w}/mcore", f"{d}/hf"], once=True
    ),
    "convert adapter": Case(
        lambda w, d, n: ["convert", "adapter", f"{w}/lora", f"{d}/peft"], once=True
    ),
    "convert merge": Case(
        lambda w, d, n: ["convert", "merge", f"{w}/model", f"{w}/lora/adapter", f"{d}/merged"],
        once=True,
    ),
    "convert expand": Case(
        lambda w, d, n: ["convert", "expand", f"{w}/model", f"{d}/deep", "--every", "2"], once=True
    ),
    "sweep": Case(
        lambda w, d, n: ["sweep", f"{w}/train.yaml", "--grid", "seed=1", "--out", f"{d}/sweep"],
        grows=True,
        long=True,
    ),
    "report": Case(lambda w, d, n: ["report", f"{w}/runs{n}", "-o", f"{d}/report.html"]),
    "swift import": Case(
        lambda w, d, n: ["swift", "import", f"{w}/command{n}.sh", "--out", f"{d}/recipe.yaml"]
    ),
    "quickstart": Case(
        lambda w, d, n: ["quickstart", "--out", f"{d}/quick"], grows=True, long=True
    ),
}
# What leaves nothing on a disk that is the user's.
OTHERS = {
    "show": "prints",
    "watch": "prints",
    "recipe": "prints",
    "data show": "prints; its cache is the one of train",
    "data tasks": "needs verifiers; its file goes through the writer of grade",
    "swift export": "prints",
    "convert inspect": "prints",
    "convert verify": "prints, and needs no temporary files any more",
    "convert quantize": "its rows go through the writer of convert merge and convert expand",
    "launch": "prints, or hands a script to sbatch",
    "bench": "measures for a minute, and then writes one file at once, as init does",
    "plan": "writes one recipe and one picture, each at once, as init does",
    "doctor": "tries each disk and says what it found in its table",
    "requeue": "prints its verdict, which is to stop where the run's folder cannot be written",
    "serve": "starts a vLLM server; its log and files are those of a run's, and it needs vLLM",
}


def prepare(work: Path) -> None:
    """What the commands read."""
    import yaml
    from data_helpers import PAIRS, QUESTIONS, questions, tokenizer_folder, write_jsonl

    from moetrain.testing.tiny import save_model

    save_model("qwen3_moe", work / "model", vocab_size=512)
    shutil.copytree(tokenizer_folder(), work / "model", dirs_exist_ok=True)
    write_jsonl(work / "train.jsonl", questions(48))
    write_jsonl(work / "pairs.jsonl", PAIRS[:16])
    (work / "own.py").write_text(
        "def even(completions, **columns):\n"
        "    return [float(len(c) % 2 == 0) for c in completions]\n"
    )
    write_jsonl(work / "prompts.jsonl", [{"prompt": q, "answer": a} for q, a in QUESTIONS[:24]])
    answers = [
        {
            **{"prompt_id": "0", "index": i, "tokens": [1], "logprobs": [-1.0], "version": 0},
            **{"text": "ab" * (i + 1), "finish": "stop", "reward": float(i), "parts": {}},
        }
        for i in range(2)
    ]
    asked = {"columns": {"prompt": [{"role": "user", "content": "?"}]}, "tokens": [1]}
    rows = [{"prompt": asked | {"id": str(k)}, "answers": answers} for k in range(200)]
    write_jsonl(work / "graded.jsonl", rows)
    for n in (0, 1):
        write_jsonl(work / f"rows{n}.jsonl", [{"tokens": [1 + n, 2, 3]}] * (300 + n))
        write_jsonl(work / f"completions{n}.jsonl", [{"completion": "a b"}] * (300 + n))
        text = [{"text": f"{q} {a} {n}"} for q, a in QUESTIONS] * 8
        write_jsonl(work / f"text{n}.jsonl", [*text, *(["{"] * 2 if n == 0 else [])])
        (work / f"text{n}.txt").write_text("".join(q + a for q, a in QUESTIONS))
        (work / f"command{n}.sh").write_text(
            f"megatron sft --model x --dataset y --max_length {n + 2}048 --lr 1e-4\n"
        )
        run = work / f"runs{n}" / "a"
        run.mkdir(parents=True)
        (run / "resolved.yaml").write_text(f"seed: {n}\n")
        write_jsonl(run / "ledger.jsonl", [{"step": i, "loss": 1 / i} for i in range(1, 90 + n)])
    recipe = {
        "run_dir": str(work / "run"),
        "model": {"path": str(work / "model"), "dtype": "fp32"},
        "method": "sft",
        "data": {"train": str(work / "train.jsonl"), "seq_len": 64, "cache": str(work / "cache")},
        "train": {"steps": 2, "global_batch": 4},
        "checkpoint": {"every": 1, "keep": 1, "export_hf": True},
        "observe": {"tensorboard": False, "progress": False},
    }
    (work / "train.yaml").write_text(yaml.safe_dump(recipe))
    dpo = recipe | {"method": "dpo"}
    dpo["data"] = {**recipe["data"], "train": str(work / "pairs.jsonl"), "seq_len": 128}
    (work / "dpo.yaml").write_text(yaml.safe_dump(dpo))
    grpo = recipe | {"method": "grpo", "rewards": [{"name": f"{work}/own.py:even"}]}
    grpo["train"] = {"steps": 2}
    grpo["rollout"] = {"engine": "embedded", "max_tokens": 8, "group_size": 2}
    grpo["rollout"]["prompts_per_step"] = 4
    grpo["rollout"]["eval_prompts"] = 4
    prompts = str(work / "prompts.jsonl")
    grpo["data"] = {**recipe["data"], "train": prompts, "eval": prompts}
    (work / "grpo.yaml").write_text(yaml.safe_dump(grpo))
    lora = ["adapter.rank=2", f"run_dir={work}/lora", "checkpoint.export_hf=false"]
    for words in (
        ["convert", "hf2mcore", f"{work}/model", f"{work}/mcore"],
        ["train", f"{work}/train.yaml", *lora],
    ):
        done = command(words, work / "log")
        assert done == 0, (work / "log").read_text()


def command(
    words: list[str], log: Path, seconds: float | None = None, temporary: Path | None = None
) -> int:
    """The exit code of `moetrain WORDS` in a fork of this process, killed after so many seconds;
    what it says goes to `log`, and its temporary files to `temporary`.
    """
    from moetrain.testing.gloo import share_server

    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.setsid()
            share_server()
            handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os.dup2(handle, 2)
            if temporary is not None:
                os.environ["TMPDIR"], tempfile.tempdir = str(temporary), None
            from moetrain import cli

            code = cli.main(words)
            sys.stdout.flush()
        except SystemExit as end:
            code = int(end.code or 0)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    if seconds is not None:
        time.sleep(seconds)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def held(disk: Path) -> dict[str, str]:
    """Name -> digest of each file on the disk."""
    return {
        str(path.relative_to(disk)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(disk.rglob("*"))
        if path.is_file() and path.name != "ballast"
    }


def size_of(disk: Path) -> int:
    """Bytes of the disk's files, in whole pages."""
    sizes = [p.stat().st_size for p in disk.rglob("*") if p.is_file()]
    return sum(-(-size // 4096) * 4096 for size in sizes)


def fill(disk: Path, left: int) -> None:
    """Leave so many bytes."""
    with (disk / "ballast").open("wb", buffering=0) as file:
        with contextlib.suppress(OSError):
            while True:
                file.write(bytes(1 << 16))
        with contextlib.suppress(OSError):
            while True:
                file.write(bytes(1 << 12))
        if left:
            file.truncate(max(0, file.tell() - left))


def mount(*words: str) -> None:
    subprocess.run(["mount", *words], check=True)


@contextlib.contextmanager
def mounted(disk: Path, content: Path | None) -> Iterator[None]:
    """A small disk with what was there before."""
    disk.mkdir(exist_ok=True)
    mount("-t", "tmpfs", "-o", f"size={DISK}", "none", str(disk))
    try:
        if content is not None:
            shutil.copytree(content, disk, dirs_exist_ok=True)
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


def run(case: Case, work: Path, number: int, seconds: float | None = None) -> Run:
    disk, log = work / "disk", work / "said"
    before, started = held(disk), time.monotonic()
    temporary = disk if case.temporary else None
    code = command(case.words(work, disk, number), log, seconds, temporary)
    said = log.read_text(errors="replace")
    return Run(code, said, before, held(disk), time.monotonic() - started)


def judge(case: Case, work: Path, states: Sequence[str]) -> dict[str, Run]:
    """The command on a good disk (which makes what was there before), on each bad one, and once
    more when room has been made, or after it was killed at a moment drawn by chance.
    """
    disk, before, half = work / "disk", work / "before", 0
    shutil.rmtree(before, ignore_errors=True)
    before.mkdir()
    found: dict[str, Run] = {}
    if not case.long:
        with mounted(disk, None):
            found["good"] = run(case, work, 0)
            half = case.room or size_of(disk) // 2 // 4096 * 4096
            if not case.temporary:
                # Without the sockets of processes that end meanwhile.
                shutil.copytree(
                    disk, before, dirs_exist_ok=True, ignore=shutil.ignore_patterns("pymp-*")
                )
    for place, state in enumerate(states, 1):
        # What stays on another disk is whole after a good state, and would not be made again.
        number = place if case.temporary else 1
        if state == "half" and not half:
            state = "full"
        if state in found or (state == "killed" and case.long):
            continue
        with mounted(disk, None if case.once else before):
            if state == "read-only":
                mount("-o", "remount,ro", str(disk))
            elif state != "killed":
                fill(disk, half if state == "half" else 0)
            seconds = found["good"].seconds * random.uniform(0.3, 1) if state == "killed" else None
            found[state] = run(case, work, number, seconds)
            (disk / "ballast").unlink() if state in ("full", "half") else None
            if state == "half" or (state == "killed" and found[state].code):
                found[f"after {state}"] = run(case, work, number)
    return found


def main() -> None:
    """Prints a line of JSON for each case."""
    parser = argparse.ArgumentParser()
    parser.add_argument("work", type=Path)
    parser.add_argument("--cases", nargs="+", default=list(CASES))
    parser.add_argument("--states", nargs="+", default=list(STATES))
    parser.add_argument("--killed", nargs="+", metavar="CASE", help="besides, of these alone")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    random.seed(args.seed)
    work: Path = args.work
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "MOETRAIN_TIMEOUT_MINUTES": "2"}
    os.environ["TMPDIR"] = str(work / "tmp")
    (work / "tmp").mkdir()
    import torch
    import transformers  # noqa: F401

    import moetrain.testing.preload  # noqa: F401

    multiprocessing.set_forkserver_preload(["moetrain.rewards.pool"])
    forkserver.ensure_running()  # for all forks, where rewards are graded
    torch.set_num_threads(1)
    prepare(work)
    for name in args.cases:
        more = ["killed"] if name in (args.killed or ()) else []
        found = judge(CASES[name], work, [*args.states, *more])
        line = {"case": name, "runs": {state: asdict(one) for state, one in found.items()}}
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
