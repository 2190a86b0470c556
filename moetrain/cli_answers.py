"""Arguments of the commands that make models answer, and of what is made of answers."""

from pathlib import Path

from moetrain.cli_common import Arguments, Parser, add_overrides, positive
from moetrain.errors import MoetrainError


def sample_arguments(parser: Parser) -> None:
    """Of `moetrain sample`."""
    parser.add_argument("model", help="Hugging Face folder, Megatron checkpoint or run_dir")
    parser.add_argument("prompts", help="JSONL of prompts and columns for rewards, or builtin:NAME")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    parser.add_argument("-k", type=positive, default=4, metavar="N", help="answers each (4)")
    add_overrides(parser)


def sample(args: Arguments) -> int:
    """Run `moetrain sample`."""
    from moetrain.loops import sample as sampling

    return sampling.sample(args.model, args.prompts, args.out, args.k, args.overrides)


def pairs_arguments(parser: Parser) -> None:
    """Of `moetrain pairs`."""
    parser.add_argument(
        "sources", nargs="+", type=Path, metavar="SAMPLES", help="of `sample`, or a rollouts folder"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    parser.add_argument("--sft", action="store_true", help="right answers as instruction data")
    parser.add_argument("--shares", metavar="S,S", help="of the sources, e.g. 0.7,0.3")
    parser.add_argument("--cut", action="store_true", help="take answers cut at the limit, too")
    parser.add_argument("--num", type=positive, metavar="N", help="at most so many records")
    parser.add_argument("--per-prompt", type=positive, default=1, metavar="N", help="records (1)")
    parser.add_argument("--by", metavar="NAME", help="a part of the reward (default: all of it)")
    parser.add_argument("--right", type=float, default=1.0, help="least reward of a right answer")
    parser.add_argument("--wrong", type=float, default=0.0, help="most reward of a wrong answer")
    parser.add_argument(
        "--balance",
        type=float,
        default=2.0,
        help="a difficulty gives at most so many times the mean of all; 0: as it comes (2)",
    )
    parser.add_argument(
        "--held-out",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="of prompts, to NAME.eval.jsonl",
    )
    parser.add_argument("--seed", type=int, default=1234)


def pairs(args: Arguments) -> int:
    """Run `moetrain pairs`."""
    from moetrain.data.pairing import Choice
    from moetrain.loops.pairs import choose

    try:
        shares = tuple(float(s) for s in args.shares.split(",")) if args.shares else None
    except ValueError:
        raise MoetrainError(f"--shares {args.shares} is no list such as 0.7,0.3.") from None
    choice = Choice(
        right=args.right,
        wrong=args.wrong,
        by=args.by,
        cut=args.cut,
        per_prompt=args.per_prompt,
        balance=args.balance,
        shares=shares,
        num=args.num,
        seed=args.seed,
    )
    return choose(args.sources, args.out, choice, sft=args.sft, held_out=args.held_out)


def grade_arguments(parser: Parser) -> None:
    """Of `moetrain grade`."""
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


def grade(args: Arguments) -> int:
    """Run `moetrain grade`."""
    from moetrain.loops.grade import grade

    if not args.seconds > 0:
        raise MoetrainError(f"--seconds {args.seconds:g} must be above 0.")
    return grade(args.file, args.rewards, args.out, args.workers, args.seconds)


def eval_arguments(parser: Parser) -> None:
    """Of `moetrain eval`."""
    parser.add_argument("model", help="Hugging Face folder, Megatron checkpoint or run_dir")
    parser.add_argument("bench", type=Path, help="a benchmark's YAML, as in examples/evals")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the answers")
    add_overrides(parser)


def eval(args: Arguments) -> int:
    """Run `moetrain eval`."""
    from moetrain.evals.evaluate import evaluate

    return evaluate(args.model, args.bench, args.out, args.overrides)
