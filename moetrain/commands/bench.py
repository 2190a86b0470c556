"""`moetrain bench gpu`: measure what `moetrain plan` reckons with, on the machine at hand."""

from pathlib import Path

from moetrain.commands.common import Arguments, Command, Parser, positive


def arguments(parser: Parser) -> None:
    """Declare the arguments."""
    parser.add_argument("what", choices=["gpu"])
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FILE", help="the .yaml, for plan --gpu FILE"
    )
    parser.add_argument(
        "--like", metavar="GPU", help="on a GPU: the known one with its data sheet, as H100-80GB"
    )
    parser.add_argument("--name", help="what it calls itself (what the driver calls it)")
    parser.add_argument(
        "--nproc",
        type=positive,
        default=None,
        metavar="N",
        help="ranks, which measure collectives too (default 1)",
    )


def run(args: Arguments) -> int:
    """Run it; the exit code."""
    from moetrain.cluster import launch
    from moetrain.planner.gpu import find_gpu

    like = None if args.like is None else find_gpu(args.like)
    code = launch.as_ranks(args.argv, args.nproc)
    if code is not None:
        return code
    launch.joined(args.nproc)
    from moetrain.planner import bench

    bench.main(like, args.name, args.out)
    return 0


COMMAND = Command("measure this machine for `moetrain plan`", arguments, run)
