"""`moetrain convert`: checkpoints, adapters, deeper models."""

from pathlib import Path

from moetrain.commands.common import Arguments, Command, Parser, positive

# action -> (its line of help, its paths)
CONVERSIONS: dict[str, tuple[str, tuple[str, ...]]] = {
    "hf2mcore": ("a Megatron checkpoint of a Hugging Face folder", ("source", "destination")),
    "mcore2hf": ("a Hugging Face folder of a Megatron checkpoint", ("source", "destination")),
    "verify": ("compare the weights of two folders", ("a", "b")),
    "adapter": ("a run's adapter as a PEFT folder", ("run", "destination")),
    "merge": ("a plain model of a base and a PEFT folder", ("base", "adapter", "destination")),
    "expand": ("a deeper model that answers as before", ("source", "destination")),
}


def arguments(parser: Parser) -> None:
    """Declare the arguments."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    for action, (line, paths) in CONVERSIONS.items():
        own = actions.add_parser(action, help=line, description=line)
        for path in paths:
            own.add_argument(path, type=Path)
        if action == "expand":
            own.add_argument(
                "--every",
                type=positive,
                default=4,
                metavar="K",
                help="a new block after every K-th (default 4)",
            )


def run(args: Arguments) -> int:
    """Run it; the exit code."""
    paths: list[Path] = [vars(args)[path] for path in CONVERSIONS[args.action][1]]
    if args.action in ("merge", "expand"):
        from moetrain.engine import derived as hf_convert

        if args.action == "merge":
            return hf_convert.merge(*paths)
        return hf_convert.expand(*paths, every=args.every)
    from moetrain.engine import convert

    actions = {
        "hf2mcore": convert.hf2mcore,
        "mcore2hf": convert.mcore2hf,
        "verify": convert.verify,
        "adapter": convert.adapter,
    }
    return actions[args.action](*paths)


COMMAND = Command("checkpoints, adapters, deeper models", arguments, run)
