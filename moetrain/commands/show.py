"""`moetrain show`: what a run's model answers."""

import argparse
import io
import sys
from pathlib import Path

from moetrain.commands.common import Arguments, Command, Parser

FEW = 5  # of the best and of the worst


def arguments(parser: Parser) -> None:
    """Declare the arguments."""
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder, or a file of answers")
    parser.add_argument(
        "--step", type=count, metavar="N", help="default: the newest batch and evaluation"
    )
    for name in ("worst", "best"):
        parser.add_argument(
            f"--{name}",
            type=count,
            metavar="N",
            help=f"how many ({FEW}; 0 where the other is given)",
        )
    of = parser.add_mutually_exclusive_group()
    of.add_argument("--rollouts", action="store_true", help="only what a step learned from")
    of.add_argument("--eval", action="store_true", help="only answers to held-out prompts")
    parser.add_argument("--full", action="store_true", help="long texts whole")


def count(text: str) -> int:
    """A whole number."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number")
    return int(text)


def run(args: Arguments) -> int:
    """Run it; the exit code."""
    from moetrain.observe.answers import ANSWERS, ROLLOUTS
    from moetrain.observe.show import show

    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal without the answers' characters
        sys.stdout.reconfigure(errors="backslashreplace")
    folders = [ANSWERS] if args.eval else [ROLLOUTS] if args.rollouts else [ROLLOUTS, ANSWERS]
    few = FEW if args.best is None and args.worst is None else 0
    best, worst = (few if n is None else n for n in (args.best, args.worst))
    return show(args.run, args.step, best, worst, folders=folders, full=args.full)


COMMAND = Command("what a run's model answers, best and worst", arguments, run)
