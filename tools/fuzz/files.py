"""What is fuzzed beside records, recipes and commands: benchmarks, prompts, saved answers, cases of
programs, folders of runs, indexed corpora, tables.
"""

import contextlib
import copy
import io
import json
import random
import shutil
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mutate
import seeds

if TYPE_CHECKING:
    from targets import Bench

Files = dict[str, bytes]  # path below a folder -> content


def changed(rng: random.Random, value: Any, most: int = 4) -> Any:
    value = copy.deepcopy(value)
    for _ in range(rng.randrange(most + 1)):
        if isinstance(value, dict | list):
            mutate.change_value(rng, value)
    return mutate.nasty(rng) if rng.random() < 0.03 else value


def dumped(value: Any) -> bytes:
    try:
        return json.dumps(value).encode()
    except (RecursionError, ValueError):
        return b"[" * 5000


def other_bytes(rng: random.Random, raw: bytes, chance: float = 0.2) -> bytes:
    while rng.random() < chance:
        raw = mutate.change_bytes(rng, raw)
    return raw


def lines(rng: random.Random, rows: tuple[Any, ...] | list[Any], most: int = 4) -> bytes:
    return other_bytes(rng, b"".join(dumped(changed(rng, row, most)) + b"\n" for row in rows), 0.1)


def fresh(bench: "Bench", name: str) -> Path:
    folder = bench.folder / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder


def laid(folder: Path, files: Files) -> None:
    for name, raw in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(raw)


# Benchmarks and prompts


def make_bench(rng: random.Random) -> tuple[bytes, bytes]:
    """The YAML of a benchmark and its file of questions."""
    number = rng.randrange(len(seeds.BENCHES))
    text = seeds.BENCHES[number]
    for _ in range(rng.choice((0, 0, 1, 2))):
        text = mutate.change_text(rng, text)
    rows = [seeds.QUESTIONS[number if rng.random() < 0.9 else -1]]
    return other_bytes(rng, text.encode("utf-8", "surrogatepass"), 0.05), lines(rng, rows, 2)


def run_bench(bench: "Bench", made: tuple[bytes, bytes]) -> str:
    from moetrain.config.bench import load_bench
    from moetrain.evals.questions import read_questions

    folder = fresh(bench, "bench")
    laid(folder, {"b.yaml": made[0], "q.jsonl": made[1]})
    loaded = load_bench(folder / "b.yaml")
    questions = read_questions(loaded, folder / "q.jsonl", bench.encoder("chat", 0).chat, 200)
    for one in questions:
        json.dumps(one.columns, ensure_ascii=False).encode()
    return "used"


def make_prompts(rng: random.Random) -> tuple[bytes, str]:
    rows = [rng.choice(seeds.RECORDS + seeds.QUESTIONS) for _ in range(rng.choice((1, 1, 2)))]
    return lines(rng, rows), rng.choice(("keep", "escape", "reject"))


def run_prompts(bench: "Bench", made: tuple[bytes, str]) -> str:
    """As RL, `sample` and `grade` read them."""
    from moetrain.answers.grade import read_items
    from moetrain.data.prompts import read_prompts
    from moetrain.errors import MoetrainError

    path = bench.folder / "prompts.jsonl"
    path.write_bytes(made[0])
    with contextlib.suppress(MoetrainError):
        read_items(path)
    found = read_prompts([path], bench.chat(made[1]), 200)
    for prompt in found.prompts:
        json.dumps(prompt.columns, ensure_ascii=False).encode()
    return "used"


# Answers that were saved


def make_samples(rng: random.Random) -> Files:
    rows = lines(rng, [seeds.SAMPLES], 1)
    samples = lines(rng, seeds.SAMPLES["answers"][:1], 1)
    manifest = other_bytes(rng, dumped(changed(rng, seeds.MANIFEST, rng.choice((0, 0, 2)))), 0.1)
    return {"a.jsonl": rows, "a.manifest.json": manifest, "a.jsonl.partial0": samples}


def run_samples(bench: "Bench", made: Files) -> str:
    """As `sample` and `eval` go on with them, and a run with its rollouts."""
    from moetrain.answers.file import AnswerFile
    from moetrain.loops.store import Store

    folder = fresh(bench, "samples")
    laid(folder, made)
    with AnswerFile(folder / "a.jsonl", {"model": ("m", "m")}, 3, {}):
        pass
    store = Store(folder)
    laid(folder, {store._path(1).name: b'{"cursor": 1}\n' + made["a.jsonl"]})
    store.read(1)
    return "used"


def make_cases(rng: random.Random) -> tuple[dict[str, Any], str, str]:
    columns = changed(rng, rng.choice(seeds.CASES), 3)
    text = rng.choice(seeds.PROGRAMS)
    for _ in range(rng.choice((0, 1, 2, 4))):
        text = mutate.change_text(rng, text)
    return columns if isinstance(columns, dict) else {}, text, mutate.change_text(rng, "1 2\n3\n")


def run_cases(bench: "Bench", made: tuple[dict[str, Any], str, str]) -> str:
    """What `code` makes of a record and an answer before it runs anything."""
    from moetrain.rewards.cases import problem_of
    from moetrain.rewards.code import block, same_output

    columns, text, out = made
    block(text, ["python", "cpp"], columns.get("language"))
    try:
        cases = problem_of(columns).cases
    except ValueError:
        return "refused"
    for case in cases:
        same_output(out, str(case.wanted), 1e-3)
    return "used" if cases else "no cases"


