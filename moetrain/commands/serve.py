"""`moetrain serve`: a vLLM server for rollout.address, a model for agents, or a reward model."""

from pathlib import Path

from moetrain.commands.common import Arguments, Command, Parser, add_ranks, positive


def arguments(parser: Parser) -> None:
    """Declare the arguments."""
    parser.add_argument(
        "recipe",
        help="with a model to serve: Hugging Face folder, Megatron checkpoint or run_dir",
    )
    parser.add_argument("--port", type=positive, metavar="N", help="with a model: default any")
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--agents", action="store_true", help="serve a model in OpenAI's form to your agents"
    )
    what.add_argument(
        "--reward-model",
        action="store_true",
        help="serve a reward model to reward_model's address, by the engine at any layout",
    )
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="with --agents: takes the sessions' trajectories"
    )
    parser.add_argument(
        "--host", metavar="H", help="with --reward-model: where it listens; default 127.0.0.1"
    )
    add_ranks(parser)


def run(args: Arguments) -> int:
    """Run it; the exit code."""
    from moetrain.errors import ConfigError

    if args.reward_model:
        if args.out is not None:
            raise ConfigError("--out is for serve MODEL --agents.")
        return _reward_model(args)
    if args.host is not None or args.nproc is not None:
        raise ConfigError("--host and --nproc are for serve MODEL --reward-model.")
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


def _reward_model(args: Arguments) -> int:
    from moetrain import pulse
    from moetrain.cluster import launch
    from moetrain.cluster.watchdog import Watch
    from moetrain.config.answering import serving_recipe

    # Mistakes show before any process starts.
    recipe = serving_recipe(args.recipe, args.overrides)
    watch = Watch(recipe.cluster.hang_seconds, recipe.run_dir / "stacks")
    code = launch.as_ranks(args.argv, args.nproc, watch)
    if code is not None:
        return code
    pulse.listen()
    from moetrain.loops.reward_model import serve_reward_model

    host = args.host or "127.0.0.1"
    return serve_reward_model(args.recipe, host, args.port or 0, args.overrides)


COMMAND = Command(
    "a vLLM server for rollout.address, a model for agents, or a reward model", arguments, run
)
