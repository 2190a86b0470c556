"""`moetrain sample`: several answers to each prompt."""

from pathlib import Path

from moetrain.commands.common import Arguments, Command, Parser, add_overrides, positive


def arguments(parser: Parser) -> None:
    """Declare the arguments."""
    parser.add_argument("model", help="Hugging Face folder, Megatron checkpoint or run_dir")
    parser.add_argument("prompts", help="JSONL of prompts and columns for rewards, or builtin:NAME")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    parser.add_argument("-k", type=positive, default=4, metavar="N", help="answers each (4)")
    add_overrides(parser)


def run(args: Arguments) -> int:
    """Run it; the exit code."""
    from moetrain.answers import sample as sampling

    return sampling.sample(args.model, args.prompts, args.out, args.k, args.overrides)


COMMAND = Command("several answers to each prompt", arguments, run)