# Folders of runs


def make_report(rng: random.Random) -> Files:
    files: Files = {}
    for name, content in seeds.RUN.items():
        if rng.random() < 0.15:
            continue
        if isinstance(content, str):
            for _ in range(rng.choice((0, 0, 1, 2))):
                content = mutate.change_text(rng, content)
            files[name] = content.encode("utf-8", "surrogatepass")
        elif name.endswith(".jsonl"):
            files[name] = lines(rng, content)
        else:
            files[name] = other_bytes(rng, dumped(changed(rng, content)), 0.1)
    return files


def run_report(bench: "Bench", made: Files) -> str:
    """As `moetrain report`, and a run that goes on behind its ledger."""
    from moetrain.observe.collapse import Collapse
    from moetrain.observe.ledger import Ledger
    from moetrain.observe.overoptimisation import Watch
    from moetrain.observe.report import write_report
    from moetrain.observe.runs import last_row
    from moetrain.run.starts import read_starts

    folder = fresh(bench, "runs")
    laid(folder, made)
    with contextlib.redirect_stdout(io.StringIO()):
        write_report([folder], folder / "page.html")
    last_row(folder / "a")
    read_starts(folder / "a")
    if (path := folder / "a" / "ledger.jsonl").is_file():
        watches = (Watch(1.0), Collapse())
        Ledger(path, 11).close()
        for line in path.read_text().splitlines():
            for watch in watches:
                watch.row(json.loads(line))
    return "used"


# Corpora


@cache
def _index() -> Files:
    """An index of ten documents, made once."""
    import tempfile

    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    with tempfile.TemporaryDirectory() as name:
        import numpy as np

        prefix = Path(name) / "c"
        builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
        for number in range(10):
            builder.add_item(torch.arange(5 + number))
            builder.end_document()
        builder.finalize(f"{prefix}.idx")
        note = json.dumps(seeds.INDEX).encode()
        files = {end: Path(f"{prefix}.{end}").read_bytes() for end in ("bin", "idx")}
        return files | {"json": note}


def make_index(rng: random.Random) -> Files:
    files = {f"c.{end}": raw for end, raw in _index().items()}
    for name in rng.choices(tuple(files), (1, 4, 1), k=rng.choice((1, 1, 2))):
        raw = files[name]
        if name == "c.json":
            files[name] = dumped(changed(rng, seeds.INDEX))
        elif rng.random() < 0.7 and len(raw) > 8:  # a number in it is another one
            width = rng.choice((1, 4, 8))
            place = rng.randrange(min(len(raw), 90) if rng.random() < 0.5 else len(raw))
            number = rng.choice((0, 1, 2, 255, 2**16, 2**31 - 1, 2**31, 2**63 - 1, 2**64 - 1))
            value = (number % 256**width).to_bytes(width, "little")
            files[name] = raw[:place] + value + raw[place + width :]
        else:
            files[name] = mutate.change_bytes(rng, raw)
    return files


def run_index(bench: "Bench", made: Files) -> str:
    """As a run opens them, before its first step; what is taken gives its documents."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    from moetrain.data.corpus import CorpusSet

    folder = fresh(bench, "index")
    laid(folder, made)
    CorpusSet([str(folder / "c")], None, seq_len=8, seed=1, root=folder / "cache")
    found: Any = IndexedDataset(str(folder / "c"))
    for number in range(len(found)):
        found[number].sum()
    return "used"


# Tables


@cache
def _table() -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"prompt": "hi", "completion": "ho", "n": i, "list": [{"a": i}]} for i in range(3)]
    out = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), out)
    return out.getvalue()


def make_table(rng: random.Random) -> bytes:
    raw = _table()
    for _ in range(rng.choice((1, 1, 2, 5))):
        raw = mutate.change_bytes(rng, raw)
    return raw


def run_table(bench: "Bench", made: bytes) -> str:
    from moetrain.data.rejects import Reject
    from moetrain.data.sources import find_sources, read_rows

    path = bench.folder / "table.parquet"
    path.write_bytes(made)
    rows = [row for source in find_sources([path]) for row in read_rows(source)]
    return "rejected" if any(isinstance(row, Reject) for row in rows) else "used"


@cache
def _saved() -> Files:
    import tempfile

    import datasets

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "d"
        datasets.Dataset.from_list([{"text": "a"}, {"text": "b"}]).save_to_disk(folder)
        return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def make_saved(rng: random.Random) -> Files:
    files = dict(_saved())
    # Its .arrow file is mapped by its own reader, which a damaged one ends (docs/data.md).
    name = rng.choice([name for name in files if name.endswith(".json")])
    if rng.random() < 0.7:
        files[name] = dumped(changed(rng, json.loads(files[name])))
    else:
        files[name] = other_bytes(rng, mutate.change_bytes(rng, files[name]), 0.3)
    return files


def run_saved(bench: "Bench", made: Files) -> str:
    """A folder of `datasets.save_to_disk`."""
    from moetrain.data.sources import find_sources, read_rows

    folder = fresh(bench, "saved")
    laid(folder, made)
    for source in find_sources([folder]):
        list(read_rows(source))
    return "used"
