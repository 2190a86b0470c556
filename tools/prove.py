#!/usr/bin/env python
"""`make prove`: break a run in every way, many times, and write the table of docs/reliability.md.

Each fault happens to a run of two ranks at a moment drawn by chance; the run is started again and
must end with the weights and losses of an uninterrupted one, bit for bit. Disks are filled and made
read-only in a mount namespace of its own (unshare). What has been proved stays in outcomes.json of
the folder: the same command at the same commit goes on after it was stopped.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tables import write_table

ROOT = Path(__file__).resolve().parents[1]
STEPS, EVERY = 24, 6
DISK = "1g"  # many checkpoints; what ends it is the ballast
SETTINGS = [
    *f"train.steps={STEPS} checkpoint.every={EVERY} checkpoint.keep=3 data.seq_len=64".split(),
    *"train.eval_every=8 train.eval_packs=4 checkpoint.export_hf=true".split(),
    *"observe.tensorboard=false parallel.ep=2 cluster.hang_seconds=20".split(),
]
COMMAND = [sys.executable, "-m", "moetrain", "train", str(ROOT / "examples/pretrain_tiny.yaml")]
COLUMNS = ("fault", "runs", "survived", "lost steps: mean, most")
MEASURED = {"seconds", "tokens_per_s", "memory_gib"}


@dataclass
class Outcome:
    """Of one fault: `lost` are the steps that had to be taken again, of each run that survived."""

    runs: int = 0
    survived: int = 0
    lost: list[int] = field(default_factory=list[int])


@dataclass
class Run:
    """A run of two ranks in `folder`."""

    folder: Path
    process: subprocess.Popen[bytes] | None = None
    hung: bool = False

    def start(self, *more: str) -> None:
        log = (self.folder.parent / f"{self.folder.name}.log").open("ab")
        command = [*COMMAND, "--nproc", "2", *SETTINGS, f"run_dir={self.folder}", *more]
        self.process = subprocess.Popen(command, stdout=log, stderr=log, cwd=ROOT)
        log.close()

    def code(self, seconds: float = 600) -> int:
        """Wait for the end; a run that hangs has code -9 and is not survived."""
        assert self.process is not None
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.hung = True
            return self.process.wait()

    def ranks(self) -> list[int]:
        """The process ids of its ranks."""
        assert self.process is not None
        path = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        return [int(pid) for pid in path.read_text().split()] if path.exists() else []

    def rows(self) -> list[dict[str, float]]:
        path = self.folder / "ledger.jsonl"
        text = path.read_text() if path.exists() else ""
        lines = text[: text.rfind("\n") + 1].splitlines()  # the last may be half written
        return [{k: v for k, v in json.loads(r).items() if k not in MEASURED} for r in lines]

    def step(self) -> int:
        rows = self.rows()
        return int(rows[-1]["step"]) if rows else 0

    def saved(self) -> list[Path]:
        return sorted(self.folder.glob("checkpoints/step_*"))

    def weights(self) -> list[bytes]:
        return [path.read_bytes() for path in sorted(self.folder.glob("hf/*.safetensors"))]

    def until(self, happens: Callable[[], object]) -> bool:
        """Wait for `happens`; False when the run ended before."""
        assert self.process is not None
        while not happens():
            if self.process.poll() is not None:
                return False
            time.sleep(0.01)
        return True


def somewhere(run: Run) -> None:
    """Any moment between the first step and the last."""
    goal = random.randrange(1, STEPS)
    run.until(lambda: run.step() >= goal)


def saving(run: Run) -> None:
    run.until(lambda: list(run.folder.glob("checkpoints/.writing_*")))


def evaluating(run: Run) -> None:
    """The eighth step is taken and its held-out row is not there."""
    run.until(lambda: run.step() >= 8)


def loading(run: Run) -> None:
    """A second start, while it brings back the first one's checkpoint."""
    run.until(lambda: run.step() >= EVERY + 2)
    kill(run)
    run.code()
    run.start()
    run.until(run.ranks)
    time.sleep(random.uniform(2, 10))


def kill(run: Run) -> None:
    """SIGKILL to one rank."""
    ranks = run.ranks()
    if ranks:
        os.kill(random.choice(ranks), signal.SIGKILL)


def stop(run: Run) -> None:
    """SIGSTOP to one rank: the watchdog ends the run."""
    ranks = run.ranks()
    if ranks:
        os.kill(random.choice(ranks), signal.SIGSTOP)


def kill_launcher(run: Run) -> None:
    assert run.process is not None
    run.process.kill()


def corrupt(run: Run) -> None:
    """The run is killed, and a bit of its newest checkpoint is not what it was."""
    run.until(lambda: len(run.saved()) >= 2)
    kill(run)
    run.code()
    path = random.choice([p for p in run.saved()[-1].iterdir() if p.stat().st_size])
    data = bytearray(path.read_bytes())
    data[random.randrange(len(data))] ^= 1 << random.randrange(8)
    path.write_bytes(bytes(data))


def second(run: Run) -> None:
    """A second job on the folder is refused, and the first goes on."""
    run.until(lambda: run.step() >= 2)
    other = Run(run.folder)
    other.start()
    assert other.code() == 2 or run.process is None or run.process.poll() is not None


def small_disk(run: Run) -> None:
    run.folder.mkdir()
    mount("-t", "tmpfs", "-o", f"size={DISK}", "none", str(run.folder))


def fill(run: Run) -> None:
    """Not a byte is left, for the ledger neither."""
    with (run.folder / "ballast").open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(1 << 16))
        except OSError:
            pass


