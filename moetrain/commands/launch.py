"""`moetrain launch`: a recipe as a Slurm job."""

from pathlib import Path

from moetrain.commands.common import Arguments, Command, Parser, add_overrides, positive


def arguments(parser: Parser) -> None:
    """Declare the arguments."""
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--nodes", type=positive, metavar="N", help="default: cluster.nodes")
    parser.add_argument("--time", default="24:00:00", metavar="H:M:S", help="limit of one start")
    parser.add_argument("--dry-run", action="store_true", help="print the script, submit nothing")
    add_overrides(parser)


def run(args: Arguments) -> int:
    """Run it; the exit code."""
    from moetrain.cluster import submit

    script = submit.script_of(
        args.recipe, args.overrides, args.nodes, args.time, dry_run=args.dry_run
    )
    if args.dry_run:
        print(script, end="")
        return 0
    return submit.submit(script)


COMMAND = Command("a recipe as a Slurm job", arguments, run)
