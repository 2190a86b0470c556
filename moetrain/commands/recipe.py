"""`moetrain recipe`: what a recipe's keys mean."""

import shutil
import textwrap
from typing import TYPE_CHECKING

from moetrain.commands.common import Arguments, Command, Parser

if TYPE_CHECKING:
    from moetrain.config.describe import Group, Key


def arguments(parser: Parser) -> None:
    """Declare the arguments."""
    parser.add_argument(
        "key",
        nargs="?",
        metavar="KEY",
        help="such as optim.lr, or a section such as data, or a method such as dpo; default: list"
        " the sections",
    )


def run(args: Arguments) -> int:
    """Run it; the exit code."""
    from moetrain.config import describe

    if args.key is None:
        _sections(list(describe.groups()))
        return 0
    keys, around = describe.find(args.key.partition("=")[0])
    alike: dict[tuple[str, str, str], list[Key]] = {}
    for key in keys:
        alike.setdefault((key.text, key.kind, key.default), []).append(key)
    for options in alike.values():
        _show_key(options)
    owners = [group.owner for group in around if group.owner]
    if keys and len(around) > 1:  # the neighbours of so many would hide it
        _show("beside", f"`moetrain recipe METHOD`, of {', '.join(owners)}", 9)
        return 0
    for group in around:
        name = f"{group.name}: {group.owner}" if group.owner else group.name
        _print(f"{name} - {group.text}")
        for key in group.keys:
            _show_line(key)
    return 0


def _sections(groups: "list[Group]") -> None:
    from moetrain.config import describe

    print("A recipe is one YAML file; on the command line a key is dotted: optim.lr=2e-5.\n")
    for key in describe.plain_keys():
        _show_line(key)
    names = dict.fromkeys(group.name for group in groups if group.name != "options")
    for name in names:
        matching = [group for group in groups if group.name == name]
        owners = ", ".join(group.owner for group in matching if group.owner)
        _show(name, f"one of {owners}" if owners else matching[0].text)
    print("\n`moetrain recipe SECTION` lists its keys, `moetrain recipe KEY` explains one.")


def _show_key(keys: "list[Key]") -> None:
    """One key, of one or of several methods that mean the same by it."""
    key = keys[0]
    owners = ", ".join(one.owner for one in keys if one.owner)
    _print(f"{key.name} ({owners})" if owners else key.name)
    default = key.default.replace("`", "") or "none, it must be given"
    for name, text in (("", key.text), ("value", key.kind), ("default", default)):
        _show(name, text.replace("`", "") if name else text, 9)
    print()


def _show_line(key: "Key") -> None:
    default = key.default.replace("`", "")
    _show(f"{key.name}={default}" if default and default != "not set" else key.name, key.text)


def _width() -> int:
    return shutil.get_terminal_size().columns


def _print(text: str) -> None:
    """A line, or lines that begin below its second character."""
    print(textwrap.fill(text, max(_width(), 40), subsequent_indent="  "))


def _show(head: str, text: str, column: int = 34) -> None:
    """Two columns, in the terminal's width."""
    width = max(_width(), column + 30)
    lines = textwrap.wrap(text, width - column - 3) or [""]
    if len(head) > column - 1:
        print(f"  {head}")
        head = ""
    for line in lines:
        print(f"  {head:<{column}} {line}".rstrip())
        head = ""


COMMAND = Command("what a recipe's keys mean", arguments, run)
