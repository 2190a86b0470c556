"""`moetrain serve`: a vLLM server for rollout.address."""

from pathlib import Path

from moetrain.commands.common import Arguments, Command, Parser, positive


def arguments(parser: Parser) -> None:
    """Declare the arguments."""
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--port", type=positive, required=True, metavar="N")
    parser.add_argument("overrides", nargs="*", metavar="key=value")


def run(args: Arguments) -> int:
    """Run it; the exit code."""
    from moetrain.config.load import load_recipe
    from moetrain.models.lookup import find_model
    from moetrain.rollout.serve import serve

    recipe = load_recipe(args.recipe, args.overrides)
    return serve(recipe, dict(find_model(recipe.model).hf), args.port)


COMMAND = Command("a vLLM server for rollout.address", arguments, run)