def heal_disk(run: Run) -> None:
    """All that was saved, where there is room."""
    (run.folder / "ballast").unlink()
    kept = Path(shutil.copytree(run.folder, run.folder.with_suffix(".kept")))
    subprocess.run(["umount", str(run.folder)], check=True)
    run.folder.rmdir()
    kept.rename(run.folder)


def read_only(run: Run) -> None:
    """Of the folder of checkpoints, as when a file system fails under it."""
    path = run.folder / "checkpoints"
    path.mkdir(exist_ok=True)
    mount("--bind", str(path), str(path))
    end = time.monotonic() + 60
    while True:  # it is busy while a file in it is open for writing
        try:
            return mount("-o", "remount,bind,ro", str(path))
        except subprocess.CalledProcessError:
            if time.monotonic() > end:
                raise
            time.sleep(0.05)


def writable(run: Run) -> None:
    subprocess.run(["umount", str(run.folder / "checkpoints")], check=True)


def mount(*words: str) -> None:
    subprocess.run(["mount", *words], check=True)


def nothing(run: Run) -> None:
    pass


@dataclass(frozen=True)
class Fault:
    """Of a started run: `harm` at the end of `moment`. What heals it comes after the run's end."""

    moment: Callable[[Run], None]
    harm: Callable[[Run], None]
    heal: Callable[[Run], None] = nothing
    before: Callable[[Run], None] = nothing


FAULTS = {
    "kill -9 of a rank, at any step": Fault(somewhere, kill),
    "kill -9 of a rank, during a save": Fault(saving, kill),
    "kill -9 of a rank, during an evaluation": Fault(evaluating, kill),
    "kill -9 of a rank, during the load of a checkpoint": Fault(loading, kill),
    "kill -9 of the launcher, at any step": Fault(somewhere, kill_launcher),
    "SIGSTOP of a rank": Fault(somewhere, stop),
    "a full disk": Fault(somewhere, fill, heal_disk, small_disk),
    "a folder of checkpoints that becomes read-only": Fault(somewhere, read_only, writable),
    "a bit flipped in the newest checkpoint": Fault(corrupt, nothing),
    "a second job on the run folder": Fault(second, nothing),
}


def prove(name: str, run: Run, whole: Run, outcome: Outcome) -> None:
    """One run with one fault."""
    fault = FAULTS[name]
    fault.before(run)
    run.start()
    fault.moment(run)
    fault.harm(run)
    lost = 0
    outcome.runs += 1
    for number in range(3):
        code = run.code()
        if number == 0:
            fault.heal(run)
        if code == 0:
            break
        saved = run.saved()
        at = int(saved[-1].name.removeprefix("step_")) if saved else 0
        lost += run.step() - at
        run.start()
    same = run.code() == 0 and run.rows() == whole.rows() and run.weights() == whole.weights()
    if same and not run.hung:
        outcome.survived += 1
        outcome.lost.append(max(lost, 0))
        shutil.rmtree(run.folder)


def commit() -> str:
    """Of the tree that is proved."""
    words = ["git", "rev-parse", "HEAD"]
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True).stdout.strip()


def before(folder: Path, seed: int) -> dict[str, Outcome]:
    """What a stopped proof of this tree has shown."""
    try:
        kept = json.loads((folder / "outcomes.json").read_text())
    except OSError:
        return {}
    if (kept["commit"], kept["seed"]) != (commit(), seed):
        return {}
    return {name: Outcome(**one) for name, one in kept["faults"].items()}


def row(outcome: Outcome) -> list[object]:
    lost = outcome.lost
    mean = sum(lost) / len(lost) if lost else 0.0
    return [outcome.runs, outcome.survived, f"{mean:.1f}, {max(lost, default=0)}"]


def main() -> int:
    """Returns 0 when every run survived."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=20, metavar="N", help="of each fault")
    parser.add_argument("--only", default="", metavar="TEXT", help="faults whose name holds it")
    parser.add_argument("--folder", type=Path, default=Path("runs/prove"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--page", type=Path, default=ROOT / "docs/reliability.md")
    args = parser.parse_args()
    if "MOETRAIN_PROVE" not in os.environ:
        words = ["unshare", "--mount", *(["--map-root-user"] if os.geteuid() else [])]
        words += [sys.executable, *sys.argv]
        os.execvpe("unshare", words, os.environ | {"MOETRAIN_PROVE": "1"})
    folder = args.folder.resolve()
    known = before(folder, args.seed)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    whole = Run(folder / "whole")
    whole.start()
    assert whole.code() == 0, f"the uninterrupted run failed: {folder}/whole.log"
    outcomes = {name: known.get(name, Outcome()) for name in FAULTS if args.only in name}
    for number in range(args.runs):
        for place, (fault, outcome) in enumerate(outcomes.items()):
            if outcome.runs > number:
                continue
            random.seed(f"{args.seed} {number} {place}")
            prove(fault, Run(folder / f"run-{place}-{number}"), whole, outcome)
            print(f"{fault}: {outcome.survived} of {outcome.runs} survived", flush=True)
            found = {name: row(one) for name, one in outcomes.items() if one.runs}
            lead = f"`tools/prove.py --runs {args.runs} --seed {args.seed}`"
            kept = {"commit": commit(), "seed": args.seed}
            kept["faults"] = {name: asdict(one) for name, one in outcomes.items()}
            (folder / "outcomes.json").write_text(json.dumps(kept))
            write_table(args.page, "faults", COLUMNS, found, FAULTS, lead)
    return int(any(o.survived < o.runs for o in outcomes.values()))


if __name__ == "__main__":
    sys.exit(main())
