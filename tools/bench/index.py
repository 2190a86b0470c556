#!/usr/bin/env python3
"""Text to an index: `moetrain data index` against itself before gigatoken and against Megatron-LM's
two tools, with as many processes, start to end, in turns on the same corpus. Prints a table.

    python tools/bench/index.py --megatron-lm CHECKOUT
    python tools/bench/index.py --memory 2          # of 2 GB, while it runs
    python tools/bench/index.py --sft 40            # MB of conversations to packs, and their tokens

The corpus is made of the source files of this Python's packages, each once, and deleted after.
"""

import argparse
import json
import os
import random
import resource
import shutil
import string
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[2]
BEFORE = "f0694ec"  # the last commit with one process and tokenizers alone
MAIN = "from moetrain.cli import main; raise SystemExit(main())"
SFT = """
import json, resource, sys, time
from pathlib import Path

def cpu():
    own = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in own)

if __name__ == "__main__":
    from moetrain.data import assets, sets, sft
    from moetrain.data.encode import Encoder, Spec
    folder, source = Path(sys.argv[1]), sys.argv[2]
    spec = Spec((source,), folder, 8192, "truncate", 0, num_workers=int(sys.argv[4]))
    Encoder(sft.CHAT, spec).chat.encode([])
    started, before = time.perf_counter(), cpu()
    made = sets.PackedSet(sets.build(sft.CHAT, spec, Path(sys.argv[3])))
    seconds = time.perf_counter() - started
    print(json.dumps({"seconds": [seconds, cpu() - before], "print": made.sequences_fingerprint}))
"""
TOKENS = """
import json, sys, time
from itertools import batched
from pathlib import Path
from moetrain.data import sft
from moetrain.data.encode import Encoder, Spec
from moetrain.data.sources import find_sources, read_rows
encoder = Encoder(sft.CHAT, Spec((sys.argv[2],), Path(sys.argv[1]), 8192, "truncate", 0))
rows = [row for source in find_sources([sys.argv[2]]) for row in read_rows(source)]
texts = [marked for row in rows for text in encoder._read(row).texts for marked in text]
encoder.chat.encode(texts[:1])
started = time.process_time()
for part in batched(texts, 256):
    encoder.chat.encode(list(part))
seconds = time.process_time() - started
print(json.dumps({"seconds": [seconds, seconds], "print": len(texts)}))
"""


@dataclass
class Ran:
    """What a command took."""

    seconds: float
    cpu: float
    said: str


def sources() -> Iterator[str]:
    """Text files of this Python's packages and library, in always the same order, no two alike."""
    places = [Path(np.__file__).parents[1], Path(os.__file__).parent]
    found = sorted({p for place in places for p in place.rglob("*.py") if p.is_file()})
    random.Random(0).shuffle(found)
    seen: set[int] = set()
    for path in found:
        text = path.read_text(encoding="utf-8", errors="replace")
        if 200 < len(text) < 1_000_000 and hash(text) not in seen:
            seen.add(hash(text))
            yield text


def corpus(path: Path, megabytes: float) -> float:
    """Write a JSONL of this size, or of all that there is, with other letters each time round so
    that no word comes twice; the megabytes written.
    """
    letters = string.ascii_letters
    with path.open("w") as file:
        for turn in range(26):
            moved = (
                letters[turn:26] + letters[:turn] + letters[26 + turn :] + letters[26 : 26 + turn]
            )
            table = str.maketrans(letters, moved)
            for text in sources():
                file.write(json.dumps({"text": text.translate(table) if turn else text}) + "\n")
                if file.tell() >= megabytes * 1e6:
                    return file.tell() / 1e6
    return path.stat().st_size / 1e6


def conversations(path: Path, megabytes: float) -> None:
    """Of one to three turns each, of some hundred tokens."""
    rng, size = random.Random(1), 0
    with path.open("w") as file:
        for text in sources():
            messages = []
            for _ in range(rng.choice((1, 1, 2, 3))):
                at, ask = rng.randrange(max(1, len(text) - 3000)), rng.randint(50, 500)
                said = text[at : at + ask], text[at + ask : at + ask + rng.randint(200, 2500)]
                for role, content in zip(("user", "assistant"), said, strict=True):
                    content = content.replace("<|", "< |").strip() or "?"
                    messages.append({"role": role, "content": content})
            size += file.write(json.dumps({"messages": messages}) + "\n")
            if size >= megabytes * 1e6:
                return


