"""`moetrain sweep`: runs over a grid of settings."""

from pathlib import Path

from moetrain.commands.common import Arguments, Command, Parser, add_ranks, positive
from moetrain.errors import MoetrainError


def arguments(parser: Parser) -> None:
    """Declare the arguments."""
    parser.add_argument("recipe", type=Path)
    parser.add_argument(
        "--grid",
        action="append",
        required=True,
        metavar="key=value,value",
        help="a key and its values; several --grid make the product",
    )
    parser.add_argument("--jobs", choices=["local", "slurm"], default="local")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="of the runs (default: run_dir with -sweep)"
    )
    parser.add_argument(
        "--task", type=positive, metavar="K", help="run line K of DIR/sweep.jsonl alone"
    )
    add_ranks(parser)


def run(args: Arguments) -> int:
    """Run it; the exit code."""
    from moetrain.cluster import launch
    from moetrain.run import sweep

    nodes = launch.num_nodes(args.nproc)
    plan = sweep.plan_sweep(args.recipe, args.grid, args.overrides, args.nproc, args.out, nodes)
    if args.task:
        return sweep.run_task(plan, args.task)
    if launch.joined(None) is not None:
        raise MoetrainError(
            "A sweep starts its ranks itself: leave torchrun or srun out, or give --task."
        )
    if args.jobs == "slurm":
        return sweep.submit(plan, args.argv)
    return sweep.run_sweep(plan, args.argv)


COMMAND = Command("runs over a grid of settings", arguments, run)
