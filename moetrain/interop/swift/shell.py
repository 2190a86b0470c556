"""Training commands out of a line of shell or a script: variables, action, flags.

Bash's own rules, as far as launch scripts need them: quotes, backslashes, comments, continued
lines, here-documents, `NAME=value` before a command or on a line of its own, `export`, arrays, and
what `expand` knows of `$...`.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import PurePath

from moetrain.errors import ConfigError, one_line
from moetrain.interop.swift.expand import HOLE, LAUNCH, Expander, closing, hole

ACTIONS = ("sft", "pt", "rlhf")
EXPORT = "export"
PROGRAMS = ("megatron", "swift")
_ASSIGNMENT = re.compile(r"([A-Za-z_]\w*)(\+?)=")
_REDIRECTION = re.compile(r"\d*(&?[<>]+)([&|-]?)[ \t]*")
_ALL = re.compile(r"\$\{(\w+)\[[@*]\]\}|\$[@*]|\$\{[@*](?::[^{}]*)?\}")
_QUOTED_ALL = re.compile(rf'"({_ALL.pattern})"')
_PLAIN = re.compile(r"""[^ \t\n;&|<>()'"\\$`]+""")
_QUOTED_PLAIN = re.compile(r"""[^"\\$`]+""")
_DECLARING = (["export"], ["local"], ["declare"], ["readonly"], ["typeset"], ["env"])
MAX_TEXT = 200_000  # characters; a launch script has some thousand
MAX_COMMANDS = 1000  # of training, each with the variables as they were before it
_LOOPS = ("for", "while", "until", "select")


@dataclass(frozen=True)
class Command:
    """`megatron rlhf --beta 0.1` with the variables that were set before it.

    `open` names the variables whose value hangs on the environment in which the script is started,
    `files` are the words before the first flag, `folder` where a `cd` before it went, `repeated`
    whether it stands in a loop.
    """

    program: str
    action: str
    flags: Mapping[str, tuple[str, ...]]
    env: Mapping[str, str] = field(default_factory=dict[str, str])
    open: frozenset[str] = frozenset()
    files: tuple[str, ...] = ()
    folder: str | None = None
    repeated: bool = False


@dataclass(frozen=True)
class Found:
    """A command of a script before its words are looked at."""

    words: tuple[str, ...]  # from the program on
    env: Mapping[str, str]
    own: frozenset[str]
    exported: frozenset[str]
    loops: Mapping[str, list[str]]
    folder: str | None
    repeated: bool

    @property
    def action(self) -> str:
        return self.words[1]

    def command(self) -> Command:
        """Raises ConfigError for a value that only the shell knows."""
        for word in self.words:
            _refuse_unknown(word, self.loops)
        # Without `export` the launcher would not see its own variables either, but they are meant.
        names = (self.exported | self.own | {*LAUNCH}) & {*self.env}
        is_open = {name for name in names if HOLE in self.env[name]}
        files, flags = _flags(self.words[2:])
        return Command(
            PurePath(self.words[0]).name,
            self.action,
            flags,
            {name: self.env[name] for name in self.env if name in names - is_open},
            frozenset(is_open),
            files,
            self.folder,
            self.repeated,
        )


def find_commands(text: str, script: str | None = None) -> list[Found]:
    """Every training and export command of a text in its order. Raises ConfigError for a text that
    is no shell.
    """
    if HOLE in text:
        raise ConfigError("the text holds a NUL byte: it is no script")
    if len(text) > MAX_TEXT:
        raise ConfigError(f"the text has {len(text):,} characters; at most {MAX_TEXT:,} are read")
    commands = list(islice(_Reader(text, script).found(), MAX_COMMANDS + 1))
    if len(commands) > MAX_COMMANDS:
        raise ConfigError(f"the text has more than {MAX_COMMANDS:,} training commands")
    return commands


def read_command(text: str, script: str | None = None, number: int | None = None) -> Command:
    """The training command in `text`, of several the `number`-th (from 1). Raises ConfigError:
    there is none, or more than one, or a value that only the shell knows.
    """
    every = find_commands(text, script)
    trainings = [one for one in every if one.action in ACTIONS]
    if not trainings and every:
        raise ConfigError(converts(every[0]))
    if number is not None and not 1 <= number <= len(trainings):
        raise ConfigError(f"--number {number}: the text has {len(trainings)} training commands")
    if len(trainings) != 1 and number is None:
        what = f"{len(trainings)} training commands" if trainings else "no training command"
        more = ", or --number N for the N-th" if trainings else ""
        raise ConfigError(
            f"the text has {what}; give one `megatron sft|pt|rlhf --flag value ...`, as text or as "
            f"a script's path{more}"
        )
    return trainings[(number or 1) - 1].command()


def converts(found: Found) -> str:
    """What does here what `megatron export` does there."""
    _, flags = _flags(found.words[2:])
    has = {flag for flag, words in flags.items() if words[:1] not in (("false",), ("False",))}
    adapter = has & {"adapters", "mcore_adapter", "adapter_load"}
    if "to_mcore" in has:
        how = "tools/convert hf2mcore SRC DST"
    elif adapter and flags.get("merge_lora", ()) in (("false",), ("False",)):
        how = "tools/convert adapter RUN DST"
    elif adapter:
        how = "tools/convert merge BASE ADAPTER DST"
    else:
        how = "tools/convert mcore2hf SRC DST"
    checks = ", and `tools/convert verify A B` compares" if "test_convert_precision" in has else ""
    return f"`{found.words[0]} export` converts weights and trains nothing: here `{how}`{checks}"


def _refuse_unknown(word: str, loops: Mapping[str, list[str]]) -> None:
    if HOLE not in word:
        return
    name = one_line(word.split(HOLE)[1])
    values = loops.get(name.strip("${}"))
    if values is not None:
        raise ConfigError(
            f"the command is in a loop in which {name} is "
            f"{one_line(', '.join(values[:5]))}: write one of them, and try the others with "
            f"`moetrain sweep --grid`"
        )
    raise ConfigError(
        f"the command uses {name}, whose value is not in the text; write the value itself, or "
        f"set the variable before the command"
    )


def _flags(words: tuple[str, ...]) -> tuple[tuple[str, ...], dict[str, tuple[str, ...]]]:
    """`f --a b c --d=e` as ("f",), {"a": ("b", "c"), "d": ("e",)}; of a flag that is repeated the
    last. Raises ConfigError for words that no file of arguments is.
    """
    files: list[str] = []
    flags: dict[str, list[str]] = {}
    values = files
    for word in words:
        if word.startswith("--") and len(word) > 2:
            name, equals, value = word[2:].partition("=")
            values = flags[name.replace("-", "_")] = [value] if equals else []
        else:
            values.append(word)
    for word in files[1:] if files and files[0].endswith((".yaml", ".yml", ".json")) else files:
        raise ConfigError(
            f"'{one_line(word)}' comes before any --flag, and is no YAML or JSON file"
        )
    return tuple(files), {name: tuple(values) for name, values in flags.items()}


class _Reader:
    """Cuts text into commands of words, and keeps the variables that were set on the way."""

    def __init__(self, text: str, script: str | None, outer: Expander | None = None) -> None:
        self.text = text.replace("\r\n", "\n")
        self.at = 0
        self.vars = outer or Expander(self._run, script)
        self.exported: set[str] = set()
        self.folder: str | None = None
        self.loops: list[str] = []
        self.documents: list[tuple[str, bool]] = []  # here-documents that begin after this line

    def _run(self, text: str) -> list[list[str]]:
        return [words for words, _ in _Reader(text, None, self.vars).commands() if words]

    def found(self) -> Iterator[Found]:
        for words, variables in self.commands():
            for at, word in enumerate(words[:-1]):
                if PurePath(word).name in PROGRAMS and words[at + 1] in (*ACTIONS, EXPORT):
                    yield Found(
                        tuple(words[at:]),
                        dict(self.vars.values),
                        frozenset(variables),
                        frozenset(self.exported),
                        dict(self.vars.loops),
                        self.folder,
                        bool(self.loops),
                    )
                    break

    def commands(self) -> Iterator[tuple[list[str], set[str]]]:
        """Every simple command's words, and the names that are assigned before them."""
        words, variables = list[str](), set[str]()
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
                if char == "\n" and self.documents:
                    self._skip_documents()
                if words:
                    self._follow(words)
                    yield words, variables
                words, variables = list[str](), set[str]()
            elif redirection := _REDIRECTION.match(self.text, self.at):
                self.at = redirection.end()
                target = self._word()
                if redirection[1] == "<<":
                    self.documents.append(("".join(target), redirection[2] == "-"))
            else:
                self._next(words, variables)
        if words:
            self._follow(words)
            yield words, variables

    def _next(self, words: list[str], own: set[str]) -> None:
        """Read a word, or an assignment."""
        declared = words in _DECLARING
        match = _ASSIGNMENT.match(self.text, self.at) if not words or declared else None
        if match is not None and self.text.startswith("(", match.end()):
            self._array(match[1], bool(match[2]), match.end())
            return
        for number, word in enumerate(self._word()):
            assigned = _ASSIGNMENT.match(word) if match is not None and not number else None
            if words == ["export"]:
                self.exported.add(word.partition("=")[0])
            if assigned is not None:
                self.vars.assign(assigned[1], word[assigned.end() :], bool(assigned[2]))
                own.add(assigned[1])
            elif not declared or words == ["env"]:
                words.append(word)

    def _array(self, name: str, more: bool, at: int) -> None:
        """`NAME=(a b)`, or with `more` `NAME+=(a b)`."""
        end = _array_end(self.text, at)
        inside = _Reader(self.text[at + 1 : end], None, self.vars)
        items = [word for words, _ in inside.commands() for word in words]
        self.at = end + 1
        self.vars.assign_items(name, items, more)

    def _follow(self, words: list[str]) -> None:
        """What a command changes for those after it."""
        while words and words[0] in ("then", "do", "else", "{", "if"):
            if words[0] == "do" and len(words) == 1:
                return
            del words[0]
        if not words:
            words.append("true")
        first = words[0]
        if first in _LOOPS:
            self.loops.append(first)
        elif first == "done" and self.loops:
            self.loops.pop()
        if first == "for" and words[2:3] == ["in"] and words[1].isidentifier():
            name, values = words[1], words[3:]
            self.vars.assign(name, values[0] if len(values) == 1 else hole(f"${name}"), False)
            if len(values) != 1:
                self.vars.loops[name] = values
        elif first == "for" and words[1:]:
            self.vars.values.pop(words[1], None)
        elif first == "cd" and len(words) == 2:
            self.folder = words[1].split(HOLE)[1] if HOLE in words[1] else words[1]

    def _skip_documents(self) -> None:
        for end, indented in self.documents:
            while self.at < len(self.text):
                stop = self.text.find("\n", self.at)
                stop = len(self.text) if stop < 0 else stop
                line = self.text[self.at : stop]
                self.at = stop + 1
                if (line.lstrip("\t") if indented else line) == end:
                    break
        self.documents = []

    def _word(self) -> list[str]:
        """The word here; a variable without quotes around it may hold several, or none."""
        parts, quoted = [""], False
        while self.at < len(self.text) and self.text[self.at] not in " \t\n;&|<>()":
            char = self.text[self.at]
            every = (_QUOTED_ALL if char == '"' else _ALL).match(self.text, self.at)
            if char in '"$' and every is not None:
                first, *rest = self._every(every, char == '"') or [""]
                self.at = every.end()
                parts[-1] += first
                parts += rest
            elif char == "'":
                quoted = True
                parts[-1] += self._until_quote()
            elif char == '"':
                quoted = True
                parts[-1] += self._double_quoted()
            elif char == "\\":
                parts[-1] += self.text[self.at + 1 : self.at + 2].replace("\n", "")
                self.at += 2
            elif char in "$`":
                value, self.at = self.vars.dollar(self.text, self.at)
                first, *rest = [value] if HOLE in value else re.split(r"\s+", value)
                parts[-1] += first
                parts += rest
            else:
                plain = _PLAIN.match(self.text, self.at)
                assert plain is not None
                parts[-1] += plain[0]
                self.at = plain.end()
        return [part for part in parts if part] or ([""] if quoted else [])

    def _every(self, match: re.Match[str], quoted: bool) -> list[str]:
        """All items of an array; of the script's own arguments there are none."""
        name = match[2] if quoted else match[1]
        if name is None:
            return []
        if name not in self.vars.arrays:
            return [self.vars.values.get(name, hole(f"${{{name}[@]}}"))]
        items = self.vars.arrays[name]
        self.vars.spend(sum(map(len, items)) + 20 * len(items))
        return items if quoted else [word for item in items for word in item.split()]

    def _until_quote(self) -> str:
        end = self.text.find("'", self.at + 1)
        if end < 0:
            raise ConfigError("a ' is not closed; quote the command as in the shell")
        start, self.at = self.at + 1, end + 1
        return self.text[start:end]

    def _double_quoted(self) -> str:
        self.at += 1
        parts: list[str] = []
        while self.at < len(self.text):
            char = self.text[self.at]
            if char == '"':
                self.at += 1
                return "".join(parts)
            if char == "\\" and self.text[self.at + 1 : self.at + 2] in tuple('\\"$`\n'):
                parts.append(self.text[self.at + 1].replace("\n", ""))
                self.at += 2
            elif char in "$`":
                value, self.at = self.vars.dollar(self.text, self.at)
                parts.append(value)
            else:
                plain = _QUOTED_PLAIN.match(self.text, self.at)
                parts.append(plain[0] if plain else char)
                self.at += len(parts[-1])
        raise ConfigError('a " is not closed; quote the command as in the shell')


def _array_end(text: str, at: int) -> int:
    """Where `(a "b)" c)` ends. Raises ConfigError where it does not."""
    start, quote = at, ""
    while at < len(text):
        char = text[at]
        if quote:
            at += char == "\\" and quote == '"'
            quote = "" if char == quote else quote
        elif char in "'\"":
            quote = char
        elif char == "\\":
            at += 1
        elif char == "#" and text[at - 1] in " \t\n":
            at = text.find("\n", at)
            at = len(text) if at < 0 else at
        elif text.startswith("$(", at):
            at = closing(text, at + 1, "(", ")")
        elif char == ")":
            return at
        at += 1
    raise ConfigError(f"the array at {text[start : start + 20]!r} is not closed")