def run(words: list[str], source: Path) -> Ran:
    """Run a Python program with a checkout on its path. SystemExit when it fails."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    places = [str(source), os.environ.get("PYTHONPATH", "")]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, places))}
    # Not here: Python looks for modules in the folder of a program that is given by -c.
    done = subprocess.run(
        [sys.executable, *words], env=env, capture_output=True, text=True, cwd=tempfile.gettempdir()
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(words)[:200]}\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Ran(time.perf_counter() - started, cpu, done.stdout)


def earlier(work: Path, commit: str) -> Path:
    """The package as it was."""
    folder = work / "before"
    folder.mkdir()
    packed = subprocess.run(
        ["git", "-C", str(ROOT), "archive", commit, "moetrain"], capture_output=True, check=True
    )
    subprocess.run(["tar", "-x", "-C", str(folder)], input=packed.stdout, check=True)
    return folder


def same_tokens(ours: Path, theirs: Path) -> bool:
    """Whether two indexes hold the same documents, but for the token that ends each."""
    raw = [Path(f"{p}.idx").read_bytes() for p in (ours, theirs)]
    num = int.from_bytes(raw[0][18:26], "little")
    lengths = np.frombuffer(raw[0], np.int32, num, 34)
    width = np.uint16 if raw[0][17] == 8 else np.int32
    tokens = [np.fromfile(f"{p}.bin", width) for p in (ours, theirs)]
    keep = np.ones(len(tokens[0]), bool)
    keep[np.cumsum(lengths) - 1] = False
    return raw[0] == raw[1] and bool((tokens[0][keep] == tokens[1][keep]).all())


def against(args: argparse.Namespace, work: Path) -> None:
    """The table of all sides."""
    path = work / "corpus.jsonl"
    size = corpus(path, args.megabytes)
    own = ["-c", MAIN, "data", "index", str(path), "--tokenizer", args.tokenizer]
    own += ["--special-tokens", "keep", "--out"]
    sides: dict[str, tuple[list[str], Path]] = {
        f"moetrain before ({args.before})": ([*own, f"{work}/old"], earlier(work, args.before)),
        "moetrain": ([*own, f"{work}/new", "--workers", str(args.workers)], ROOT),
    }
    if args.megatron_lm:
        own = ["--input", str(path), "--tokenizer-type", "HuggingFaceTokenizer", "--append-eod"]
        own += ["--tokenizer-model", str(folder_of(args.tokenizer)), "--output-prefix"]
        tools, count = args.megatron_lm / "tools", ["--workers", str(args.workers)]
        name = "Megatron-LM preprocess_data"
        words = [str(tools / "preprocess_data.py"), *own, f"{work}/mlm", *count]
        sides[name] = words, args.megatron_lm
        if (tools / "preprocess_data_fast.py").is_file() and find_spec("awkward"):
            words = [str(tools / "preprocess_data_fast.py"), *own, f"{work}/fast"]
            words.append("--use-gigatoken")
            sides[f"{name}_fast"] = words, args.megatron_lm
    found: dict[str, list[Ran]] = {name: [] for name in sides}
    for _ in range(args.rounds):
        for name, (words, source) in sides.items():
            found[name].append(run(words, source))
            print(f"  {name}: {found[name][-1].seconds:.1f} s", file=sys.stderr)
    print(f"{size:.0f} MB, {args.workers} processes, median of {args.rounds}\n")
    print("| side | s | MB/s | CPU s | MB per CPU s | against it |\n|" + " --- |" * 6)
    best = median([r.seconds for r in found["moetrain"]])
    for name, ran in found.items():
        seconds, cpu = median([r.seconds for r in ran]), median([r.cpu for r in ran])
        figures = f"{seconds:.1f} | {size / seconds:.1f} | {cpu:.1f} | {size / cpu:.1f}"
        print(f"| {name} | {figures} | {seconds / best:.1f}x |")
    files = [Path(f"{work}/{side}.bin").read_bytes() for side in ("old", "new")]
    print(f"\nthe same files as before: {files[0] == files[1]}")
    for other in ("mlm", "fast"):
        prefix = work / f"{other}_text_document"
        if Path(f"{prefix}.idx").is_file():
            print(f"the same tokens as {other}: {same_tokens(work / 'new', prefix)}")


def median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def folder_of(tokenizer: str) -> Path:
    from moetrain.data import assets

    return assets.resolve(tokenizer)


def memory(args: argparse.Namespace, work: Path) -> None:
    """Anonymous memory of a build's processes as it goes through a large corpus."""
    path = work / "corpus.jsonl"
    size = corpus(path, args.memory * 1000)
    words = ["-c", MAIN, "data", "index", str(path), "--tokenizer", args.tokenizer]
    words += ["--special-tokens", "keep", "--out", f"{work}/new", "--workers", str(args.workers)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    rows: list[tuple[float, float]] = []
    journal = work / ".new.part" / "journal"
    started = time.perf_counter()
    with subprocess.Popen([sys.executable, *words], env=env, start_new_session=True) as build:
        while build.poll() is None:
            time.sleep(0.25)
            try:
                done = json.loads(journal.read_text().splitlines()[-1][17:])[0]["num_bytes"]
            except (OSError, ValueError, IndexError, KeyError):
                continue
            rows.append((done / 1e6, anonymous(build.pid) / 1e6))
    seconds = time.perf_counter() - started
    print(f"{size:.0f} MB, {args.workers} processes, {seconds:.0f} s\n")
    print("| MB read | MB of memory, all processes: most since the row before |\n| --- | --- |")
    for tenth in range(10):
        own = [m for d, m in rows if tenth * size / 10 <= d < (tenth + 1) * size / 10 + 1]
        print(f"| {(tenth + 1) * size / 10:.0f} | {max(own, default=0):.0f} |")


def anonymous(session: int) -> int:
    """Bytes that the processes of a session have for themselves."""
    total = 0
    for place in Path("/proc").glob("[0-9]*"):
        try:
            stat = (place / "stat").read_text().rpartition(")")[2].split()
            if int(stat[3]) == session:
                resident, shared = map(int, (place / "statm").read_text().split()[1:3])
                total += (resident - shared) * os.sysconf("SC_PAGE_SIZE")
        except (OSError, IndexError):
            continue
    return total


def instructions(args: argparse.Namespace, work: Path) -> None:
    """Conversations to packs, and the tokenising alone."""
    path, folder = work / "chat.jsonl", str(folder_of(args.tokenizer))
    conversations(path, args.sft)
    old, size = earlier(work, args.before), path.stat().st_size / 1e6
    (work / "sft.py").write_text(SFT)
    found: dict[tuple[str, str], list[tuple[tuple[float, float], object]]] = {}
    for number in range(args.rounds):
        for name, source in ((f"before ({args.before})", old), ("now", ROOT)):
            count = "0" if source == old else str(args.workers)
            cache = work / f"cache{number}-{count}"
            words = [str(work / "sft.py"), folder, str(path), str(cache), count]
            for what, own in (("to packs", words), ("tokens alone", ["-c", TOKENS, *words[1:3]])):
                said = json.loads(run(own, source).said.splitlines()[-1])
                found.setdefault((what, name), []).append((said["seconds"], said["print"]))
            shutil.rmtree(cache)
    print(f"{size:.0f} MB of conversations, packs now with {args.workers} processes\n")
    print("| what | side | s | CPU s | MB per CPU s |\n|" + " --- |" * 5)
    for (what, name), ran in found.items():
        seconds, cpu = (median([own[i] for own, _ in ran]) for i in (0, 1))
        print(f"| {what} | {name} | {seconds:.2f} | {cpu:.2f} | {size / cpu:.1f} |")
    prints = {(what, p) for (what, _), ran in found.items() for _, p in ran}
    print(f"\nthe same sequences: {len(prints) == 2}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megatron-lm", type=Path, help="a checkout of Megatron-LM")
    parser.add_argument("--before", default=BEFORE, help="a commit of this repository")
    parser.add_argument("--tokenizer", default="builtin:stdlib-tokenizer")
    parser.add_argument("--megabytes", type=float, default=200)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory", type=float, help="GB: memory over a corpus of this size")
    parser.add_argument("--sft", type=float, help="MB: instruction data instead")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as name:
        chosen = memory if args.memory else instructions if args.sft else against
        chosen(args, Path(name))


if __name__ == "__main__":
    main()
