"""What is fuzzed: how an input is made of a chance, and what is done with it.

A target returns what came of the input, in a word or two; MoetrainError is a refusal and anything
else that is raised is a fault.
"""

import copy
import json
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import adapters
import convert
import files
import folders
import mutate
import rooms
import seeds


@dataclass(frozen=True)
class Target:
    """`weight` is its share of the inputs."""

    weight: int
    make: Callable[[random.Random], Any]
    run: Callable[["Bench", Any], str]


class Bench:
    """What targets work with, made once: a folder for files, a small tokenizer, recipes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._encoders: dict[tuple[str, int], Any] = {}

    @cached_property
    def tokenizer(self) -> Path:
        """Of 600 tokens."""
        from moetrain.data import tokenizer_training

        text = self.folder / "text.txt"
        text.write_text((seeds.ROOT / "docs" / "rewards.md").read_text())
        return tokenizer_training.train([text], 600, self.folder / "tokenizer")

    @cached_property
    def conversions(self) -> convert.Place:
        """Folders of weights."""
        return convert.build(self.folder / "conversions")

    @cached_property
    def judged(self) -> rooms.Judged:
        """A judge with a server."""
        return rooms.Judged()

    def chat(self, how: Any) -> Any:
        """With what is done about control tokens in texts."""
        from moetrain.data.chat import ChatOptions

        key = (how, 0)
        if key not in self._encoders:
            options = ChatOptions(seeds.TEMPLATES[0], special_tokens=how)
            self._encoders[key] = options.open(self.tokenizer)
        return self._encoders[key]

    def encoder(self, name: str, template: int) -> Any:
        """Of a kind of set, with a tokenizer that is loaded once."""
        from moetrain.data.chat import ChatOptions
        from moetrain.data.encode import Encoder, Spec
        from moetrain.data.loader import KINDS

        key = (name, template)
        if key not in self._encoders:
            chat = ChatOptions(seeds.TEMPLATES[template])
            spec = Spec((), self.tokenizer, 256, "truncate", 1, chat=chat)
            self._encoders[key] = Encoder(KINDS[name], spec)
        return self._encoders[key]


# Records


def make_record(rng: random.Random) -> dict[str, Any]:
    """Bytes of a file with a few records, and how they are read."""
    ending = rng.choices(("jsonl", "json", "parquet", "txt"), (70, 8, 20, 2))[0]
    records: list[Any] = [
        copy.deepcopy(rng.choice(seeds.RECORDS)) for _ in range(rng.choice((1, 1, 2)))
    ]
    for _ in range(rng.choice((0, 1, 1, 2, 3, 6))):
        mutate.change_value(rng, records)
    how = {"ending": ending, "template": rng.randrange(len(seeds.TEMPLATES))}
    how["kind"] = rng.choice(("chat", "chat", "pairs", "labels"))
    if ending == "parquet":
        return how | {"records": records, "bytes": change_some(rng, b"", 0.0)}
    lines = [_dumped(rng, record) for record in records]
    text = "[" + ",".join(lines) + "]" if ending == "json" else "\n".join(lines)
    raw = text.encode("utf-8", "surrogatepass")
    return how | {"bytes": change_some(rng, raw, 0.3)}


def change_some(rng: random.Random, raw: bytes, chance: float) -> bytes:
    while rng.random() < chance:
        raw = mutate.change_bytes(rng, raw)
    return raw


def _dumped(rng: random.Random, record: Any) -> str:
    try:
        text = json.dumps(record, ensure_ascii=rng.random() < 0.7)
    except (RecursionError, ValueError):
        text = "[" * 5000
    if rng.random() < 0.02:
        text = text.replace("2", "9" * 5000, 1)
    return text


def run_record(bench: Bench, made: dict[str, Any]) -> str:
    """In every command that reads records."""
    from moetrain.data.sources import Record, find_sources, read_rows

    path = bench.folder / f"a.{made['ending']}"
    if made["ending"] == "parquet":
        if not _write_parquet(path, made["records"]):
            return "no table"
    else:
        path.write_bytes(made["bytes"])
    rows = [row for source in find_sources([path]) for row in read_rows(source)]
    counts: Counter[str] = Counter()
    for result in bench.encoder(made["kind"], made["template"])(rows):
        counts["refused" if result.reason is not None else "used"] += 1
    for row in rows:
        if isinstance(row, Record):
            counts.update(_other_commands(bench, row, made["template"]))
    _corpus_commands(bench, path)
    return "used" if counts["used"] else "rejected"


def _write_parquet(path: Path, records: list[Any]) -> bool:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from moetrain.data.parsing import check

    try:
        check(records)  # of what is nested too deeply pyarrow may take gigabytes to make no table
        names = {name for record in records for name in record}
        rows = [{name: record.get(name) for name in names} for record in records]
        pq.write_table(pa.Table.from_pylist(rows), path)
    except Exception:  # what has no type is no table
        return False
    return True


def _other_commands(bench: Bench, row: Any, template: int) -> list[str]:
    """What RL, sample, eval and score make of a row."""
    from moetrain.config.bench import BenchConfig
    from moetrain.data.formats import FormatError
    from moetrain.data.prompts import read_prompt
    from moetrain.errors import MoetrainError
    from moetrain.evals.questions import _asked
    from moetrain.loops.score import _checked

    chat = bench.encoder("chat", template).chat
    question = next(iter(row.value), "question")
    config = BenchConfig.model_construct(
        name="b", question=question, answer=None, prompt="{question} {answer}", system=None
    )
    found: list[str] = []
    for one in (
        lambda: read_prompt(row.value, chat, 200),
        lambda: read_prompt(_asked(config, row.value, "f:1"), chat, 200),
        lambda: _checked(row.value.get("tokens"), 600, row, "f:1"),
        lambda: chat.tokenizer(row.value["text"]) if isinstance(row.value.get("text"), str) else 0,
    ):
        try:
            one()
            found.append("used")
        except (MoetrainError, FormatError):
            found.append("refused")
    json.dumps(row.value)  # a rollout's file
    return found


def _corpus_commands(bench: Bench, path: Path) -> None:
    from moetrain.data import text_tokenizer, tokenizer_training
    from moetrain.data.indexing import Indexer, Options
    from moetrain.data.pieces import Place, pieces
    from moetrain.data.rejects import Reject, write_rejects
    from moetrain.data.sources import find_sources

    rejects: list[Reject] = []
    list(tokenizer_training._all_texts([path], rejects))
    loaded = bench.encoder("chat", 0).chat.tokenizer
    options = Options(special_tokens="escape")
    indexer = Indexer(text_tokenizer.of(loaded, 0), text_tokenizer.SLOW, options)
    for piece in pieces(find_sources([path]), Place()):
        rejects += indexer(piece).rejects
    write_rejects(bench.folder / "rejected.jsonl", rejects)


def make_answers(rng: random.Random) -> bytes:
    row = copy.deepcopy(seeds.ANSWERS)
    for _ in range(rng.choice((0, 1, 1, 2, 4))):
        mutate.change_value(rng, row)
    raw = _dumped(rng, row).encode("utf-8", "surrogatepass") + b"\n"
    return change_some(rng, raw, 0.2)


def run_answers(bench: Bench, made: bytes) -> str:
    """In `moetrain pairs`."""
    from moetrain.answers.choose import _rows
    from moetrain.data.pairing import Choice, gather, pairs, right_answers

    path = bench.folder / "answers.jsonl"
    path.write_bytes(made)
    rows = list(_rows([[path]]))
    choice = Choice()
    chosen = pairs(gather(rows, choice), choice)
    right_answers(gather(rows, Choice(by="exact", cut=True)), choice)
    json.dumps(chosen.records, ensure_ascii=False).encode()
    return "used"


# Recipes


DRY_RUNS = 0.03  # of recipes: one of a large model takes seconds, most others milliseconds


def make_recipe(rng: random.Random) -> tuple[bytes, list[str], bool]:
    text = rng.choice(seeds.recipes()).read_text(encoding="utf-8")
    for _ in range(rng.choice((0, 1, 1, 2, 3))):
        if rng.random() < 0.5:
            lines = text.splitlines()
            mutate.change_words(rng, lines, [f"  {o.replace('=', ': ')}" for o in seeds.OVERRIDES])
            text = "\n".join(lines)
        else:
            text = mutate.change_text(rng, text)
    raw = change_some(rng, text.encode("utf-8", "surrogatepass"), 0.05)
    overrides = make_overrides(rng) if rng.random() < 0.3 else []
    return raw, overrides, rng.random() < DRY_RUNS


def make_overrides(rng: random.Random) -> list[str]:
    words = [rng.choice(seeds.OVERRIDES) for _ in range(rng.choice((1, 1, 2, 4)))]
    for i, word in enumerate(words):
        key, _, value = word.partition("=")
        while rng.random() < 0.5:
            if rng.random() < 0.3:
                key = mutate.change_text(rng, key)
            else:
                value = rng.choice((mutate.change_text(rng, value), _yaml(rng)))
        words[i] = f"{key}={value}"
    return words


def _yaml(rng: random.Random) -> str:
    try:
        return json.dumps(mutate.nasty(rng))
    except (RecursionError, ValueError):
        return "[" * 3000


def run_recipe(bench: Bench, made: tuple[bytes, list[str], bool]) -> str:
    """As `moetrain train RECIPE key=value`, up to the first process, or with --dry-run."""
    from moetrain.config.load import dump_recipe, load_recipe
    from moetrain.run.dry_run import dry_run

    raw, overrides, dry = made
    path = bench.folder / "recipe.yaml"
    path.write_bytes(raw)
    recipe = load_recipe(path, overrides)
    dump_recipe(recipe).encode()
    if dry:
        dry_run(recipe, None).encode()
    return "used"


def make_override_case(rng: random.Random) -> tuple[bytes, list[str], bool]:
    path = rng.choice(seeds.recipes())
    return path.read_bytes(), make_overrides(rng), rng.random() < DRY_RUNS


# Commands


def make_command(rng: random.Random) -> str:
    from moetrain.interop.swift.table import TABLE

    text = rng.choice(seeds.SWIFT)
    words_of = (value for entry in TABLE for value in vars(entry).values())
    flags = [f"--{word}" for word in words_of if isinstance(word, str) and word.isidentifier()]
    for _ in range(rng.choice((0, 1, 2, 3, 6))):
        if rng.random() < 0.5:
            text = mutate.change_text(rng, text)
        else:
            words = text.split(" ")
            mutate.change_words(rng, words, flags)
            text = " ".join(words)
    return text


def run_command(bench: Bench, made: str) -> str:
    """As `moetrain swift import`, and export of what came of it."""
    from moetrain.config.load import recipe_from
    from moetrain.config.yaml_text import parse_value
    from moetrain.interop import swift

    text, script = swift.command_text(made)
    imported = swift.from_swift(text, 100, script)
    text = imported.yaml()
    text.encode()
    # What a flag's value says must not become a line of its own.
    assert parse_value(text, "the recipe") == imported.content, text
    recipe = recipe_from(imported.content)
    swift.to_swift(recipe.model_dump(mode="json")).text.encode()
    return "used"


TARGETS: dict[str, Target] = {
    "records": Target(40, make_record, run_record),
    "prompts": Target(6, files.make_prompts, files.run_prompts),
    "answers": Target(6, make_answers, run_answers),
    "samples": Target(5, files.make_samples, files.run_samples),
    "benches": Target(6, files.make_bench, files.run_bench),
    "recipes": Target(4, make_recipe, run_recipe),
    "overrides": Target(6, make_override_case, run_recipe),
    "commands": Target(12, make_command, run_command),
    "cases": Target(6, files.make_cases, files.run_cases),
    "reports": Target(4, files.make_report, files.run_report),
    "indexes": Target(5, files.make_index, files.run_index),
    "tables": Target(6, files.make_table, files.run_table),
    "saved": Target(3, files.make_saved, files.run_saved),
    **{
        name: Target(*own)
        for name, own in {
            **rooms.ROOMS,
            **folders.FOLDERS,
            **convert.CONVERSIONS,
            **adapters.ADAPTERS,
        }.items()
    },
}
