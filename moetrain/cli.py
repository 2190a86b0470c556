"""The command line: one table of commands. Nothing heavy is imported before a command is chosen."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from moetrain import __version__
from moetrain.errors import MoetrainError

Parser = argparse.ArgumentParser
Arguments = argparse.Namespace


@dataclass(frozen=True)
class Command:
    """A command: its line of help, its arguments, and what it does (returns the exit code)."""

    help: str
    arguments: Callable[[Parser], None]
    run: Callable[[Arguments], int]


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def _ranks(parser: Parser) -> None:
    parser.add_argument(
        "--nproc", type=_positive, default=None, metavar="N", help="start N local ranks (default 1)"
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="dotted recipe keys; values are YAML"
    )


def _train_arguments(parser: Parser) -> None:
    parser.add_argument("recipe", type=Path)
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print recipe, ranks and static bytes per GPU; run nothing",
    )
    _ranks(parser)


def _train(args: Arguments) -> int:
    from moetrain.cluster import launch
    from moetrain.config.load import load_recipe
    from moetrain.plan.dry_run import check, dry_run

    recipe = load_recipe(args.recipe, args.overrides)
    if args.dry_run:
        print(dry_run(recipe, args.nproc))
        return 0
    world_size = launch.joined(args.nproc)
    check(recipe, world_size or args.nproc or 1)  # mistakes show before any process starts
    if world_size is None and (args.nproc or 1) > 1:
        return launch.run_local([sys.executable, "-m", "moetrain", *args.argv], args.nproc)
    from moetrain.loops.supervised import train

    return train(recipe)


def _score_arguments(parser: Parser) -> None:
    parser.add_argument("model", help="Hugging Face folder or Megatron checkpoint")
    parser.add_argument("data", type=Path, help="JSONL with `tokens` (ids) or `text`")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    _ranks(parser)


def _score(args: Arguments) -> int:
    from moetrain.cluster import launch

    if launch.joined(args.nproc) is None and (args.nproc or 1) > 1:
        return launch.run_local([sys.executable, "-m", "moetrain", *args.argv], args.nproc)
    from moetrain.loops.score import score

    return score(args.model, args.data, args.out, args.overrides)


def _tokenizer_arguments(parser: Parser) -> None:
    parser.add_argument("action", choices=["train"])
    parser.add_argument(
        "inputs", nargs="+", type=Path, help="text or JSONL files, or folders of them"
    )
    parser.add_argument("--vocab-size", type=_positive, default=32000, metavar="N")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")


def _tokenizer(args: Arguments) -> int:
    from moetrain.data.tokenizer import train

    train(args.inputs, args.vocab_size, args.out)
    return 0


def _data_arguments(parser: Parser) -> None:
    parser.add_argument("action", choices=["index"])
    parser.add_argument(
        "inputs", nargs="+", type=Path, help="text or JSONL files, or folders of them"
    )
    parser.add_argument(
        "--tokenizer", required=True, metavar="DIR", help="tokenizer folder or builtin:NAME"
    )
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="PREFIX",
        help="PREFIX.bin and PREFIX.idx are written",
    )


def _data(args: Arguments) -> int:
    from moetrain.data.corpus import index

    index(args.inputs, args.tokenizer, args.out)
    return 0


def _convert_arguments(parser: Parser) -> None:
    parser.add_argument("action", choices=["hf2mcore", "mcore2hf", "verify"])
    parser.add_argument("source", type=Path)
    parser.add_argument("destination", type=Path)


def _convert(args: Arguments) -> int:
    from moetrain.loops import convert

    actions = {
        "hf2mcore": convert.hf2mcore,
        "mcore2hf": convert.mcore2hf,
        "verify": convert.verify,
    }
    return actions[args.action](args.source, args.destination)


def _quickstart(args: Arguments) -> int:
    from moetrain.loops.quickstart import main

    return main(args.out) or 0


COMMANDS: dict[str, Command] = {
    "train": Command("train by a recipe", _train_arguments, _train),
    "score": Command("per-token log-probs of given sequences", _score_arguments, _score),
    "tokenizer": Command("train a byte-level BPE tokenizer", _tokenizer_arguments, _tokenizer),
    "data": Command("index a corpus for pretraining", _data_arguments, _data),
    "convert": Command("Hugging Face <-> Megatron checkpoints", _convert_arguments, _convert),
    "quickstart": Command(
        "a whole small run on this machine",
        lambda p: p.add_argument("--out", type=Path, default=Path("runs/quickstart")) and None,
        _quickstart,
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code. A user's mistake is one line on stderr and exit code
    2.
    """
    parser = Parser(
        prog="moetrain", description="Train large mixture-of-experts models on Megatron Core."
    )
    parser.add_argument("--version", action="version", version=f"moetrain {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        command.arguments(commands.add_parser(name, help=command.help, description=command.help))
    argv = list(sys.argv[1:] if argv is None else argv)
    args, rest = parser.parse_known_args(argv)
    args.argv = argv  # what local ranks are started with
    for word in rest:  # argparse gathers overrides only where they stand together
        if "overrides" not in args or word.startswith("-"):
            parser.error(f"unrecognized arguments: {word}")
        args.overrides.append(word)
    try:
        return COMMANDS[args.command].run(args)
    except MoetrainError as error:
        print("moetrain: error:", " ".join(str(error).splitlines()), file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("moetrain: interrupted.", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
