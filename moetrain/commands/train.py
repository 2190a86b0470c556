"""`moetrain train`: train by a recipe."""

from pathlib import Path

from moetrain.commands.common import Arguments, Command, Parser, add_ranks


def arguments(parser: Parser) -> None:
    """Declare the arguments."""
    parser.add_argument("recipe", type=Path)
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print recipe, ranks and static bytes per GPU; run nothing",
    )
    add_ranks(parser)


def run(args: Arguments) -> int:
    """Run it; the exit code."""
    from moetrain import pulse
    from moetrain.cluster import launch
    from moetrain.cluster.watchdog import Watch
    from moetrain.config.load import load_recipe
    from moetrain.run.dry_run import check, dry_run

    recipe = load_recipe(args.recipe, args.overrides)
    if args.dry_run:
        print(dry_run(recipe, args.nproc))
        return 0
    world_size = launch.joined(args.nproc) or (args.nproc or 1) * launch.num_nodes(args.nproc)
    check(recipe, world_size)  # mistakes show before any process starts
    quiet = recipe.cluster.hang_seconds
    if recipe.rollout is not None:  # the other ranks wait in one collective while a server starts
        quiet += recipe.rollout.start_timeout
    watch = Watch(quiet, recipe.run_dir / "stacks")
    code = launch.as_ranks(args.argv, args.nproc, watch)
    if code is not None:
        return code
    pulse.listen()
    if recipe.method.samples:
        from moetrain.loops.rl import train
    else:
        from moetrain.loops.supervised import train
    return train(recipe)


COMMAND = Command("train by a recipe", arguments, run)
