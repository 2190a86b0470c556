"""What `$...` stands for in a launch script, as far as the script itself says it.

Variables and their forms (`${A:-b}`, `${A##*/}`, `${A[@]}`), `$((1 + 2))`, and of commands in
`$(...)` pwd, cd, echo, basename and dirname. What only a shell could know is a
hole: it stands in the value between two HOLEs, and what needs the value refuses it.
"""

import fnmatch
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field

from moetrain.errors import ConfigError
from moetrain.interop.swift.arithmetic import Unknown, evaluate

HOLE = "\0"
# Of these even a default leaves open how the run is started.
LAUNCH = ("NNODES", "NPROC_PER_NODE", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT")
MAX_VALUE = 1_000_000  # characters of one variable
MAX_SPENT = 10_000_000  # characters put in for all variables of a script
MAX_NAMES = 1000  # variables
MAX_DEPTH = 40  # of expansions within each other

_NAME = re.compile(r"[A-Za-z_]\w*|[@*#?$!0-9-]")
_BRACED = re.compile(r"(#?)([A-Za-z_]\w*|\d+|[@*])(?:\[([^\[\]]*)\])?")
_BRACKETS = {pair: re.compile(rf"\\.|[{re.escape(pair)}]", re.DOTALL) for pair in ("()", "{}")}
_SLICE = re.compile(r":\s*(-?\d+)(?:\s*:\s*(\d+))?$")


def hole(text: str) -> str:
    """Stands for what `text` would give in a shell."""
    return f"{HOLE}{text}{HOLE}"


def closing(text: str, at: int, opening: str, closed: str) -> int:
    """Where the bracket that opens at `at` closes. Raises ConfigError where it does not."""
    depth = 0
    for bracket in _BRACKETS[opening + closed].finditer(text, at):
        depth += {opening: 1, closed: -1}.get(bracket[0], 0)
        if not depth:
            return bracket.start()
    raise ConfigError(f"a ${text[at]} is not closed; write the value itself")


@dataclass
class Expander:
    """The variables of a script, and what is made of them.

    script: its path, where there is one. run: the simple commands of a text, for `$(...)`.
    """

    run: Callable[[str], list[list[str]]]
    script: str | None = None
    values: dict[str, str] = field(default_factory=dict[str, str])
    arrays: dict[str, list[str]] = field(default_factory=dict[str, list[str]])
    loops: dict[str, list[str]] = field(default_factory=dict[str, list[str]])
    spent: int = 0
    depth: int = 0

    def assign(self, name: str, value: str, more: bool) -> None:
        """`NAME=value`, or with `more` `NAME+=value`. Raises ConfigError for one without end."""
        value = self.values.get(name, "") + value if more else value
        if more:
            self.spend(len(value))
        if len(value) > MAX_VALUE:
            raise ConfigError(f"the variable {name} grows beyond {MAX_VALUE:,} characters")
        self.arrays.pop(name, None)
        self.loops.pop(name, None)
        self.values[name] = value
        self._count_names()

    def assign_items(self, name: str, items: list[str], more: bool) -> None:
        """`NAME=(a b)`, or with `more` `NAME+=(a b)`."""
        self.values.pop(name, None)
        if more:
            self.arrays.setdefault(name, []).extend(items)
        else:
            self.arrays[name] = items
        self._count_names()

    def _count_names(self) -> None:
        if len(self.values) + len(self.arrays) > MAX_NAMES:
            raise ConfigError(f"the script has more than {MAX_NAMES:,} variables")

    def dollar(self, text: str, at: int) -> tuple[str, int]:
        """The value of the `$...` or the backquotes at `at`, and where they end."""
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise ConfigError(f"more than {MAX_DEPTH} expansions are nested")
        value, end = self._dollar(text, at)
        self.depth -= 1
        self.spend(len(value))
        return value, end

    def spend(self, num_chars: int) -> None:
        """Count what is put in for variables. Raises ConfigError where it is too much."""
        self.spent += num_chars
        if self.spent > MAX_SPENT:
            raise ConfigError(f"the script's variables grow beyond {MAX_SPENT:,} characters")

    def _dollar(self, text: str, at: int) -> tuple[str, int]:
        if text[at] == "`":
            end = text.find("`", at + 1)
            if end < 0:
                raise ConfigError("a ` is not closed; write the value itself")
            return self._command(text[at + 1 : end], text[at : end + 1]), end + 1
        opening = text[at + 1 : at + 2]
        if opening == "(":
            end = closing(text, at + 1, "(", ")")
            inner, whole = text[at + 2 : end], text[at : end + 1]
            if inner.startswith("(") and inner.endswith(")"):
                return self._sum(inner[1:-1], whole), end + 1
            return self._command(inner, whole), end + 1
        if opening == "{":
            end = closing(text, at + 1, "{", "}")
            return self._braced(text[at + 2 : end], text[at : end + 1]), end + 1
        match = _NAME.match(text, at + 1)
        if match is None:
            return "$", at + 1
        return self._value(match[0], f"${match[0]}"), match.end()

    def expand(self, text: str) -> str:
        """A text with its variables put in and its quotes taken off."""
        parts: list[str] = []
        at, quote = 0, ""
        while at < len(text):
            char = text[at]
            if char == "\\" and quote != "'":
                parts.append(text[at + 1 : at + 2])
                at += 2
            elif char in "'\"" and quote in ("", char):
                quote, at = "" if quote else char, at + 1
            elif char in "$`" and quote != "'":
                value, at = self.dollar(text, at)
                parts.append(value)
            else:
                parts.append(char)
                at += 1
        return "".join(parts)

    def _value(self, name: str, whole: str) -> str:
        if name in self.values:
            return self.values[name]
        if name in self.arrays:
            return " ".join(self.arrays[name][:1])
        if name == "PWD":
            return "."
        if name in ("0", "BASH_SOURCE") and self.script is not None:
            return self.script
        # A script is read as started without arguments; those of a function are not known.
        return "" if not name[0].isalnum() and name[0] != "_" else hole(whole)

    def _braced(self, inner: str, whole: str) -> str:
        match = _BRACED.match(inner)
        if match is None:
            return hole(whole)
        count, name, index = match.groups()
        rest = inner[match.end() :]
        if count and not rest:
            return self._count(name, index, whole)
        if count:
            return hole(whole)
        if name in self.arrays and index is not None:
            value = self._item(name, index, whole)
        else:
            value = self._value(name, whole)
        return self._formed(name, value, rest, whole) if rest else value

    def _count(self, name: str, index: str | None, whole: str) -> str:
        if index in ("@", "*") and name in self.arrays:
            return str(len(self.arrays[name]))
        value = self._value(name, whole)
        return value if HOLE in value else str(len(value))

    def _item(self, name: str, index: str, whole: str) -> str:
        items = self.arrays[name]
        if index in ("@", "*"):
            return " ".join(items)
        where = self.expand(index)
        if not re.fullmatch(r"\d{1,6}", where):
            return hole(whole)
        return items[int(where)] if int(where) < len(items) else ""

    def _formed(self, name: str, value: str, rest: str, whole: str) -> str:
        """`${NAME<rest>}`, where NAME alone is `value`."""
        known = name in self.values or name in self.arrays
        colon = rest.startswith(":")
        form = rest[colon : colon + 1]
        if form in ("-", "=", "+", "?") and form:
            has = known and not (colon and not value)
            other = rest[colon + 1 :]
            if form == "+":
                return self.expand(other) if has else ""
            if has or form == "?":
                return value
            default = self.expand(other)
            if form == "=":
                self.assign(name, default, more=False)
            return default + hole(f"${name}") if name in LAUNCH else default
        if HOLE in value:
            return value
        return _changed(value, rest, self.expand, whole)

    def _sum(self, inner: str, whole: str) -> str:
        def number(name: str) -> int:
            value = self._value(name, name)
            if not re.fullmatch(r"\s*-?\d+\s*", value):
                raise Unknown
            return int(value)

        try:
            return str(evaluate(self.expand(inner), number))
        except Unknown:
            return hole(whole)

    def _command(self, inner: str, whole: str) -> str:
        """What a command would print. In a script that is read where it would be started, pwd is
        the folder of all relative paths.
        """
        if "|" in inner:
            return hole(whole)
        folder, printed = ".", ""
        for words in self.run(inner):
            if any(HOLE in word for word in words):
                return hole(whole)
            name, *rest = words
            if name == "cd" and len(rest) == 1:
                folder = os.path.normpath(os.path.join(folder, rest[0]))
            elif name == "pwd":
                printed = folder
            elif name == "echo":
                printed = " ".join(rest[rest[:1] == ["-n"] :])
            elif name == "dirname" and len(rest) == 1:
                printed = os.path.dirname(rest[0].rstrip("/")) or "."
            elif name == "basename" and len(rest) in (1, 2):
                printed = os.path.basename(rest[0].rstrip("/")).removesuffix("".join(rest[1:]))
            else:
                return hole(whole)
        return printed


def _changed(value: str, rest: str, expand: Callable[[str], str], whole: str) -> str:
    """A value cut (`#`, `%`), replaced in (`/`), sliced (`:`), or in capitals (`^^`, `,,`)."""
    if rest in ("^^", ",,"):
        return value.upper() if rest == "^^" else value.lower()
    sliced = _SLICE.fullmatch(rest)
    if sliced:
        start = int(sliced[1])
        end = None if sliced[2] is None else start + int(sliced[2])
        return value[start:end] if start >= 0 else hole(whole)
    form = next((form for form in ("##", "#", "%%", "%", "//", "/") if rest.startswith(form)), "")
    if form in ("/", "//"):
        old, *new_parts = re.split(r"(?<!\\)/", rest[len(form) :], maxsplit=1)
        old, new = expand(old), expand("".join(new_parts))
        if not old or any(char in old for char in "*?["):
            return hole(whole)
        result = value.replace(old, new, 1 if form == "/" else -1)
        return result if len(result) <= MAX_VALUE else hole(whole)
    if not form or len(value) > 1024:
        return hole(whole)
    pattern = re.compile(fnmatch.translate(expand(rest[len(form) :])[:64]))
    cuts = range(len(value) + 1)
    if form[0] == "#":
        matching = [cut for cut in cuts if pattern.match(value[:cut])]
        return value[(matching[-1] if form == "##" else matching[0]) if matching else 0 :]
    matching = [cut for cut in cuts if pattern.match(value[cut:])]
    return value[: (matching[0] if form == "%%" else matching[-1]) if matching else len(value)]
