"""What a run would make of its data, from a sample of records: for a dry run, doctor and `init`.

Bounded: RECORDS records of a set are looked at, spread over at most FILES of its files: over all of
a file when the set has up to WHOLE bytes, else its first ones. No more are read once half of
SECONDS have passed, and none tokenised after all of them. Lines are counted in the first COUNTED
bytes of a set; how many the rest has follows from those.
"""

import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import batched, islice, zip_longest
from pathlib import Path
from statistics import median
from typing import Any

from moetrain.config.recipe import Recipe
from moetrain.data import assets, index_files, packing
from moetrain.data.encode import Encoder, Result, SetKind, Spec
from moetrain.data.loader import kind_of, limit
from moetrain.data.messages import FormatError
from moetrain.data.prompts import read_prompt
from moetrain.data.rejects import Reject, noted
from moetrain.data.samples import Prompt
from moetrain.data.show import View
from moetrain.data.sources import Record, Source, find_sources, read_rows
from moetrain.errors import plural

RECORDS = 256
SECONDS = 10.0
WHOLE = 64 * 2**20
COUNTED = 2**30
FILES = 32
CHUNK = 16  # records between two looks at the clock
FEW_PACKS = 8  # of a sample, which say little about how full packs of all records are


@dataclass
class Preview:
    """A sample of one set, and what became of its records."""

    key: str  # of the recipe: data.train, ...
    num_records: int = 0  # of the whole set
    is_counted: bool = True  # and not estimated
    num_seen: int = 0
    rejects: list[Reject] = field(default_factory=list[Reject])
    num_cut: int = 0
    sizes: list[int] = field(default_factory=list[int])  # tokens that usable ones take in a pack
    prompts: list[Prompt] = field(default_factory=list[Prompt])  # of methods that sample
    notes: Counter[str] = field(default_factory=Counter[str])
    template: list[str] = field(default_factory=list[str])  # what is to be said of it

    @property
    def is_whole(self) -> bool:
        """Whether nothing was left out."""
        return self.is_counted and self.num_seen == self.num_records

    @property
    def share_rejected(self) -> float:
        """Of the sample."""
        return len(self.rejects) / max(self.num_seen, 1)

    def num_packs(self, seq_len: int, pack: bool = True) -> int:
        """Of the whole set, as far as the sample says."""
        num: float = len(self.sizes)
        if pack and self.sizes:
            num = len(packing.pack(self.sizes, seq_len, 0))
            if num < FEW_PACKS and self.num_seen < self.num_records:
                num = sum(self.sizes) / seq_len
        return math.ceil(num * self.num_records / max(self.num_seen, 1))

    def lines(self, seq_len: int) -> list[str]:
        """In words."""
        about = "" if self.is_counted else "about "
        line = f"{self.key}: {about}{plural(self.num_records, 'record')}"
        if not self.num_seen:
            return [line]
        if self.sizes:
            line += f", {median(self.sizes):.0f} tokens each (median; longest {max(self.sizes)})"
        few = self.num_seen < self.num_records
        line += f"; of {'a sample of ' * few}{self.num_seen}, {len(self.rejects)} would be rejected"
        if self.num_cut:
            line += f", {self.num_cut} cut to data.seq_len={seq_len}"
        first = [f"{r.file}:{r.line}: {r.reason}" for r in self.rejects[:1]]
        return [line, *(f"the first that is rejected: {one}" for one in first),
                *noted(self.template, self.notes)]  # fmt: skip


def preview(recipe: Recipe, key: str, records: int = RECORDS) -> Preview | None:
    """A sample of what `key` of the recipe's data section names; None where it is empty, comes
    with the package, or is a corpus. Raises DataError for what is missing or damaged.
    """
    given: list[str] = vars(recipe.data)[key]
    paths = [path for path in given if not assets.is_builtin(path)]
    if not paths or recipe.method.learns_from == "corpus":
        return None
    shown = Preview(f"data.{key}")
    view = View(recipe, demonstrations=key == "demonstrations")
    shown.template = view.chat.notes()
    deadline = time.monotonic() + SECONDS
    sources = {
        number: find_sources([path], held_out=key == "eval")
        for number, path in enumerate(given)
        if not assets.is_builtin(path)
    }
    counted = _Counted(deadline - SECONDS / 2)
    for number, files in sources.items():
        shown.num_records += _taken(recipe, key, number, sum(map(counted.count, files)))
    shown.is_counted = counted.is_exact
    rows = _rows([source for files in sources.values() for source in files], counted, records)
    if view.learns_from == "prompts":
        for row in rows:
            _prompt(view, row, shown)
            if time.monotonic() > deadline:
                break
        return shown
    kind = kind_of(view.recipe.method)
    encoder, results = Encoder(kind, view.spec()), list[Result]()
    for chunk in batched(rows, CHUNK):
        results += encoder(chunk)
        if time.monotonic() > deadline:
            break
    results.sort(key=lambda result: (result.file, result.line))  # neighbours, for `join`
    _take_in(shown, kind, results, encoder.spec)
    return shown


def _take_in(preview: Preview, kind: SetKind, results: list[Result], spec: Spec) -> None:
    """Add what became of records to `found`."""
    joined = results if kind.join is None else kind.join(results, spec)
    for result in joined:
        preview.num_seen += 1
        if result.reason is not None:
            preview.rejects.append(Reject(result.file, result.line, result.reason))
        preview.notes.update(result.notes)
        preview.num_cut += any(group.truncated for group in result.groups)
        preview.sizes += [group.num_tokens for group in result.groups]


