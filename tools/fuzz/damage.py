#!/usr/bin/env python
"""Flipped bytes in exports, adapters and checkpoints: each is refused in a line by every command
that reads its file, and changes nothing for the others.

Which files a command reads is seen, not declared: the kernel tells which it opens (inotify). Each
pair of a command and a file that it reads has its turn before any has a second one, weights in
every other flip. The commands are the real ones, each in a process forked from this one.
"""

import argparse
import contextlib
import hashlib
import importlib
import itertools
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from apart import Done, apart

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

MEASURED = {"seconds", "tokens_per_s", "memory_gib"}
PLAIN = ["observe.tensorboard=false", "observe.progress=false", "checkpoint.export_hf=false"]
DRAWN = ["rollout.engine=embedded", "rollout.max_tokens=4"]
RESUME = "train (resume)"
WEIGHTS = (".safetensors", ".distcp")
SAMPLE_OF_UNREAD = 10  # of so many flips one is tried on a command that does not read its file


@dataclass(frozen=True)
class Case:
    """A command that reads a folder: its words, and what it makes."""

    name: str
    folder: Path  # in which bytes are flipped
    words: Callable[[Path], list[str]]  # of a folder to write into
    ready: Callable[[Path], None] = lambda out: None


@dataclass
class Bench:
    """The folders that are damaged, and what reads them."""

    place: Path

    def build(self) -> list[Case]:
        """Make a model, its export, an adapter, and runs with checkpoints of both."""
        from moetrain import cli

        place, base = self.place, "builtin:qwen3-moe-tiny"
        recipe = place / "sft.yaml"
        lines = [json.dumps({"messages": _talk(i)}) + "\n" for i in range(16)]
        (place / "train.jsonl").write_text("".join(lines))
        (place / "texts.jsonl").write_text('{"text": "Two and two."}\n' * 2)
        prompts = [json.dumps({"prompt": f"{i} + 1?", "answer": str(i + 1)}) for i in range(2)]
        (place / "prompts.jsonl").write_text("\n".join(prompts) + "\n")
        (place / "bench.yaml").write_text(
            "name: sums\ndata: prompts.jsonl\nquestion: prompt\nscorer: accuracy\n"
            "rollout: {engine: embedded, max_tokens: 4}\n"
        )
        recipe.write_text(
            f"run_dir: {place / 'run'}\nmodel: {{path: '{base}', dtype: fp32}}\nmethod: sft\n"
            f"data: {{train: [{place / 'train.jsonl'}], seq_len: 64, cache: {place / 'cache'}}}\n"
            "optim: {lr: 1.0e-3, schedule: constant}\ntrain: {steps: 2, global_batch: 2}\n"
        )
        lora = "adapter={rank: 2}"
        full = ["checkpoint.export_hf=true"]
        made = [
            ["train", str(recipe), *PLAIN, *full],
            ["train", str(recipe), *PLAIN, f"model.path={place}/run/hf", f"run_dir={place}/lora",
             lora],
            ["convert", "adapter", f"{place}/lora", f"{place}/peft"],
        ]  # fmt: skip
        for words in made:
            done = apart(lambda words=words: cli.main(words), place)
            assert done.code == 0, (words, done.said)
            preload(done.imported)
        shutil.copytree(place / "run/hf", place / "export")
        return self.cases(recipe)

    def cases(self, recipe: Path) -> list[Case]:
        place = self.place
        export, peft, whole = place / "export", place / "peft", place / "run/hf"
        step = Path("checkpoints/step_00000002")
        checkpoint, adapter = place / "run" / step, place / "lora" / step

        def train(*more: str) -> Callable[[Path], list[str]]:
            return lambda out: ["train", str(recipe), *PLAIN, f"run_dir={out}/run", *more]

        def ahead(run: Path) -> Callable[[Path], None]:
            return lambda out: _linked(run, out / "run")

        def convert(action: str, *words: Path) -> Callable[[Path], list[str]]:
            return lambda out: ["convert", action, *map(str, words), str(out / "made")]

        def score(model: Path) -> Callable[[Path], list[str]]:
            return lambda out: ["score", str(model), f"{place}/texts.jsonl", "--out", f"{out}/s"]

        def sample(model: Path, *more: str) -> Callable[[Path], list[str]]:
            return lambda out: ["sample", str(model), f"{place}/prompts.jsonl", "--out",
                                f"{out}/s.jsonl", "-k", "1", *DRAWN, *more]  # fmt: skip

        def bench(model: Path) -> Callable[[Path], list[str]]:
            return lambda out: [
                "eval",
                str(model),
                f"{place}/bench.yaml",
                "--out",
                f"{out}/e.jsonl",
            ]

        def verify(a: Path) -> Callable[[Path], list[str]]:
            return lambda out: ["convert", "verify", str(a), str(whole)]

        found = [
            Case("convert hf2mcore", export, convert("hf2mcore", export)),
            Case("convert merge", export, convert("merge", export, peft)),
            Case("convert expand", export, convert("expand", export)),
            Case("train model.path=", export, train(f"model.path={export}")),
            Case("convert mcore2hf", checkpoint, convert("mcore2hf", checkpoint)),
            Case("train model.path=", checkpoint, train(f"model.path={checkpoint}")),
            Case(RESUME, checkpoint, train("train.steps=3"), ahead(place / "run")),
            Case("convert merge", peft, convert("merge", whole, peft)),
            Case("train adapter.path=", peft,
                 train(f"model.path={whole}", f"adapter={{path: {peft}}}")),
            Case("sample adapter.path=", peft, sample(whole, f"adapter={{path: {peft}}}")),
            Case("convert adapter", adapter, convert("adapter", adapter)),
            Case("convert merge", adapter, convert("merge", whole, adapter)),
            Case("sample", adapter, sample(adapter)),
            Case(RESUME, adapter, train(f"model.path={whole}", "adapter={rank: 2}",
                                        "train.steps=3"), ahead(place / "lora")),
        ]  # fmt: skip
        for model in (export, checkpoint):
            found += [
                Case("convert verify", model, verify(model)),
                Case("score", model, score(model)),
                Case("sample", model, sample(model)),
                Case("eval", model, bench(model)),
            ]
        return found

    def run(self, case: Case, *, watch: bool = False) -> Done:
        """The command in a process of its own."""
        from moetrain import cli

        out = Path(tempfile.mkdtemp(dir=self.place))
        # Where a checkpoint's adapter is kept, it is not read again.
        shutil.rmtree(self.place / "cache" / "adapters", ignore_errors=True)
        try:
            case.ready(out)
            words = case.words(out)
            done = apart(lambda: cli.main(words), self.place, case.folder if watch else None)
            done.made = _digest(out)
            return done
        finally:
            shutil.rmtree(out)


