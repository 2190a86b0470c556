"""A training command out of a line of shell or a script: its variables, its action, its flags.

Bash's own rules, as far as launch scripts need them: quotes, backslashes, comments, continued
lines, `NAME=value` before a command or on a line of its own, `export`, `$NAME`, `${NAME:-default}`.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import PurePath

from moetrain.errors import ConfigError

ACTIONS = ("sft", "pt", "rlhf")
PROGRAMS = ("megatron", "swift")
_ASSIGNMENT = re.compile(r"[A-Za-z_]\w*=")
_VARIABLE = re.compile(r"\$(?:\{(\w+)(?::?([-?])([^{}]*))?\}|([A-Za-z_]\w*)|([@*#?$!0-9]))")


@dataclass(frozen=True)
class Command:
    """`megatron rlhf --beta 0.1` with the variables that were set before it.

    `open` names the variables whose value hangs on the environment of whoever starts the script.
    """

    program: str
    action: str
    flags: Mapping[str, tuple[str, ...]]
    env: Mapping[str, str] = field(default_factory=dict[str, str])
    open: frozenset[str] = frozenset()


def read_command(text: str) -> Command:
    """The one training command in `text`. Raises ConfigError: there is none, or more than one, or a
    value that only the shell knows.
    """
    reader = _Reader(text)
    found = [
        (words, at, own)
        for words, own in list(reader.commands())
        for at, word in enumerate(words[:-1])
        if PurePath(word).name in PROGRAMS and words[at + 1] in ACTIONS
    ]
    if len(found) != 1:
        what = f"{len(found)} training commands" if found else "no training command"
        raise ConfigError(
            f"the text has {what}; give one `megatron sft|pt|rlhf --flag value ...`, as text or as "
            f"a script's path"
        )
    words, at, own = found[0]
    for word in words:
        _refuse_unknown(word)
    # Without `export` the launcher would not see its own variables either, but they are meant.
    names = (reader.exported | own | {*_LAUNCH}) & {*reader.env}
    return Command(
        PurePath(words[at]).name,
        words[at + 1],
        _flags(words[at + 2 :]),
        {name: reader.env[name] for name in reader.env if name in names - reader.open},
        frozenset(names & reader.open),
    )


_HOLE = "\0"  # stands in a word for a variable that the text does not set


def _refuse_unknown(word: str) -> None:
    if _HOLE in word:
        name = word.split(_HOLE)[1]
        raise ConfigError(
            f"the command uses {name}, whose value is not in the text; write the value itself, or "
            f"set the variable before the command"
        )


def _flags(words: list[str]) -> dict[str, tuple[str, ...]]:
    """`--a b c --d=e` as {"a": ("b", "c"), "d": ("e",)}; of a flag that is repeated the last."""
    flags: dict[str, list[str]] = {}
    values: list[str] | None = None
    for word in words:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            values = flags[name.replace("-", "_")] = [value] if equals else []
        elif values is None:
            raise ConfigError(
                f"'{word}' stands before any --flag; of a YAML or JSON file of arguments give the "
                f"flags themselves"
            )
        else:
            values.append(word)
    return {name: tuple(values) for name, values in flags.items()}


class _Reader:
    """Cuts text into commands of words, and keeps the variables that were set on the way."""

    def __init__(self, text: str) -> None:
        self.text = text.replace("\r\n", "\n")
        self.at = 0
        self.env: dict[str, str] = {}
        self.open: set[str] = set()
        self.exported: set[str] = set()

    def commands(self) -> Iterator[tuple[list[str], set[str]]]:
        """Every simple command's words, and the names that are assigned before them."""
        words, own = list[str](), set[str]()
        while self.at < len(self.text):
            char = self.text[self.at]
            if self.text.startswith("\\\n", self.at):
                self.at += 2
            elif char in " \t":
                self.at += 1
            elif char == "#":
                end = self.text.find("\n", self.at)
                self.at = len(self.text) if end < 0 else end
            elif char in "\n;&|()":
                self.at += 1
                if words:
                    yield words, own
                words, own = list[str](), set[str]()
            elif redirection := re.compile(r"\d*(?:&?[<>]+)[&|]?[ \t]*").match(self.text, self.at):
                self.at = redirection.end()
                self._word()
            else:
                for word in self._word():
                    if words == ["export"]:
                        self.exported.add(word.partition("=")[0])
                    if _ASSIGNMENT.match(word) and words in ([], ["export"]):
                        own.add(self._assign(word))
                    elif words != ["export"]:
                        words.append(word)
        if words:
            yield words, own

    def _assign(self, word: str) -> str:
        name, _, value = word.partition("=")
        self.env[name] = value
        (self.open.add if _HOLE in value else self.open.discard)(name)
        return name

    def _word(self) -> list[str]:
        """The word here; a variable without quotes around it may hold several, or none."""
        parts, quoted = [""], False
        while self.at < len(self.text) and self.text[self.at] not in " \t\n;&|<>()":
            char = self.text[self.at]
            if char == "'":
                quoted = True
                parts[-1] += self._until_quote()
            elif char == '"':
                quoted = True
                parts[-1] += self._double_quoted()
            elif char == "\\":
                parts[-1] += self.text[self.at + 1 : self.at + 2].replace("\n", "")
                self.at += 2
            elif char in "$`":
                value = self._variable()
                first, *rest = [value] if _HOLE in value else re.split(r"\s+", value)
                parts[-1] += first
                parts += rest
            else:
                parts[-1] += char
                self.at += 1
        return [part for part in parts if part] or ([""] if quoted else [])

    def _until_quote(self) -> str:
        end = self.text.find("'", self.at + 1)
        if end < 0:
            raise ConfigError("a ' is not closed; quote the command as in the shell")
        start, self.at = self.at + 1, end + 1
        return self.text[start:end]

    def _double_quoted(self) -> str:
        self.at += 1
        result = ""
        while self.at < len(self.text):
            char = self.text[self.at]
            if char == '"':
                self.at += 1
                return result
            if char == "\\" and self.text[self.at + 1 : self.at + 2] in tuple('\\"$`\n'):
                result += self.text[self.at + 1].replace("\n", "")
                self.at += 2
            elif char in "$`":
                result += self._variable()
            else:
                result += char
                self.at += 1
        raise ConfigError('a " is not closed; quote the command as in the shell')

    def _variable(self) -> str:
        """The value of the `$...` here. What the text does not say becomes a hole."""
        match = _VARIABLE.match(self.text, self.at)
        if match is None:
            return self._computed()
        self.at = match.end()
        braced, how, default, plain, special = match.groups()
        if special:
            return ""  # the script's own arguments: it is read as started without any
        name = braced or plain
        if name in self.env:
            return self.env[name]
        if how == "-":
            return f"{default}{_HOLE}${name}{_HOLE}" if name in _LAUNCH else default
        return f"{_HOLE}${name}{_HOLE}"

    def _computed(self) -> str:
        """A hole for `$(...)`, `${...}` of another form or backquotes; a lone $ is itself."""
        start, opening = self.at, self.text[self.at : self.at + 2]
        if self.text[start] == "`":
            closed, depth = "`", 1
        elif opening in ("$(", "${"):
            closed, depth = {"(": ")", "{": "}"}[opening[1]], 0
        else:
            self.at += 1
            return "$"
        self.at += 1
        while self.at < len(self.text):
            char = self.text[self.at]
            self.at += 1
            depth += (char == opening[1]) - (char == closed) if closed != "`" else -(char == closed)
            if depth == 0:
                return f"{_HOLE}{self.text[start : self.at]}{_HOLE}"
        raise ConfigError(f"a {self.text[start : start + 2]} is not closed; write the value itself")


# Of these even a default leaves open how the run is started.
_LAUNCH = ("NNODES", "NPROC_PER_NODE", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT")
