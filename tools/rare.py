#!/usr/bin/env python
"""The second half of `make prove`: what a long project meets once, each with its figures.

A clock that jumps, a full temporary folder, sizes at which anything quadratic shows, a sandbox
without root, processes that all want the same file first. Writes the second table of
docs/reliability.md.
"""

import argparse
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tables import write_table

ROOT = Path(__file__).resolve().parents[1]
PYTHON = [sys.executable, "-W", "ignore"]
MOETRAIN = [*PYTHON, "-m", "moetrain"]
TINY, STEPS = str(ROOT / "examples/pretrain_tiny.yaml"), 12
TRAIN = [
    *(*MOETRAIN, "train", TINY, "--nproc", "2", "parallel.ep=2", f"train.steps={STEPS}"),
    *"checkpoint.every=4 checkpoint.export_hf=true data.seq_len=64 observe.progress=false".split(),
]
COLUMNS = ("case", "well", "figures of the last")
MEASURED = {"seconds", "tokens_per_s", "memory_gib"}
# Answers clock_gettime(CLOCK_REALTIME), gettimeofday and time with a jump that stands in a file.
CLOCK = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/time.h>
#include <time.h>
static long jump(void) {
  long seconds = 0;
  FILE *file = fopen(getenv("CLOCK_JUMP"), "r");
  if (file) { if (fscanf(file, "%ld", &seconds) != 1) seconds = 0; fclose(file); }
  return seconds;
}
int clock_gettime(clockid_t clock, struct timespec *out) {
  static int (*real)(clockid_t, struct timespec *);
  if (!real) real = dlsym(RTLD_NEXT, "clock_gettime");
  int code = real(clock, out);
  if (code == 0 && clock == CLOCK_REALTIME) out->tv_sec += jump();
  return code;
}
int gettimeofday(struct timeval *restrict out, void *restrict zone) {
  struct timespec now;
  int code = clock_gettime(CLOCK_REALTIME, &now);
  out->tv_sec = now.tv_sec; out->tv_usec = now.tv_nsec / 1000;
  return code;
}
time_t time(time_t *out) {
  struct timespec now;
  clock_gettime(CLOCK_REALTIME, &now);
  if (out) *out = now.tv_sec;
  return now.tv_sec;
}
"""


class Failed(Exception):
    """What a case has shown to be wrong."""


class Skipped(Exception):
    """Why a case cannot be run here."""


def check(holds: object, said: object) -> None:
    if not holds:
        raise Failed(str(said)[-2000:])


def rows(run: Path) -> list[dict[str, float]]:
    lines = (run / "ledger.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(r).items() if k not in MEASURED} for r in lines]


def weights(run: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted(run.glob("hf/*.safetensors"))]


def whole(folder: Path) -> Path:
    """A run that nothing happens to, made once."""
    run = folder.parent / "whole"
    if not (run / "hf").is_dir():
        done = subprocess.run([*TRAIN, f"run_dir={run}"], capture_output=True, text=True)
        check(done.returncode == 0, done.stderr)
    return run


def same(run: Path, folder: Path) -> None:
    other = whole(folder)
    check(rows(run) == rows(other) and weights(run) == weights(other), "other losses or weights")


def clock(folder: Path) -> str:
    """It jumps a day back, ten years on and home again while a run of two ranks goes on, and
    between its two starts.
    """
    compiler = shutil.which("cc")
    if compiler is None:
        raise Skipped("no C compiler for the clock")
    (folder / "clock.c").write_text(CLOCK)
    library, jump, run = folder / "clock.so", folder / "jump", folder / "run"
    words = [compiler, "-shared", "-fPIC", "-O1", "-o", str(library), str(folder / "clock.c")]
    subprocess.run([*words, "-ldl"], check=True)
    jump.write_text("0")
    environment = os.environ | {"LD_PRELOAD": str(library), "CLOCK_JUMP": str(jump)}
    shown = [*PYTHON, "-c", "import time; print(time.time())"]
    jump.write_text(str(-86400))
    then = float(subprocess.run(shown, env=environment, capture_output=True).stdout)
    check(86000 < time.time() - then < 87000, "the clock does not jump")
    jumps, started = 0, time.monotonic()
    for last in (False, True):
        process = subprocess.Popen([*TRAIN, f"run_dir={run}"], env=environment)
        while process.poll() is None:
            part = folder / "jump.part"
            part.write_text(str(random.choice((-86400, 315360000, 3600, 0))))
            part.replace(jump)
            jumps += 1
            time.sleep(0.5)
            if not last and (run / "ledger.jsonl").exists() and len(rows_of(run)) > STEPS // 2:
                process.send_signal(signal.SIGTERM)
        check(process.returncode == (0 if last else 143), f"exit code {process.returncode}")
    same(run, folder)
    return f"{jumps} jumps in {time.monotonic() - started:.0f} s, stopped and resumed: same weights"


def rows_of(run: Path) -> list[str]:
    return (run / "ledger.jsonl").read_text().splitlines()


def temporary(folder: Path) -> str:
    """The folders of temporary files have not a byte left: two ranks train all the same. Where they
    stand has none, either: one line.
    """
    disk, run, log = folder / "full", folder / "run", folder / "log"
    disk.mkdir()
    others = [place for place in ("/tmp", "/var/tmp", "/usr/tmp") if Path(place).is_dir()]
    if any(path.is_relative_to(place) for place in others for path in (folder, ROOT)):
        raise Skipped("the checkout and --folder must lie outside of /tmp and /var/tmp")
    places = [str(disk), *others]
    mounts = [f"mount --bind {disk} {place}" for place in places[1:]]
    sample = [*MOETRAIN, "sample", "builtin:qwen3-moe-tiny", "builtin:checkable-prompts-eval"]
    sample += ["--out", str(folder / "samples.jsonl"), "rollout.max_tokens=8"]
    script = "\n".join(
        [
            f"mount -t tmpfs -o size=1m none {disk} || exit 99",
            *mounts,
            f"cat /dev/zero > {disk}/ballast 2>/dev/null",
            f"cd {folder} && export TMPDIR={disk}",
            " ".join([*TRAIN, f"run_dir={run}"]),
            'echo "train $?"',
            f"cd {disk}",
            " ".join(sample),
            'echo "sample $?"',
        ]
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*namespace(), "sh", "-c", script], capture_output=True, text=True, env=environment
    )
    log.write_text(done.stdout + done.stderr)
    check("train 0" in done.stdout and "sample 2" in done.stdout, done.stdout + done.stderr)
    errors = [line for line in done.stderr.splitlines() if line.strip()]
    check(len(errors) == 1 and "TMPDIR" in errors[0], done.stderr)
    same(run, folder)
    return f"two ranks train: same weights; `sample`: {errors[0].removeprefix('moetrain: error: ')}"


def namespace() -> list[str]:
    root = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    words = ["unshare", *root, "--mount"]
    if subprocess.run([*words, "sh", "-c", "mount -t tmpfs none /mnt"], check=False).returncode:
        raise Skipped("nothing may be mounted here")
    return words


def measured(code: str, *words: object) -> tuple[float, float]:
    """(seconds of the CPU, most MB in memory) of a program."""
    program = f"{code}\nimport resource\nu = resource.getrusage(resource.RUSAGE_SELF)"
    program += "\nprint('used', u.ru_utime + u.ru_stime, u.ru_maxrss / 1024)"
    command = [*PYTHON, "-c", program, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    check(done.returncode == 0, done.stdout + done.stderr)
    match = re.search(r"^used (\S+) (\S+)$", done.stdout, re.MULTILINE)
    assert match is not None
    return float(match[1]), float(match[2])


def records(folder: Path, num: int = 1_000_000) -> str:
    """Instruction data of a million records, tokenised and packed."""
    data = folder / "data.jsonl"
    with data.open("w") as file:
        for i in range(num):
            turns = [{"role": "user", "content": f"What is {i} + {i % 7}?"}]
            turns.append({"role": "assistant", "content": str(i + i % 7)})
            file.write(json.dumps({"messages": turns}) + "\n")
    code = (
        "import sys\nfrom pathlib import Path\nfrom moetrain.config.load import load_recipe\n"
        "from moetrain.data.loader import RunData\n"
        "r = load_recipe(Path('examples/sft_tiny.yaml'), sys.argv[1:])\n"
        "p = RunData(r).prepare()\nassert p.num_packs and not p.num_rejected, p\n"
    )
    words = [f"data.train={data}", "data.eval=[]", f"run_dir={folder}/run"]
    first = measured(code, *words, f"data.cache={folder}/cache")
    again = measured(code, *words, f"data.cache={folder}/cache")
    small = folder / "small.jsonl"
    with data.open() as source, small.open("w") as file:
        file.writelines(line for _, line in zip(range(num // 10), source, strict=False))
    tenth = measured(code, f"data.train={small}", *words[1:], f"data.cache={folder}/cache2")
    check(first[0] < 25 * tenth[0], f"{num} records take {first[0]} s, a tenth {tenth[0]} s")
    return (
        f"{first[0]:.0f} s of one core, {first[1]:.0f} MB (a tenth: {tenth[0]:.0f} s,"
        f" {tenth[1]:.0f} MB); again {again[0]:.0f} s, {again[1]:.0f} MB"
    )


def document(folder: Path, megabytes: int = 4) -> str:
    """A corpus of one document, and one of twice its length."""
    code = (
        "import sys\nfrom pathlib import Path\nsys.path.insert(0, 'tests')\n"
        "from data_helpers import tokenizer_folder\n"
        "from moetrain.data.indexing import Options, index\n"
        "source, out = map(Path, sys.argv[1:])\n"
        "assert index([source], tokenizer_folder(), out, Options(workers=1)).num_documents == 1\n"
    )
    found = list[tuple[float, float]]()
    for times in (0, 1, 2):
        path = folder / f"{times}.jsonl"
        lines = (f"word{i % 9973} of a line {i * 7919 % 1000}\n" for i in range(1 + 40_000 * times))
        path.write_text(json.dumps({"text": "".join(lines) * megabytes}) + "\n")
        found.append(measured(code, path, folder / f"index{times}"))
    (_, none), once, twice = found
    check(twice[1] - none < 2.5 * (once[1] - none) + 50, found)
    return (
        f"{megabytes} MB of text: {once[1] - none:.0f} MB more than a short one, {once[0]:.0f} s;"
        f" of twice the length {twice[1] - none:.0f} MB, {twice[0]:.0f} s"
    )


def ledger(folder: Path, num: int = 1_000_000) -> str:
    """A ledger of a million lines: a run goes on after it, and it is drawn."""
    run = folder / "run"
    run.mkdir()
    names = [f"router/layer{i}/load_max_over_mean" for i in range(8)]
    with (run / "ledger.jsonl").open("w") as file:
        for i in range(1, num + 1):
            row = {"step": i, "loss": 1 + 1 / i, "tokens": 512, "lr": 1e-3, "grad_norm": 1.0}
            row |= {"tokens_per_s": 100.0, "seconds": 0.1} | dict.fromkeys(names, 1.5)
            file.write(json.dumps(row) + "\n")
    go_on = (
        "import sys\nfrom pathlib import Path\nfrom moetrain.observe.ledger import Ledger\n"
        "Ledger(Path(sys.argv[1]), int(sys.argv[2])).close()\n"
    )
    resumed = measured(go_on, run / "ledger.jsonl", num - 1)
    check(len(rows_of(run)) == num - 1, "rows past the checkpoint are dropped, and no others")
    shown = measured(REPORT, run, folder / "page.html")
    size = (folder / "page.html").stat().st_size / 1e3
    check(resumed[1] < 500 and shown[1] < 2000 and size < 1000, (resumed, shown, size))
    return (
        f"a resume reads and rewrites it in {resumed[0]:.0f} s and {resumed[1]:.0f} MB; the report"
        f" takes {shown[0]:.0f} s and {shown[1]:.0f} MB, its page {size:.0f} kB"
    )


REPORT = """import sys\nfrom pathlib import Path\nfrom moetrain.observe.report import write_report
write_report([Path(sys.argv[1])], Path(sys.argv[2]))
"""


def runs(folder: Path, num: int = 10_000) -> str:
    """A report of ten thousand runs of twenty steps."""
    sys.path.insert(0, str(ROOT))
    from moetrain.config.load import dump_recipe, load_recipe

    text = dump_recipe(load_recipe(Path(TINY)))
    for i in range(num):
        run = folder / "sweep" / f"seed={i}"
        run.mkdir(parents=True)
        (run / "resolved.yaml").write_text(re.sub(r"^seed: .*", f"seed: {i}", text, flags=re.M))
        lines = ({"step": s, "loss": 1 / s + i, "lr": 1e-3, "grad_norm": 1.0} for s in range(1, 21))
        (run / "ledger.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    seconds, memory = measured(REPORT, folder / "sweep", folder / "page.html")
    size = (folder / "page.html").stat().st_size / 1e6
    check((folder / "page.csv").read_text().count("\n") == num + 1, "a line of the CSV for each")
    check(seconds < 180 and memory < 2000, (seconds, memory))
    return f"{seconds:.0f} s, {memory:.0f} MB; the page has {size:.0f} MB"


def sandbox(folder: Path) -> str:
    """Programs are graded by a user who is not root, and no attack comes out.

    The user is one of the machine. Root behind another number (`unshare --map-user`) is not: the
    kernel does not count root's processes, and a program that forks takes the machine.
    """
    del folder
    command = [*PYTHON, *"-m pytest -q -p no:cacheprovider tests/test_sandbox.py -k other".split()]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    check(done.returncode == 0, done.stdout)
    return f"attacks as another user, by both ways: {done.stdout.strip().splitlines()[-1]}"


def cache(folder: Path, num: int = 8) -> str:
    """Eight processes want the same reference log-probs of an empty cache; one is killed."""
    recipe = ROOT / "examples/dpo_tiny.yaml"
    words = [*MOETRAIN, "score", str(recipe), f"data.cache={folder}/cache", f"run_dir={folder}/run"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    started = time.monotonic()
    processes = [
        subprocess.Popen(
            words, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        for _ in range(num)
    ]
    time.sleep(random.uniform(3, 15))
    processes[0].kill()
    said = [process.communicate()[1] for process in processes]
    codes = [process.returncode for process in processes]
    check(all(code == 0 for code in codes[1:]), f"{codes} {[text for text in said if text][:1]}")
    found = sorted((folder / "cache/reference").glob("*/logp.npy"))
    left = [p for p in (folder / "cache").rglob(".*.tmp-*")]
    check(not left or codes[0], f"left: {left}")
    again = subprocess.run(words, env=environment, capture_output=True, text=True)
    check(again.returncode == 0, again.stderr)
    check(found == sorted((folder / "cache/reference").glob("*/logp.npy")), "made twice")
    return f"{num - 1} of {num - 1} ended well in {time.monotonic() - started:.0f} s, one file each"


def disks(folder: Path) -> str:
    """All commands that write, through all states of a disk and a kill at any moment."""
    command = [*PYTHON, "-m", "pytest", "-q", "tests/test_disks.py", f"--basetemp={folder}/t"]
    environment = os.environ | {"MOETRAIN_DISKS": str(random.randrange(1, 1 << 30))}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    check(done.returncode == 0, done.stdout)
    return f"full, half full, read-only, killed (-9): {done.stdout.strip().splitlines()[-1]}"


CASES: dict[str, Callable[[Path], str]] = {
    "every command that writes": disks,
    "the clock jumps": clock,
    "a full temporary folder": temporary,
    "instruction data of 10^6 records": records,
    "one document of a corpus": document,
    "a ledger of 10^6 lines": ledger,
    "a report of 10^4 runs": runs,
    "the sandbox without root": sandbox,
    "8 processes on the reference cache": cache,
}


def main() -> int:
    """Returns 0 when every case went well, or was skipped with a reason."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=1, metavar="N", help="of each case")
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose name holds it")
    parser.add_argument("--folder", type=Path, default=Path("runs/rare"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--page", type=Path, default=ROOT / "docs/reliability.md")
    args = parser.parse_args()
    random.seed(args.seed)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    top = args.folder.resolve()
    shutil.rmtree(top, ignore_errors=True)
    found: dict[str, tuple[str, str]] = {}
    for name, case in CASES.items():
        if args.only not in name:
            continue
        good, said = 0, ""
        for number in range(args.runs):
            folder = top / f"{list(CASES).index(name)}-{number}"
            folder.mkdir(parents=True)
            try:
                said = case(folder)
                good += 1
                shutil.rmtree(folder)
            except Skipped as reason:
                said = f"skipped: {reason}"
            except Failed as wrong:
                print(f"{name}: {wrong}\nsee {folder}", file=sys.stderr)
                said = f"FAILED: {str(wrong).splitlines()[-1]}"
        found[name] = f"{good} of {args.runs}", said
        print(f"{name}: {good} of {args.runs}: {said}", flush=True)
        write_table(args.page, "rare", COLUMNS, found, CASES)
    return int(any(said.startswith("FAILED") for _, said in found.values()))


if __name__ == "__main__":
    sys.exit(main())