def _prompt(view: View, row: Record | Reject, preview: Preview) -> None:
    recipe = view.recipe
    preview.num_seen += 1
    if isinstance(row, Reject):
        preview.rejects.append(row)
        return
    try:
        prompt, notes = read_prompt(
            row.value, view.chat, recipe.data.seq_len - recipe.sampling[1].max_tokens
        )
    except FormatError as error:
        preview.rejects.append(Reject(row.file, row.line, str(error)))
        return
    preview.sizes.append(len(prompt.tokens))
    preview.prompts.append(replace(prompt, source=row.file))
    preview.notes.update(notes)


def _taken(recipe: Recipe, key: str, number: int, num: int) -> int:
    """Records of a path that are learned from, of `num`."""
    data = recipe.data
    if key != "train":
        return num
    wanted = data.take[number] if data.take is not None else None
    held = max(int(min(num, wanted or num) * data.eval_share), 1) if data.eval_share else 0
    return (wanted or num) - held


class _Counted:
    """Records of sources, counted until COUNTED bytes of lines are read or `deadline` is past, then
    estimated from the bytes of those before.
    """

    def __init__(self, deadline: float) -> None:
        self.deadline, self.is_exact = deadline, True
        self.num_bytes = 0  # of all sources
        self.nums: dict[Path, int] = {}
        self._left = COUNTED
        self._known = [0, 0]  # records, and the bytes that they take

    def count(self, source: Source) -> int:
        size = sum(file.stat().st_size for file in source.files)
        self.num_bytes += size
        if not self._known[1] or time.monotonic() < self.deadline:
            num, read = self._look(source, size)
            self._known = [self._known[0] + num, self._known[1] + read]
        else:
            num, read = 0, 0
        if read < size:
            self.is_exact = False
            num = max(1, round(size * self._known[0] / max(self._known[1], 1)))
        self.nums[source.path] = num
        return num

    def _look(self, source: Source, size: int) -> tuple[int, int]:
        """(records, the bytes of the source that they are in)."""
        path = source.path
        if path.is_dir():
            import datasets

            loaded: Any = datasets.load_from_disk(str(path))
            return len(loaded), size
        if path.suffix == ".parquet":
            import pyarrow.parquet

            return pyarrow.parquet.read_metadata(path).num_rows, size
        if path.suffix == ".json" and _is_list(path):  # which is read whole, as a run does
            return sum(1 for _ in read_rows(source)), size
        if path.suffix not in (".jsonl", ".json"):
            return 1, size
        read = size if size <= self._left else min(self._left, WHOLE)
        self._left -= read
        return _lines(path, read), read


def _rows(sources: Sequence[Source], counted: _Counted, records: int) -> list[Record | Reject]:
    """About `records` rows, in turn from each of at most FILES files, so that the first of them
    are a sample too.
    """
    chosen = sources[:: math.ceil(len(sources) / FILES) or 1]
    wanted = math.ceil(records / max(len(chosen), 1))
    each: list[list[Record | Reject]] = []
    for source in chosen:
        stride = max(1, counted.nums[source.path] // wanted) if counted.num_bytes <= WHOLE else 1
        stop = wanted if stride == 1 and counted.num_bytes > WHOLE else None
        each.append(list(islice(read_rows(source), 0, stop, stride)))
        if time.monotonic() > counted.deadline:
            break
    return [row for turn in zip_longest(*each) for row in turn if row is not None]


def _is_list(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(64).lstrip()[:1] == b"["


def _lines(path: Path, most: int) -> int:
    """Lines in the first `most` bytes of a file; one without an end counts."""
    num, last = 0, b"\n"
    with path.open("rb") as file:
        while block := file.read(min(2**24, most)):
            num, most, last = num + block.count(b"\n"), most - len(block), block[-1:]
    return num + (last != b"\n")


def previews(recipe: Recipe) -> list[Preview]:
    """Of all that the recipe's data section names."""
    previews = (preview(recipe, key) for key in ("train", "eval", "demonstrations"))
    return [one for one in previews if one is not None]


def lengths(recipe: Recipe, previews: Sequence[Preview]) -> list[str]:
    """How long an epoch is, and the run, in words."""
    train = next((one for one in previews if one.key == "data.train"), None)
    packs, unit = epoch_of(recipe, train)
    if not packs:
        return []
    rollout = recipe.rollout
    batch = rollout.prompts_per_step if rollout is not None else recipe.train.global_batch
    about = "" if train is None or train.is_whole else "about "
    line = f"an epoch: {about}{plural(packs, unit)}, {packs / batch:.3g} steps of {batch}"
    if recipe.train.epochs is not None:
        steps = math.ceil((limit(recipe, packs) or packs) / batch)
        return [f"{line}; train.epochs={recipe.train.epochs:g}: {about}{plural(steps, 'step')}"]
    assert recipe.train.steps is not None
    epochs = f"{recipe.train.steps * batch / packs:.2g}"
    line += f"; train.steps={recipe.train.steps}: {about}{epochs} epoch{'s' * (epochs != '1')}"
    return [line]


def epoch_of(recipe: Recipe, train: Preview | None) -> tuple[int, str]:
    """(packs or prompts of an epoch, what they are); 0 where nobody has looked."""
    if recipe.method.learns_from == "corpus":
        given = recipe.data.train
        if any(map(assets.is_builtin, given)):
            return 0, ""
        prefixes = [Path(p.removesuffix(".bin").removesuffix(".idx")) for p in given]
        return sum(index_files.num_samples(p, recipe.data.seq_len) for p in prefixes), "sample"
    if train is None or not train.sizes:
        return 0, ""
    if recipe.method.samples:
        return round(train.num_records * (1 - train.share_rejected)), "prompt"
    return train.num_packs(recipe.data.seq_len, recipe.data.pack), "pack"
