"""What the commands' arguments have in common."""

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from moetrain import __version__

Parser = argparse.ArgumentParser
Arguments = argparse.Namespace


@dataclass(frozen=True)
class Command:
    """A command: its line of help, its arguments, and what it does (returns the exit code)."""

    help: str
    arguments: Callable[[Parser], None]
    run: Callable[[Arguments], int]


def parse(argv: Sequence[str], table: Mapping[str, Command]) -> Arguments:
    """The arguments of a command line; argparse exits where it is none."""
    parser = Parser(
        prog="moetrain",
        description="Train large mixture-of-experts models on Megatron Core.",
        epilog="`moetrain COMMAND --help` says more of one; `moetrain recipe [KEY]` what a recipe's"
        " keys mean. docs/ in the repository has a page for each job.",
    )
    parser.add_argument("--version", action="version", version=f"moetrain {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in table.items():
        command.arguments(commands.add_parser(name, help=command.help, description=command.help))
    args, rest = parser.parse_known_args(argv)
    args.argv = list(argv)  # what local ranks are started with
    for word in rest:  # argparse gathers overrides only where they stand together
        if "overrides" not in args or word.startswith("-"):
            parser.error(f"unrecognized arguments: {word}{_hint(word)}")
        args.overrides.append(word)
    return args


def _hint(word: str) -> str:
    """What a flag of another trainer is as an override."""
    from moetrain.config.foreign import KEYS, known_here

    flag, _, value = word.lstrip("-").partition("=")
    foreign = known_here(flag) if word.startswith("--") else ""
    key = KEYS.get(flag.replace("-", "_"))
    return f".{foreign}" + (f" Settings have no dashes: {key}={value or 'VALUE'}." if key else "")


def positive(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def share(text: str) -> float:
    """A number from 0 to 1."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a share from 0 to 1")
    return value


def add_overrides(parser: Parser) -> None:
    """`key=value` words."""
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="dotted recipe keys; values are YAML"
    )


def add_ranks(parser: Parser) -> None:
    """--nproc, and `key=value` words."""
    parser.add_argument(
        "--nproc", type=positive, default=None, metavar="N", help="start N local ranks (default 1)"
    )
    add_overrides(parser)
