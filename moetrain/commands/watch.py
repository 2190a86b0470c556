"""`moetrain watch`: a run while it goes on."""

import argparse
import math
from pathlib import Path

from moetrain.commands.common import Arguments, Command, Parser


def arguments(parser: Parser) -> None:
    """Declare the arguments."""
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder")
    parser.add_argument(
        "--once", action="store_true", help="one frame; so it is without a terminal"
    )
    parser.add_argument(
        "--every", type=seconds, default=2.0, metavar="SECONDS", help="between two frames (2)"
    )


def seconds(text: str) -> float:
    """At least a tenth of a second."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0.1 <= value <= 86400:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds from 0.1 to 86400")
    return value


def run(args: Arguments) -> int:
    """Run it; the exit code."""
    from moetrain.observe.watch import watch

    return watch(args.run, args.every, once=args.once)


COMMAND = Command("a run while it goes on: figures, faults, newest answers", arguments, run)
