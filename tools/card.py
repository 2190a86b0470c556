"""What a card is: one claim of the docs, the command that shows it, and how far it may move.

A card is a file of cards/; docs/cards.md says what its keys mean. Figures that stand in a page are
found there by a pattern, so that page and card say the same.
"""

import json
import re
import shlex
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import Field, ValidationError, model_validator

from moetrain.config.load import explain, read_content
from moetrain.config.section import Count, Section
from moetrain.errors import ConfigError

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "cards"
UNITS = {"s": 1.0, "min": 60.0}
ELSEWHERE = ("cat", "ulimit", "venv")  # programs that are not of this repository


class Figure(Section):
    """A number of a claim, its bound, where it stands in the page, and how it is read."""

    what: str = Field(min_length=1)
    value: float | None = None
    unit: str = ""
    least: float | None = None
    most: float | None = None
    missed: str = ""
    shown: str = ""
    text: str = ""
    json_path: str = Field(default="", alias="json")
    clock: Literal["", "s", "min"] = ""

    @model_validator(mode="after")
    def _one_of_each(self) -> Self:
        if self.least is None and self.most is None:
            raise ValueError(f"{self.what}: give a bound, least or most")
        if sum(map(bool, (self.text, self.json_path, self.clock))) > 1:
            raise ValueError(f"{self.what}: text, json and clock each say how it is read. Give one")
        for pattern in filter(None, (self.shown, self.text)):
            try:
                groups = re.compile(pattern).groups
            except re.error as error:
                raise ValueError(f"{self.what}: {pattern}: {error}") from None
            if groups != 1:
                raise ValueError(f"{self.what}: {pattern}: the figure is its one group, not so")
        if self.value is not None and self.holds(self.value) == bool(self.missed):
            raise ValueError(
                f"{self.what} is {self.value:g}, and its bound is {self.bound}: `missed` says why"
                " it is out of its bound, and only then"
            )
        return self

    @property
    def bound(self) -> str:
        """In words."""
        sides = (("least", self.least), ("most", self.most))
        return ", ".join(f"{name} {side:g}" for name, side in sides if side is not None)

    @property
    def is_read(self) -> bool:
        """Whether a command's output says it."""
        return bool(self.text or self.json_path or self.clock)

    def holds(self, value: float) -> bool:
        """Whether a value is within the bound."""
        above = self.least is None or value >= self.least
        return above and (self.most is None or value <= self.most)

    def read(self, said: str, seconds: float) -> float:
        """The figure in what a command said, or in the seconds that it took. Raises ValueError."""
        if self.clock:
            return seconds / UNITS[self.clock]
        if self.json_path:
            return _at_path(said, self.json_path)
        found = re.findall(self.text, said)
        if len(found) != 1:
            raise ValueError(f"{self.text} is there {len(found)} times, not once")
        return number(found[0])


class Machine(Section):
    """What it was measured on; of a prediction, `gpu` is what it is of."""

    cores: Count
    memory_gib: float | None = None
    gpu: str = "none"


class Measured(Section):
    """When, on which code, and what the command held at most (anonymous memory)."""

    date: str = Field(pattern=r"^\d{4}-\d\d-\d\d$")
    commit: str | None = Field(default=None, pattern=r"^[0-9a-f]{7,40}(\+changes)?$")
    versions: dict[str, str] = Field(default_factory=dict[str, str])
    beside: str = ""
    peak_gib: float | None = None


class Card(Section):
    """A claim."""

    claim: str = Field(min_length=1)
    page: str = Field(pattern=r"^[\w.-]+\.md#[\w-]+$")
    command: str = Field(min_length=1)
    exit_code: int = 0
    status: Literal["measured", "predicted", "unproven"]
    machine: Machine
    measured: Measured | None = None
    minutes: float | None = Field(default=None, gt=0)
    needs: str = ""
    figures: list[Figure] = Field(min_length=1)

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        shown = self.status != "unproven"
        if shown != (self.measured is not None):
            raise ValueError("`measured` is given where the status is not unproven, and only then")
        lacks = [figure.what for figure in self.figures if (figure.value is None) == shown]
        if lacks:
            raise ValueError(f"{lacks[0]}: a value is given where the status is not unproven, only")
        if (self.minutes is None) == (not self.needs):
            raise ValueError(
                "give `minutes`, if it can run on two cores and what the repository has, or what it"
                " `needs`"
            )
        if self.minutes is not None and not any(figure.is_read for figure in self.figures):
            raise ValueError("it can run, so a figure says how it is read: text, json or clock")
        return self

    def section(self, docs: Path = ROOT / "docs") -> str:
        """The page's text under the heading that `page` names. Raises ConfigError."""
        name, _, anchor = self.page.partition("#")
        found = sections(docs / name).get(anchor)
        if found is None:
            raise ConfigError(f"docs/{name} has no heading {anchor}")
        return found


def read_card(path: Path) -> Card:
    """A card. Raises ConfigError in one line."""
    try:
        return Card.model_validate(read_content(path, (), "a card"))
    except ValidationError as error:
        raise ConfigError(f"{path}: {explain(error, Card)}") from None


def all_cards() -> dict[str, Card]:
    """Name -> card. Raises ConfigError."""
    return {path.stem: read_card(path) for path in sorted(FOLDER.glob("*.yaml"))}


