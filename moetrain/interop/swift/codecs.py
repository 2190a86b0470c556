"""Entries of the table, and how each is read and written: the two directions stand side by side."""

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, cast

from moetrain.config.foreign import SWIFT
from moetrain.errors import ConfigError, one_line
from moetrain.interop.swift.near import Near

type Words = tuple[str, ...]  # what stands after a flag
type Keys = dict[str, Any]  # dotted recipe keys and their values; None is the same as absent

NEVER = 10**9  # a number of steps that no run reaches


class NotCarried(Exception):
    """A value has no counterpart on the other side; says why."""


type NoteKind = Literal["not carried", "changed", "implied", "check"]


@dataclass(frozen=True)
class Note:
    """What a user should know about one flag or key."""

    kind: NoteKind
    what: str
    why: str

    def __str__(self) -> str:
        return one_line(f"{self.kind}: {self.what}: {self.why}", limit=2000)


@dataclass
class Reading:
    """Flags on their way into a recipe. Variables of the environment stand among the flags."""

    given: Mapping[str, Words]
    keys: Keys = field(default_factory=dict[str, Any])
    notes: list[Note] = field(default_factory=list[Note])
    used: set[str] = field(default_factory=set[str])
    assumed: set[str] = field(default_factory=set[str])  # keys that only ms-swift's defaults say
    steps: int | None = None  # of the run, where the command does not say
    near: Near = field(default_factory=Near)
    decides: frozenset[str] = frozenset()  # flags without which another thing would be trained
    refused: list[str] = field(default_factory=list[str])

    def take(self, flag: str) -> Words | None:
        """The words of a flag, which then counts as carried."""
        if flag in self.given:
            self.used.add(flag)
        return self.given.get(flag)

    def take_if(self, flag: str, wanted: str) -> None:
        """Count a flag as carried if it says this."""
        if same(self.given.get(flag), wanted):
            self.used.add(flag)

    def parse[T](self, flag: str, kind: "Codec[T]") -> T | None:
        """The value of a flag, None where it is not given. Raises ConfigError."""
        words = self.take(flag)
        try:
            return None if words is None else kind.read(flag, words)
        except NotCarried as why:
            self.lost(flag, str(why))
            return None

    def lost(self, flag: str, why: str) -> None:
        """A flag is given that nothing here can mean. Without one that decides what is learned the
        recipe would be another run: the command is then refused.
        """
        self.used.add(flag)
        what = shown(flag, self.given.get(flag, ()))
        if flag in self.decides:
            self.refused.append(f"{what}: {why}")
        else:
            self.notes.append(Note("not carried", what, why))

    def note(self, kind: "NoteKind", flag: str, why: str) -> None:
        """Say something of a flag that is given, which then counts as carried."""
        self.used.add(flag)
        self.notes.append(Note(kind, shown(flag, self.given.get(flag, ())), why))


@dataclass
class Writing:
    """A recipe on its way into flags."""

    keys: Keys
    flags: dict[str, Words] = field(default_factory=dict[str, Words])
    notes: list[Note] = field(default_factory=list[Note])
    covered: set[str] = field(default_factory=set[str])

    def lost(self, key: str, why: str) -> None:
        """A key says what no flag can."""
        self.covered.add(key)
        self.notes.append(Note("not carried", f"{key}={self.keys.get(key)}", why))


def shown(flag: str, words: Words) -> str:
    """A flag as it was given, but for what nobody else should read."""
    name = flag if flag.isupper() else f"--{flag}"
    if {*flag.lower().split("_")} & {"token", "key", "secret", "password", "apikey"}:
        return name
    return one_line(" ".join([name, *words]))


def same(words: Words | None, wanted: str) -> bool:
    """Whether the words of a flag are this one word, however it is spelt."""
    if words is None or len(words) > 1:
        return False
    word = words[0] if words else "true"
    try:
        return float(word) == float(wanted)
    except ValueError:
        return word.lower() == wanted.lower()


@dataclass(frozen=True)
class Codec[T]:
    """A converter between the words of a flag and a recipe's value."""

    what: str
    parse: Callable[[Words], T]
    show: Callable[[T], Words]

    def read(self, flag: str, words: Words) -> T:
        """Raises ConfigError for words that are no such value."""
        try:
            return self.parse(words)
        except ValueError:
            raise ConfigError(f"{shown(flag, words)}: {self.what} is wanted there") from None


def _one(words: Words) -> str:
    if len(words) != 1:
        raise ValueError
    return words[0]


def _number(words: Words) -> float:
    if len(words) > 1:
        raise NotCarried("the recipe has one number there")
    number = float(_one(words))
    if not math.isfinite(number):
        raise ValueError
    return number


def _show_number(value: float) -> Words:
    short = f"{value:g}"
    return (short if float(short) == value else repr(float(value)),)


def _truth(words: Words) -> bool:
    word = words[0].lower() if len(words) == 1 else ""
    if words and word not in ("true", "false", "1", "0", "yes", "no", "t", "f", "y", "n"):
        raise ValueError
    return not words or word[0] in "t1y"


def _show_truth(value: bool) -> Words:
    return ("true" if value else "false",)


def _mapping(words: Words) -> dict[str, Any]:
    value = json.loads(_one(words))
    if not isinstance(value, dict):
        raise ValueError
    return cast(dict[str, Any], value)


def _steps(words: Words) -> int | None:
    value = int(_one(words))
    return None if value >= NEVER else value


