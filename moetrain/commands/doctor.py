"""`moetrain doctor`: what would fail in the job, before it."""

from pathlib import Path

from moetrain.commands.common import Arguments, Command, Parser, add_overrides, positive
from moetrain.errors import MoetrainError


def arguments(parser: Parser) -> None:
    """Declare the arguments."""
    parser.add_argument("recipe", type=Path, nargs="?")
    parser.add_argument(
        "--nproc", type=positive, default=None, metavar="N", help="start N local ranks (default 1)"
    )
    add_overrides(parser)


def run(args: Arguments) -> int:
    """Run it; the exit code."""
    from moetrain.cluster import doctor, launch

    code = launch.as_ranks(args.argv, args.nproc)
    if code is not None:
        return code
    recipe, overrides = args.recipe, args.overrides
    if recipe is not None and "=" in str(recipe) and not recipe.exists():
        raise MoetrainError(f"doctor: {recipe} overrides no recipe. Give RECIPE before it.")
    return doctor.main(recipe, overrides, launch.joined(args.nproc))


COMMAND = Command("what would fail in the job, before it", arguments, run)
