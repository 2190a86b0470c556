"""`moetrain pairs`: preference pairs, or instruction data, from answers."""

from pathlib import Path

from moetrain.commands.common import Arguments, Command, Parser, positive
from moetrain.errors import MoetrainError


def arguments(parser: Parser) -> None:
    """Declare the arguments."""
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


def run(args: Arguments) -> int:
    """Run it; the exit code."""
    from moetrain.answers.choose import choose
    from moetrain.data.pairing import Choice

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


COMMAND = Command("preference pairs from answers", arguments, run)
