"""`moetrain grade`: what rewards pay for completions in a file."""

from pathlib import Path

from moetrain.commands.common import Arguments, Command, Parser, positive
from moetrain.errors import MoetrainError


def arguments(parser: Parser) -> None:
    """Declare the arguments."""
    parser.add_argument("file", type=Path, help="JSONL of completion, prompt and columns")
    parser.add_argument(
        "--rewards",
        required=True,
        metavar="NAMES",
        help="accuracy,format,./mine.py:f; or a YAML list as in a recipe",
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="a line for each completion")
    parser.add_argument("--workers", type=positive, default=2, metavar="N", help="processes (2)")
    parser.add_argument(
        "--seconds", type=float, default=10.0, help="that a completion's grading may take (10)"
    )


def run(args: Arguments) -> int:
    """Run it; the exit code."""
    from moetrain.answers.grade import grade

    if not args.seconds > 0:
        raise MoetrainError(f"--seconds {args.seconds:g} must be above 0.")
    return grade(args.file, args.rewards, args.out, args.workers, args.seconds)


COMMAND = Command("what rewards pay for completions in a file", arguments, run)
