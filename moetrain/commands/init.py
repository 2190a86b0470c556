"""`moetrain init`: a first recipe, from a look into model and data."""

from pathlib import Path

from moetrain.commands.common import Arguments, Command, Parser


def arguments(parser: Parser) -> None:
    """Declare the arguments."""
    parser.add_argument("job", metavar="JOB", help="a method: sft, dpo, grpo, ...")
    parser.add_argument("--model", required=True, metavar="M", help="folder, or builtin:NAME")
    parser.add_argument(
        "--data", required=True, nargs="+", metavar="D", help="files or folders of records"
    )
    parser.add_argument("--eval", nargs="+", default=[], metavar="D", help="held-out records")
    parser.add_argument("--adapter", action="store_true", help="train a LoRA in place of all")
    parser.add_argument(
        "--reward", nargs="+", default=[], metavar="R", help="of answers: a name, or FILE.py:FUNC"
    )
    parser.add_argument(
        "--demonstrations", nargs="+", default=[], metavar="D", help="worked answers, for chord"
    )
    parser.add_argument(
        "--teacher", metavar="T", help="of methods that distil: a folder, or http://HOST:PORT/v1"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: JOB.yaml")


def run(args: Arguments) -> int:
    """Run it; the exit code."""
    from moetrain import files
    from moetrain.config.load import load_recipe
    from moetrain.errors import ConfigError
    from moetrain.run.propose import Wanted, propose

    out: Path = args.out or Path(f"{Path(args.job).name}.yaml")
    if out.exists():
        raise ConfigError(f"{out} exists. Give another --out, or remove it.")
    rewards, shown = tuple(args.reward), tuple(args.demonstrations)
    data, held_out = tuple(args.data), tuple(args.eval)
    wanted = Wanted(
        args.job, args.model, data, held_out, args.adapter, rewards, shown, args.teacher
    )
    files.write_text(out, propose(wanted))
    load_recipe(out)
    print(f"wrote {out}. Next: moetrain train {out} --dry-run, then moetrain train {out}")
    return 0


COMMAND = Command("a first recipe for a job, from your model and data", arguments, run)