def _talk(i: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"{i} + {i}"}, {"role": "assistant", "content": f"{2 * i}"}]


def _linked(run: Path, out: Path) -> None:
    """A run that goes on from the checkpoint of `run`, which stays in its place."""
    (out / "checkpoints").mkdir(parents=True)
    for path in run.iterdir():
        if path.is_file():
            shutil.copy(path, out / path.name)
    text = (out / "resolved.yaml").read_text().replace(str(run), str(out))
    (out / "resolved.yaml").write_text(text)
    for step in (run / "checkpoints").glob("step_*"):
        (out / "checkpoints" / step.name).symlink_to(step)


def _digest(out: Path) -> str:
    """Of what a command made: weights, scores, answers, losses; not of times and paths."""
    digest = hashlib.sha256()
    for path in sorted(out.rglob("*")):
        if path.suffix in WEIGHTS or path.name in ("s", "tokenizer.json"):
            digest.update(path.name.encode() + path.read_bytes())
        elif path.name == "ledger.jsonl":
            rows = [json.loads(line) for line in path.read_text().splitlines()]
            kept = [{k: v for k, v in row.items() if k not in MEASURED} for row in rows]
            digest.update(json.dumps(kept).encode())
    return digest.hexdigest()


def flip(path: Path, place: int, bits: int) -> None:
    with path.open("r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ bits]))
    os.utime(path)  # so that no two contents have one time


def preload(names: Iterable[str] = ()) -> None:
    """What the commands import, once for all of them: a thousand modules are most of the time that
    a refusal takes.
    """
    for name in names:
        with contextlib.suppress(Exception, SystemExit):
            importlib.import_module(name)
    import moetrain.answers.sample
    import moetrain.engine.on_disk
    import moetrain.evals.evaluate
    import moetrain.loops.score
    import moetrain.loops.supervised
    import moetrain.weights.derived  # noqa: F401
    from moetrain.engine import device

    device.prepare()


def hunt(bench: Bench, cases: Sequence[Case], args: argparse.Namespace) -> int:
    """Flip bytes until it is told to stop, at the latest; the number of faults."""
    whole = {case: bench.run(case, watch=True) for case in cases}
    for case, done in whole.items():
        assert done.code == 0, (case.name, done.said)
    preload(name for done in whole.values() for name in done.imported)
    print(f"{len(cases)} commands read what is whole", flush=True)
    counts: Counter[tuple[str, str, str]] = Counter()
    rng, end = random.Random(args.seed), time.monotonic() + args.seconds
    folders = list(dict.fromkeys(case.folder for case in cases))
    spare = {path: places for f in folders for path, places in _optimizer(f).items()}
    flips = faults = 0
    try:
        for path, chosen in turns(whole, rng, args.all):
            if flips == args.flips or time.monotonic() > end:
                break
            place = path, rng.randrange(path.stat().st_size), rng.randrange(1, 256)
            own = {case: done for case, done in whole.items() if case.folder == path.parent}
            kind = bench_name(bench, path.parent)
            for name, what, said in one(bench, own, place, spare.get(path, []), chosen, rng):
                counts[kind, name, what] += 1
                if what.startswith("FAULT"):
                    faults += 1
                    print(f"{what}: {name}, {place}: {said[-600:]}", flush=True)
            flips += 1
            if flips % 25 == 0:
                print(f"{flips} flips, {counts.total()} commands, {faults} faults", flush=True)
    except KeyboardInterrupt:
        print("stopped")
    for (kind, name, what), count in sorted(counts.items()):
        print(f"{count:6d}  {kind:16s} {name:22s} {what}")
    print(f"{flips} flipped bytes, {counts.total()} commands, {faults} faults")
    return faults


def turns(
    whole: Mapping[Case, Done], rng: random.Random, every: bool
) -> Iterator[tuple[Path, list[Case]]]:
    """(file, commands to try of those that read it) without an end; of weights and of other files
    in turns, each pair as often as the others of its kind.
    """
    pairs = [
        (case.folder / name, case)
        for case, done in whole.items()
        for name in sorted(done.opened)
        if (case.folder / name).is_file() and (case.folder / name).stat().st_size
    ]
    weights = [pair for pair in pairs if pair[0].suffix in WEIGHTS]
    others = [pair for pair in pairs if pair[0].suffix not in WEIGHTS]
    print(f"{len(weights)} pairs of a command and a file of weights, {len(others)} of another file")
    left: list[list[tuple[Path, Case]]] = [[], []]
    for number in itertools.count():
        kind = left[number % 2]
        if not kind:
            kind += (weights, others)[number % 2]
            rng.shuffle(kind)
        path, case = kind.pop()
        yield path, [c for p, c in pairs if p == path] if every else [case]


def one(
    bench: Bench,
    whole: Mapping[Case, Done],
    flipped: tuple[Path, int, int],
    spare: Sequence[tuple[int, int]],
    chosen: Sequence[Case],
    rng: random.Random,
) -> Iterator[tuple[str, str, str]]:
    """(command, what came of it, what it said) of the chosen ones that read a flipped byte's file,
    and of one that does not, now and then.
    """
    path, place, _ = flipped
    reading = [case for case, done in whole.items() if path.name in done.opened]
    others = [case for case in whole if case not in reading]
    if others and not rng.randrange(SAMPLE_OF_UNREAD):
        chosen = [*chosen, rng.choice(others)]
    flip(*flipped)
    try:
        for case in chosen:
            spared = case.name != RESUME and any(a <= place < b for a, b in spare)
            done = bench.run(case)
            yield case.name, _outcome(done, whole[case], case in reading, spared), done.said
    finally:
        flip(*flipped)


def bench_name(bench: Bench, folder: Path) -> str:
    return str(folder.relative_to(bench.place)).replace("checkpoints/step_00000002", "checkpoint")


def _optimizer(folder: Path) -> dict[Path, list[tuple[int, int]]]:
    """Where the optimizer's state lies in a checkpoint's files: a resume alone reads it, but what
    shares a block with weights is checked with them.
    """
    from moetrain.engine.pickles import index_of
    from moetrain.weights.torch_index import INDEX

    found: dict[Path, list[tuple[int, int]]] = {}
    for place, part in index_of(folder).storage_data.items() if (folder / INDEX).is_file() else ():
        if place.fqn.startswith(("optimizer", "chained_")):
            own = found.setdefault(folder / part.relative_path, [])
            own.append((part.offset, part.offset + part.length))
    return found


def _outcome(done: Done, whole: Done, reads: bool, spared: bool) -> str:
    if done.code == 2 and len(done.said.splitlines()) == 1 and "moetrain: error: " in done.said:
        return "refused" if reads else "refused, though not read"
    if done.code:
        return "FAULT ended otherwise"
    if reads and not spared:
        return "FAULT read and not refused"
    return "not read, same result" if done.made == whole.made else "FAULT another result"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--flips", type=int, default=1000, help="bytes (1000)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=1e9, help="end after so long")
    parser.add_argument("--all", action="store_true", help="each on every command that reads it")
    parser.add_argument("--only", default="", help="commands whose name begins so")
    args = parser.parse_args()
    preload()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        os.environ["MOETRAIN_CACHE"] = str(Path(folder) / "cache")
        bench = Bench(Path(folder))
        cases = [case for case in bench.build() if case.name.startswith(args.only)]
        return 1 if hunt(bench, cases, args) else 0


if __name__ == "__main__":
    sys.exit(main())
