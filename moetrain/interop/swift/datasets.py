"""What is trained and evaluated on: data sets, samples of them, and a share that is held out."""

import os
import re
from typing import Any

from moetrain.interop.swift.codecs import LIST, NUMBER, TEXT, Entry, Reading, Words, Writing

_SAMPLE = re.compile(r"(.+)#(\d{1,12})")


def split_sample(path: str) -> tuple[str, int | None]:
    """`a.jsonl#500` as ("a.jsonl", 500); a file that is called so is itself."""
    match = _SAMPLE.fullmatch(path)
    if match is None or os.path.exists(path):
        return path, None
    return match[1], int(match[2])


class DataSets(Entry):
    """ms-swift takes the sample of a path that #N behind it says, and for evaluation a share of
    each. A cached data set is a folder of `save_to_disk` with the records as they were.
    """

    def __init__(self, corpora: tuple[str, ...]) -> None:
        self.corpora = corpora

    def read(self, reading: Reading) -> None:
        keys = reading.keys
        given = reading.parse("dataset", LIST) or []
        cached = reading.parse("cached_dataset", LIST) or []
        held_out = reading.parse("val_dataset", LIST) or []
        held_out += reading.parse("cached_val_dataset", LIST) or []
        if given or cached:
            self._train(reading, [*given, *cached])
        if held_out:
            keys["data.eval"] = [split_sample(path)[0] for path in held_out]
            if keys["data.eval"] != held_out:
                why = "#N takes a sample, which data.eval does not: make a file of it"
                reading.note("not carried", "val_dataset", why)
        if keys.get("method.name") in self.corpora and "truncation_strategy" in reading.given:
            why = "a corpus is cut into sequences of data.seq_len"
            reading.note("implied", "truncation_strategy", why)
        self._share(reading, bool(held_out), bool(given), bool(cached))

    def _train(self, reading: Reading, paths: list[str]) -> None:
        keys = reading.keys
        samples = [split_sample(path) for path in paths]
        if keys.get("method.name") in self.corpora:
            keys["data.train"] = paths  # `dataset` is named in CHANGES: it must become an index
            return
        keys["data.train"] = [path for path, _ in samples]
        if any(number == 0 for _, number in samples):
            reading.lost("dataset", "#0 takes no record")
        elif any(number is not None for _, number in samples):
            keys["data.take"] = [number for _, number in samples]

    def _share(self, reading: Reading, held_out: bool, given: bool, cached: bool) -> None:
        share = reading.parse("split_dataset_ratio", NUMBER)
        if not share:
            return
        flag = "split_dataset_ratio"
        if held_out:
            reading.note("implied", flag, "val_dataset goes before it")
        elif reading.given.get("streaming") in ((), ("true",), ("True",)):
            reading.note("implied", flag, "nothing is split off a stream")
        elif not given:
            reading.note("implied", flag, "nothing is split off a cached data set")
        elif reading.keys.get("method.name") in self.corpora:
            reading.lost(flag, "data.eval of a corpus is another corpus: index one")
        elif not 0 < share < 1:
            reading.lost(flag, "data.eval_share is less than 1")
        else:
            reading.keys["data.eval_share"] = share
            if cached:
                why = "is taken of every path here, there not of cached data sets"
                reading.note("changed", flag, why)

    def write(self, writing: Writing) -> None:
        keys = writing.keys
        writing.covered |= {"data.train", "data.take", "data.eval", "data.eval_share"}
        take = keys.get("data.take") or [None] * len(keys.get("data.train", []))
        train = list(zip(keys.get("data.train", []), take, strict=False))
        for key, paths in (("train", [path for path, _ in train]), ("eval", keys.get("data.eval"))):
            self._write_paths(writing, key, paths or [])
        if train and "dataset" in writing.flags:
            writing.flags["dataset"] = tuple(
                path if number is None else f"{path}#{number}" for path, number in train
            )
        if keys.get("data.eval_share"):
            writing.flags["split_dataset_ratio"] = NUMBER.show(keys["data.eval_share"])

    @staticmethod
    def _write_paths(writing: Writing, key: str, paths: list[str]) -> None:
        flag = {"train": "dataset", "eval": "val_dataset"}[key]
        if any(path.startswith("builtin:") for path in paths):
            writing.lost(f"data.{key}", "builtin data are moetrain's own: give files")
        elif any(_SAMPLE.fullmatch(path) for path in paths):
            writing.lost(f"data.{key}", "ms-swift reads #N at a path's end as a sample: rename it")
        elif paths:
            writing.flags[flag] = tuple(paths)


class System(Entry):
    """The system message of records that have none: text, or a .txt file of it."""

    def read(self, reading: Reading) -> None:
        words: Words | None = reading.given.get("system")
        if words is None:
            return
        if reading.keys.get("method.name") in ("cpt", "pretrain"):
            reading.note("implied", "system", "a corpus has no chat template")
            return
        text = reading.parse("system", TEXT) or ""
        if text.endswith(".txt"):
            text = reading.near.read("--system", text)
        text = text.replace("\\n", "\n")
        if text:
            reading.keys["data.system"] = text
        else:  # there an empty one stands in place of the template's own
            reading.note("changed", "system", "is empty: the chat template's own, if any, stays")

    def write(self, writing: Writing) -> None:
        text: Any = writing.keys.get("data.system")
        writing.covered.add("data.system")
        if not text:
            return
        if str(text).endswith(".txt") or "\\n" in str(text):
            writing.lost("data.system", "ms-swift would read it as a file, or \\n as a new line")
        else:
            writing.flags["system"] = (str(text).replace("\n", "\\n"),)
