"""What would come of a folder of scripts: counts of commands that import, of flags that are
carried, and of what is not.
"""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from moetrain.errors import ConfigError
from moetrain.interop.swift.convert import from_command
from moetrain.interop.swift.shell import ACTIONS, Found, find_commands

_SCRIPTS = (".sh", ".bash")
_FENCE = re.compile(r"^[ \t]*```[ \t]*(\w*)[^\n]*\n(.*?)^[ \t]*```", re.DOTALL | re.MULTILINE)
_SHELLS = ("", "sh", "bash", "shell")
_PROGRAM = re.compile(r"\bmegatron\s")


@dataclass
class Survey:
    """Counts over all `megatron` commands of the scripts and the pages beside them."""

    texts: int = 0  # scripts, and blocks of shell in Markdown, that hold a command
    commands: Counter[str] = field(default_factory=Counter[str])  # by action
    whole: int = 0  # recipes that `moetrain train` would take
    flags: Counter[str] = field(default_factory=Counter[str])  # kind of note -> flags
    not_carried: Counter[str] = field(default_factory=Counter[str])
    checks: Counter[str] = field(default_factory=Counter[str])
    refused: Counter[str] = field(default_factory=Counter[str])
    imported: Counter[str] = field(default_factory=Counter[str])  # by method

    def text(self) -> str:
        """As Markdown tables."""
        trained = sum(self.commands[action] for action in ACTIONS)
        imported = sum(self.imported.values())
        rows = [
            ("scripts and blocks of shell with a command", self.texts),
            ("commands that train (sft, pt, rlhf)", trained),
            ("imported", imported),
            ("of these whole: `moetrain train` takes the recipe", self.whole),
            ("refused, with the reason", trained - imported),
            ("`export` commands, pointed to `tools/convert`", self.commands["export"]),
            ("flags of the imported: carried, or nothing new", self.flags["carried"]),
            ("flags that are carried and are not quite the same", self.flags["changed"]),
            ("flags that are not carried, and named", self.flags["not carried"]),
        ]
        parts = ["| | |\n| --- | --- |\n" + _rows(rows)]
        for head, counts in (
            ("imported as", self.imported),
            ("refused", self.refused),
            ("not carried", self.not_carried),
            ("not whole", self.checks),
        ):
            if counts:
                parts.append(f"| {head} | |\n| --- | --- |\n" + _rows(counts.most_common()))
        return "\n".join(parts)


def _rows(rows: Sequence[tuple[str, int]]) -> str:
    return "".join(f"| {what.replace('|', '/')} | {number} |\n" for what, number in rows)


def survey(folders: Sequence[Path]) -> Survey:
    """Import every `megatron` command in the .sh files and Markdown pages of folders, and write
    nothing. Raises ConfigError for a folder without one.
    """
    result = Survey()
    for path, text in _texts(folders):
        try:
            commands = find_commands(text, str(path))
        except ConfigError as error:
            result.texts += 1
            result.commands["sft"] += 1  # of whatever kind: it cannot be read
            result.refused[_reason(error)] += 1
            continue
        result.texts += bool(commands)
        for one in commands:
            result.commands[one.action] += 1
            if one.action in ACTIONS:
                _import(result, one, path)
    if not result.texts:
        raise ConfigError(f"no `megatron` command in {', '.join(map(str, folders))}")
    return result


def _texts(folders: Sequence[Path]) -> Iterator[tuple[Path, str]]:
    for folder in folders:
        if not folder.exists():
            raise ConfigError(f"{folder}: no such file or folder")
        paths = [folder] if folder.is_file() else sorted(folder.rglob("*"))
        for path in paths:
            if path.suffix not in (*_SCRIPTS, ".md") or not path.is_file():
                continue
            text = path.read_text(encoding="utf-8", errors="replace")
            if path.suffix != ".md":
                blocks = [text]
            else:
                blocks = [block for label, block in _FENCE.findall(text) if label in _SHELLS]
            yield from ((path, block) for block in blocks if _PROGRAM.search(block))


def _import(result: Survey, found: Found, path: Path) -> None:
    try:
        imported = from_command(found.command(), None, path)
    except ConfigError as error:
        result.refused[_reason(error)] += 1
        return
    method = imported.content.get("method", "")
    result.imported[method if isinstance(method, str) else method["name"]] += 1
    kinds = Counter(note.kind for note in imported.notes if note.what.startswith("--"))
    num_flags = sum(word.startswith("--") for word in found.words)
    for kind in ("changed", "not carried"):
        result.flags[kind] += kinds[kind]
    result.flags["carried"] += num_flags - kinds["changed"] - kinds["not carried"]
    for note in imported.notes:
        if note.kind == "not carried":
            result.not_carried[f"`{note.what.split()[0]}`: {note.why}"] += 1
    checks = [note for note in imported.notes if note.kind == "check"]
    result.whole += not checks
    for note in checks:
        result.checks[note.why] += 1


def _reason(error: ConfigError) -> str:
    """A reason without the values of one script."""
    text = re.sub(r"\. Without it another thing.*", "", str(error))
    return re.sub(r"(?<![\w.])/[\w./-]+/", "", text)[:160]
