"""`moetrain serve`: a vLLM server for rollout.address, or a model for agents."""

from pathlib import Path

from moetrain.commands.common import Arguments, Command, Parser, positive


def arguments(parser: Parser) -> None:
    """Declare the arguments."""
    parser.add_argument(
        "recipe", help="with --agents: Hugging Face folder, Megatron checkpoint or run_dir"
    )
    parser.add_argument("--port", type=positive, metavar="N", help="with --agents: default any")
    parser.add_argument(
        "--agents", action="store_true", help="serve a model in OpenAI's form to your agents"
    )
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="with --agents: takes the sessions' trajectories"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value")


def run(args: Arguments) -> int:
    """Run it; the exit code."""
    from moetrain.errors import ConfigError

    if args.agents:
        from moetrain.answers.agents import serve_agents

        if args.out is None:
            raise ConfigError("serve --agents needs --out FILE, which takes the trajectories.")
        return serve_agents(args.recipe, args.out, args.port or 0, args.overrides)
    from moetrain.config.load import load_recipe
    from moetrain.models.lookup import find_model
    from moetrain.rollout.serve import serve

    if args.out is not None or args.port is None:
        raise ConfigError("serve RECIPE takes --port N; --out is for serve MODEL --agents.")
    recipe = load_recipe(Path(args.recipe), args.overrides)
    return serve(recipe, dict(find_model(recipe.model).hf), args.port)


COMMAND = Command("a vLLM server for rollout.address, or a model for agents", arguments, run)
