"""`moetrain quickstart`: a whole small run on this machine."""

from pathlib import Path

from moetrain.commands.common import Arguments, Command, Parser


def arguments(parser: Parser) -> None:
    """Declare the arguments."""
    parser.add_argument("--out", type=Path, default=Path("runs/quickstart"))


def run(args: Arguments) -> int:
    """Run it; the exit code."""
    from moetrain.run.quickstart import main

    return main(args.out)


COMMAND = Command("a whole small run on this machine", arguments, run)
