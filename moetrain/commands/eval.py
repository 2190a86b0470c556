"""`moetrain eval`: a benchmark answered and scored."""

from pathlib import Path

from moetrain.commands.common import Arguments, Command, Parser, add_overrides, positive


def arguments(parser: Parser) -> None:
    """Declare the arguments."""
    parser.add_argument("model", help="Hugging Face folder, Megatron checkpoint or run_dir")
    parser.add_argument("bench", type=Path, help="a benchmark's YAML, as in examples/evals")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the answers")
    parser.add_argument(
        "--best-of",
        type=positive,
        metavar="N",
        help="besides, the score of the answer of N that a reward ranks highest",
    )
    parser.add_argument(
        "--by", metavar="NAME", help="that reward; default: the first of the benchmark's `rewards`"
    )
    add_overrides(parser)


def run(args: Arguments) -> int:
    """Run it; the exit code."""
    from moetrain.evals.evaluate import evaluate

    return evaluate(args.model, args.bench, args.out, args.overrides, args.best_of, args.by)


COMMAND = Command("a benchmark answered and scored", arguments, run)
