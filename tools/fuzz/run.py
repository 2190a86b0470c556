#!/usr/bin/env python
"""Broken records, recipes, overrides and commands, thousands of them: each is used or refused in a
line, and none ends in a traceback, takes over 5 seconds or 500 MB.

An input is made of the seed and its number alone, so `--at NUMBER` makes the same again and shows
its traceback.
"""

import argparse
import ctypes
import gc
import json
import mmap
import os
import random
import re
import signal
import struct
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(Path(__file__).parent), str(ROOT)]
SECONDS = 5.0  # of the processor, for one input
MEGABYTES = 500  # that the process may grow by
POLL_SECONDS = 0.05
PLACE = struct.Struct("<qd")  # the input at which a worker is, and its MB a while before
SHOWN = 2000  # characters of an input in the report


@dataclass
class Report:
    """What came of the inputs."""

    counts: Counter[str] = field(default_factory=Counter[str])
    faults: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])


def numbered(names: list[str], weights: list[int], seed: int, number: int) -> tuple[str, Any]:
    """The target of an input and the chance that makes it."""
    rng = random.Random(f"{seed}:{number}")
    return rng.choices(names, weights)[0], rng


def work(args: argparse.Namespace) -> None:
    """In a process of its own: a range's inputs; a line of JSON for each fault, counts last."""
    from targets import TARGETS, Bench

    # What is tested may print, tokenizers past sys.stdout too.
    lines = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    chosen = {name: TARGETS[name] for name in args.only}
    names, weights = list(chosen), [target.weight for target in chosen.values()]
    with open(args.progress, "r+b") as file, tempfile.TemporaryDirectory() as folder:
        place = mmap.mmap(file.fileno(), PLACE.size)
        bench = Bench(Path(folder))
        os.chdir(folder)
        for name in names:  # imports and a tokenizer, which are no input's fault
            one(chosen[name], bench, random.Random(name))
        gc.freeze()  # all that was imported: else every look for garbage goes through it
        first = size = settled()
        counts: Counter[str] = Counter()
        for number in range(args.start, args.num):
            place[:] = PLACE.pack(number, size)
            name, rng = numbered(names, weights, args.seed, number)
            outcome, fault = one(chosen[name], bench, rng)
            counts[f"{name} {outcome}"] += 1
            if fault:
                print(
                    json.dumps({"number": number, "target": name} | fault), file=lines, flush=True
                )
            if number % 10 == 0:  # a worker that is ended leaves what it has counted
                print(json.dumps({"counts": counts}), file=lines, flush=True)
                counts.clear()
            if number % 200 == 0:
                size = settled()
                if size - first > MEGABYTES:
                    told = f"{size - first:.0f} MB that inputs left behind, from {first:.0f} MB"
                    fault = {"number": number, "target": name, "kind": "leak", "told": told}
                    print(json.dumps(fault | {"input": ""}), file=lines, flush=True)
                    first = size
        print(json.dumps({"counts": counts}), file=lines, flush=True)


def one(target: Any, bench: Any, rng: random.Random) -> tuple[str, dict[str, Any] | None]:
    """(what came of an input, the fault if it is one)."""
    from moetrain.errors import MoetrainError

    made: Any = None
    begin = time.process_time()
    try:
        made = target.make(rng)
        begin = time.process_time()
        outcome = target.run(bench, made)
    except MoetrainError as error:
        outcome = "refused"
        if not str(error).strip():
            return "fault", _fault("a refusal without a word", repr(error), made)
    except Exception as error:
        return "fault", _fault(type(error).__name__, traceback.format_exc(), made)
    seconds = time.process_time() - begin
    if seconds > SECONDS:
        return "fault", _fault("slow", f"{seconds:.1f} s", made)
    return outcome, None


def _fault(kind: str, told: str, made: Any) -> dict[str, Any]:
    try:
        text = repr(made)[:SHOWN]
    except (RecursionError, ValueError):  # too deep, or too long a number
        text = type(made).__name__
    return {"kind": kind, "told": told[-SHOWN:], "input": text}


def watch(args: argparse.Namespace) -> Report:
    """Let workers go through all inputs; one that hangs or grows is ended, and the next goes on
    behind the input that it was at.
    """
    report = Report()
    start = args.start
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what was found until then is told
    with tempfile.TemporaryDirectory() as folder:
        progress = Path(folder) / "progress"
        try:
            while start < args.num:
                progress.write_bytes(PLACE.pack(start, 0.0))
                fault = _watch_one(args, start, progress, report)
                if fault is None:
                    break
                report.faults.append(fault)
                start = fault["number"] + 1
        except KeyboardInterrupt:
            print(f"stopped at input {PLACE.unpack(progress.read_bytes())[0]}")
    return report