WHOLE = Codec[int]("a whole number", lambda words: int(_one(words)), lambda value: (str(value),))
NUMBER = Codec[float]("a number", _number, _show_number)
NOT_ONE = Codec[float | None](  # a weight, where 1 is none; it is read alone
    "a number", lambda words: None if _number(words) == 1 else _number(words), lambda value: ()
)
NUMBERS = Codec[list[float]](
    "numbers",
    lambda words: [_number((word,)) for word in words],
    lambda values: tuple(word for value in values for word in _show_number(value)),
)
MAYBE = Codec[float | None](
    "a number",
    lambda words: None if same(words, "none") else _number(words),
    lambda value: () if value is None else _show_number(value),
)
TRUTH = Codec[bool]("true or false", _truth, _show_truth)
NOT = Codec[bool]("true or false", lambda w: not _truth(w), lambda value: _show_truth(not value))
TEXT = Codec[str]("one word", _one, lambda value: (value,))
LIST = Codec[list[str]]("a list of words", list, tuple)
JSON = Codec[dict[str, Any]]("a JSON mapping", _mapping, lambda value: (json.dumps(value),))
STEPS = Codec[int | None](
    "a number of steps", _steps, lambda value: (str(NEVER if value is None else value),)
)


class _Unset:
    """ms-swift's default is not known, or is nothing that a recipe says."""


UNSET = _Unset()
type Default = object | Callable[[Keys], object]


def _always(keys: Keys) -> bool:
    return True


class Entry(ABC):
    """Flags and keys that mean the same."""

    @abstractmethod
    def read(self, reading: Reading) -> None:
        """Flags -> keys. Raises ConfigError for a flag whose words are of no use."""

    @abstractmethod
    def write(self, writing: Writing) -> None:
        """Keys -> flags."""


@dataclass(frozen=True)
class Same(Entry):
    """One flag, and its key of `config/foreign.py`.

    default: what ms-swift takes without the flag, as a recipe's value.
    when: whether the entry counts, by the keys before it.
    alike: flags that say the same.
    along: flags that are written with it, and are implied by it when read.
    always: written even if ms-swift would take the same without.
    """

    flag: str
    kind: Codec[Any]
    default: Default = UNSET
    when: Callable[[Keys], bool] = _always
    alike: tuple[str, ...] = ()
    along: Mapping[str, str] = field(default_factory=dict[str, str])
    always: bool = False

    @property
    def key(self) -> str:
        return SWIFT[self.flag]

    def _default(self, keys: Keys) -> object:
        return self.default(keys) if callable(self.default) else self.default

    def read(self, reading: Reading) -> None:
        if not self.when(reading.keys):
            return
        words = reading.given.get(self.flag)
        if words is None:
            value = self._default(reading.keys)
            if value is not UNSET and value is not None:
                reading.keys[self.key] = value
                reading.assumed.add(self.key)
            return
        try:
            value = self.kind.read(self.flag, words)
        except NotCarried as why:
            reading.lost(self.flag, str(why))
            return
        reading.used.add(self.flag)
        reading.keys[self.key] = value
        for flag in self.alike:
            reading.take_if(flag, " ".join(words))
        for flag, wanted in self.along.items():
            reading.take_if(flag, wanted)

    def write(self, writing: Writing) -> None:
        value = writing.keys.get(self.key)
        writing.covered.add(self.key)
        if not self.when(writing.keys):
            return
        default = self._default(writing.keys)
        if (value == default and not self.always) or value in ([], {}):
            return
        if value is None and self.kind is not STEPS:
            return
        try:
            words = self.kind.show(value)
        except NotCarried as why:
            writing.lost(self.key, str(why))
            return
        for flag in (self.flag, *self.alike):
            writing.flags[flag] = words
        if value != default:
            writing.flags |= {flag: (word,) for flag, word in self.along.items()}


@dataclass(frozen=True)
class Option:
    """One value of a key, the flags that mark it, and those that only go with it."""

    value: object
    marks: Mapping[str, str]
    along: Mapping[str, str] = field(default_factory=dict[str, str])
    read_only: bool = False  # another option, or no megatron command, stands for it


@dataclass(frozen=True)
class Choice(Entry):
    """A key with few values, told apart by flags: the first option whose marks are all there.

    defaults: what ms-swift takes for the flags that are not given.
    wanted: raise if no option fits, and say this.
    instead: the option to write for a value that has none; the value is then not carried.
    """

    key: str
    options: tuple[Option, ...]
    defaults: Mapping[str, str] = field(default_factory=dict[str, str])
    when: Callable[[Keys], bool] = _always
    wanted: str = ""
    instead: object = UNSET

    def read(self, reading: Reading) -> None:
        if not self.when(reading.keys):
            return

        def says(flag: str, wanted: str) -> bool:
            default = (self.defaults[flag],) if flag in self.defaults else None
            return same(reading.given.get(flag, default), wanted)

        for option in self.options:
            if all(says(*mark) for mark in option.marks.items()):
                break
        else:
            if self.wanted:
                flag, _, allowed = self.wanted.partition(": ")
                flag = flag.removeprefix("--")
                raise ConfigError(f"{shown(flag, reading.given.get(flag, ()))}: {allowed}")
            return
        if option.value is not None:
            reading.keys[self.key] = option.value
        if not any(flag in reading.given for flag in option.marks):
            reading.assumed.add(self.key)
        for flag, wanted in (dict(option.marks) | dict(option.along)).items():
            reading.take_if(flag, wanted)

    def write(self, writing: Writing) -> None:
        if not self.when(writing.keys):
            return
        options = {option.value: option for option in self.options if not option.read_only}
        value = writing.keys.get(self.key)
        option = options.get(value)
        if option is not None:
            writing.covered.add(self.key)
        elif self.instead in options:
            option = options[self.instead]
        else:
            return
        for flag, word in (dict(option.marks) | dict(option.along)).items():
            if self.defaults.get(flag) != word:
                writing.flags[flag] = (word,)
