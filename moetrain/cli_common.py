"""What the commands' arguments have in common."""

import argparse

Parser = argparse.ArgumentParser
Arguments = argparse.Namespace


def positive(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def share(text: str) -> float:
    """A number from 0 to 1."""
    try:
        found = float(text)
    except ValueError:
        found = -1.0
    if not 0 <= found <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a share from 0 to 1")
    return found


def add_overrides(parser: Parser) -> None:
    """`key=value` words."""
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="dotted recipe keys; values are YAML"
    )