def _watch_one(
    args: argparse.Namespace, start: int, progress: Path, report: Report
) -> dict[str, Any] | None:
    """One worker, to its end; the fault for which it was ended."""
    given = ["--num", str(args.num), "--seed", str(args.seed), "--only", ",".join(args.only)]
    command = [sys.executable, __file__, *given, "--start", str(start), "--progress", str(progress)]
    out = progress.with_name("out")
    with out.open("w+") as stdout, out.with_name("err").open("w+") as stderr:
        process = subprocess.Popen(command, stdout=stdout, stderr=stderr)
        try:
            ended = _supervise(process, progress)
            if ended is None and process.returncode:
                stderr.seek(0)
                kind = f"the process ended with {process.returncode}"
                ended = {"kind": kind, "told": stderr.read()}
        finally:
            process.kill()
            process.wait()  # it writes where this process reads
            stdout.seek(0)
            _add(report, stdout)
    if ended is None:
        return None
    number, _ = PLACE.unpack(progress.read_bytes())
    return {"number": number, "target": "?", "input": "", **ended, "told": ended["told"][-SHOWN:]}


def _add(report: Report, lines: Iterable[str]) -> None:
    for line in lines:
        try:
            found = json.loads(line)
        except ValueError:
            told = {"kind": "printed", "told": line[:SHOWN], "input": repr(line)}
            report.faults.append({"number": -1, "target": "?"} | told)
            continue
        if "counts" in found:
            report.counts.update(found["counts"])
        else:
            report.faults.append(found)


def _supervise(process: "subprocess.Popen[Any]", progress: Path) -> Any:
    """Why the process had to be ended; None where it came to its own end."""
    at, since = -1, 0.0
    while process.poll() is None:
        time.sleep(POLL_SECONDS)
        number, size = PLACE.unpack(progress.read_bytes())
        seconds, megabytes = used(process.pid)
        if size == 0:  # it begins with imports
            continue
        if number != at:
            at, since = number, seconds
        grew, took = megabytes - size, seconds - since
        if grew > MEGABYTES or took > 2 * SECONDS:
            process.kill()
            process.wait()
            if grew > MEGABYTES:
                return {"kind": "growth", "told": f"{grew:.0f} MB, from {size:.0f} MB"}
            return {"kind": "hang", "told": f"{took:.0f} s"}
    return None


def settled() -> float:
    """This process's MB, without what Python and malloc hold back for later."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return used(os.getpid())[1]


def used(pid: int) -> tuple[float, float]:
    """(seconds of the processor, MB of memory of its own) of a process; zeros when it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        status = Path(f"/proc/{pid}/status").read_text()
    except (OSError, IndexError):
        return 0.0, 0.0
    seconds = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    anonymous = re.search(r"RssAnon:\s+(\d+) kB", status)
    return seconds, int(anonymous[1]) / 1024 if anonymous else 0.0


def show(args: argparse.Namespace) -> int:
    """One input again, with its traceback."""
    from targets import TARGETS, Bench

    names = list(args.only)
    name, rng = numbered(names, [TARGETS[n].weight for n in names], args.seed, args.at)
    made = TARGETS[name].make(rng)
    print(f"{name}: {made!r}"[:20000])
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        print(TARGETS[name].run(Bench(Path(folder)), made))
    return 0


def tell(report: Report, seed: int, seconds: float) -> int:
    """The exit code; faults of one kind and place are told once."""
    for name, count in sorted(report.counts.items()):
        print(f"{count:8d}  {name}")
    kinds: dict[str, list[dict[str, Any]]] = {}
    for fault in report.faults:
        last = (re.findall(r'File "([^"]+)", line (\d+)', fault["told"]) or [("", "")])[-1]
        kinds.setdefault(f"{fault['kind']} {last[0]}:{last[1]}", []).append(fault)
    for kind, found in sorted(kinds.items(), key=lambda item: -len(item[1])):
        first = min(found, key=lambda fault: len(fault["input"]))
        print(f"\n{len(found)} x {kind}: {first['target']} --seed {seed} --at {first['number']}")
        print(f"  {first['told'].strip().splitlines()[-1:]}\n  {first['input'][:500]}")
    total = sum(report.counts.values())
    print(f"\n{total} inputs in {seconds:.0f} s, {len(report.faults)} faults of {len(kinds)} kinds")
    return 1 if report.faults else 0


def main() -> int:
    from targets import TARGETS

    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--num", type=int, default=50_000, help="inputs (50000)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", default=",".join(TARGETS), help="targets, with commas")
    parser.add_argument("--at", type=int, help="run this input alone and show its traceback")
    parser.add_argument("--start", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--progress", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.only = args.only.split(",")
    if args.at is not None:
        return show(args)
    if args.progress:
        work(args)
        return 0
    begin = time.monotonic()
    report = watch(args)
    return tell(report, args.seed, time.monotonic() - begin)


if __name__ == "__main__":
    sys.exit(main())
