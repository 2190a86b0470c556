"""`moetrain score`: per-token log-probs of given sequences, or of a recipe's reference."""

from pathlib import Path

from moetrain.commands.common import Arguments, Command, Parser, add_ranks
from moetrain.errors import MoetrainError


def arguments(parser: Parser) -> None:
    """Declare the arguments."""
    parser.add_argument(
        "model",
        help="Hugging Face folder, Megatron checkpoint or run_dir; or a recipe with a reference",
    )
    parser.add_argument("data", nargs="?", default="", help="JSONL with `tokens` (ids) or `text`")
    parser.add_argument("--out", type=Path, metavar="FILE")
    add_ranks(parser)


def run(args: Arguments) -> int:
    """Run it; the exit code."""
    from moetrain.cluster import launch

    code = launch.as_ranks(args.argv, args.nproc)
    if code is not None:
        return code
    if args.model.endswith((".yaml", ".yml")):
        from moetrain.config.load import load_recipe
        from moetrain.loops.words import fill

        return fill(load_recipe(Path(args.model), [args.data, *args.overrides][not args.data :]))
    if not args.data or args.out is None:
        raise MoetrainError("score: give MODEL DATA --out FILE, or a recipe with a reference.")
    from moetrain.loops.score import score

    return score(args.model, Path(args.data), args.out, args.overrides)


COMMAND = Command("per-token log-probs of given sequences", arguments, run)
