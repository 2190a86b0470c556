"""`moetrain tokenizer`: train a byte-level BPE tokenizer."""

from pathlib import Path

from moetrain.commands.common import Arguments, Command, Parser, positive


def arguments(parser: Parser) -> None:
    """Declare the arguments."""
    parser.add_argument("action", choices=["train"])
    parser.add_argument(
        "inputs", nargs="+", type=Path, help="text or JSONL files, or folders of them"
    )
    parser.add_argument("--vocab-size", type=positive, default=32000, metavar="N")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")


def run(args: Arguments) -> int:
    """Run it; the exit code."""
    from moetrain.data.tokenizer_training import train

    train(args.inputs, args.vocab_size, args.out)
    return 0


COMMAND = Command("train a byte-level BPE tokenizer", arguments, run)
