"""Arguments of the commands about machines: what would fail on them, and jobs for Slurm."""

from pathlib import Path

from moetrain.cli_common import Arguments, Parser, add_overrides, positive
from moetrain.errors import MoetrainError


def doctor_arguments(parser: Parser) -> None:
    """Of `moetrain doctor`."""
    parser.add_argument("recipe", type=Path, nargs="?")
    parser.add_argument(
        "--nproc", type=positive, default=None, metavar="N", help="start N local ranks (default 1)"
    )
    add_overrides(parser)


def doctor(args: Arguments) -> int:
    """Run `moetrain doctor`."""
    from moetrain.cluster import doctor, launch

    code = launch.as_ranks(args.argv, args.nproc)
    if code is not None:
        return code
    recipe, overrides = args.recipe, args.overrides
    if recipe is not None and "=" in str(recipe) and not recipe.exists():
        raise MoetrainError(f"doctor: {recipe} overrides no recipe. Give RECIPE before it.")
    return doctor.main(recipe, overrides, launch.joined(args.nproc))


def launch_arguments(parser: Parser) -> None:
    """Of `moetrain launch`."""
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--nodes", type=positive, metavar="N", help="default: cluster.nodes")
    parser.add_argument("--time", default="24:00:00", metavar="H:M:S", help="limit of one start")
    parser.add_argument("--dry-run", action="store_true", help="print the script, submit nothing")
    add_overrides(parser)


def launch(args: Arguments) -> int:
    """Run `moetrain launch`."""
    from moetrain.cluster import submit

    script = submit.script_of(args.recipe, args.overrides, args.nodes, args.time)
    if args.dry_run:
        print(script, end="")
        return 0
    return submit.submit(script)