def as_yaml(card: Card) -> str:
    """The one way to write a card: keys in their order, nothing that is as without it."""
    content = card.model_dump(mode="json", by_alias=True, exclude_defaults=True)
    return yaml.safe_dump(content, sort_keys=False, width=100, allow_unicode=True)


def sections(page: Path) -> dict[str, str]:
    """Anchor of each heading -> the text under it, down to the next heading."""
    text = page.read_text()
    blocks = [block.span() for block in re.finditer(r"^```.*?^```", text, re.MULTILINE | re.DOTALL)]
    heads = [
        head
        for head in re.finditer(r"^#+ (.*)\n", text, re.MULTILINE)
        if not any(a <= head.start() < b for a, b in blocks)  # a comment of a shell is none
    ]
    ends = [*(head.start() for head in heads[1:]), len(text)]
    return {_anchor(h[1]): text[h.end() : end] for h, end in zip(heads, ends, strict=True)}


def _anchor(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.lower().strip()).replace(" ", "-")


def number(text: str) -> float:
    """As people write it: 6,240."""
    return float(text.replace(",", ""))


def written_like(value: float, like: str) -> str:
    """A value with the decimals, the thousands and the sign that `like` has."""
    decimals = len(like.partition(".")[2])
    sign = "+" if like.startswith("+") else ""
    return f"{value:{sign}{',' if ',' in like or value >= 10000 else ''}.{decimals}f}"


def place_of(figure: Figure, section: str) -> re.Match[str]:
    """Where the figure stands in a section. Raises ConfigError unless it is once."""
    found = list(re.finditer(figure.shown, section))
    if len(found) != 1:
        raise ConfigError(f"{figure.what}: {figure.shown} is there {len(found)} times, not once")
    return found[0]


def problems(card: Card) -> list[str]:
    """What is wrong between a card, its page and the repository; one line each."""
    found: list[str] = []
    try:
        for figure in card.figures:
            if figure.shown and figure.value is not None:
                text = place_of(figure, card.section())[1]
                if written_like(figure.value, text) != text:
                    found.append(
                        f"{figure.what} is {text} in docs/{card.page} and {figure.value:g} in the"
                        " card: correct the card, or the page by tools/make_cards.py --render"
                    )
    except ConfigError as error:
        found.append(str(error))
    return found + [told for words in commands(card.command) for told in _wrong(words)]


def commands(script: str) -> Iterator[list[str]]:
    """The words of each simple command of a script."""
    lexer = shlex.shlex(script.replace("\n", " ; "), posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    words: list[str] = []
    for word in lexer:
        if word in ("&&", ";", "||", "|"):
            if words:
                yield words
            words = []
        else:
            words.append(word)
    if words:
        yield words


def _wrong(words: list[str]) -> list[str]:
    """What of one command is not in this repository."""
    names: list[str] = []
    while re.match(r"\w+=", words[0]):
        names.append(words[0].partition("=")[0])
        words = words[1:]
    program, *rest = words
    if program == "python":
        program, *rest = rest
    if program == "-m":
        program, *rest = rest
    if program in ELSEWHERE or program.startswith("$OUT/"):
        return []
    if program == "moetrain":
        return _wrong_moetrain(rest)
    if program == "make":
        known = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        return [f"make has no {word}" for word in rest if "=" not in word and word not in known]
    files = [word for word in rest if word.startswith("tests/")] if program == "pytest" else []
    scripts = files or [program]
    lacking = [f"{name} is no file here" for name in scripts if not (ROOT / name).is_file()]
    if lacking:
        return lacking
    text = "".join((ROOT / name).read_text() for name in scripts)
    options = [word.partition("=")[0] for word in rest if word.startswith("--")]
    unknown = [word for word in options if not files and f'"{word}"' not in text]
    unknown += [name for name in names if name.startswith("MOETRAIN_") and name not in text]
    return [f"{scripts[0]} does not know {word}" for word in unknown]


def _wrong_moetrain(words: list[str]) -> list[str]:
    from moetrain.cli import COMMANDS
    from moetrain.commands.common import parse
    from moetrain.config.load import load_recipe

    shown, said = "moetrain " + " ".join(words), StringIO()
    try:
        with redirect_stdout(StringIO()), redirect_stderr(said):
            args = parse(words, COMMANDS)
        recipe = getattr(args, "recipe", None)
        if isinstance(recipe, Path):
            load_recipe(ROOT / recipe, args.overrides)
    except SystemExit as end:
        return [f"{shown}: {said.getvalue().strip().splitlines()[-1]}"] if end.code else []
    except ConfigError as error:
        return [f"{shown}: {error}"]
    return []


def _at_path(said: str, path: str) -> float:
    """In the last JSON that begins a line."""
    for begin in reversed([found.start() for found in re.finditer(r"^[{\[]", said, re.MULTILINE)]):
        try:
            at: Any = json.JSONDecoder().raw_decode(said[begin:])[0]
        except ValueError:
            continue
        for step in path.split("."):
            at = at[int(step)] if isinstance(at, list) else at[step]
        return float(at)
    raise ValueError(f"{path}: nothing that it said is JSON")
