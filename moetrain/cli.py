"""The command line: one table of commands. Nothing heavy is imported before a command is chosen."""

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from moetrain import __version__, cli_answers, cli_cluster, cli_data, cli_swift
from moetrain.cli_common import Arguments, Parser, add_overrides, positive
from moetrain.errors import MoetrainError

LONGEST_ERROR = 4000  # characters


@dataclass(frozen=True)
class Command:
    """A command: its line of help, its arguments, and what it does (returns the exit code)."""

    help: str
    arguments: Callable[[Parser], None]
    run: Callable[[Arguments], int]


def _ranks(parser: Parser) -> None:
    parser.add_argument(
        "--nproc", type=positive, default=None, metavar="N", help="start N local ranks (default 1)"
    )
    add_overrides(parser)


def _train_arguments(parser: Parser) -> None:
    parser.add_argument("recipe", type=Path)
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print recipe, ranks and static bytes per GPU; run nothing",
    )
    _ranks(parser)


def _train(args: Arguments) -> int:
    from moetrain import pulse
    from moetrain.cluster import launch
    from moetrain.cluster.watchdog import Watch
    from moetrain.config.load import load_recipe
    from moetrain.plan.dry_run import check, dry_run

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


def _score_arguments(parser: Parser) -> None:
    parser.add_argument(
        "model", help="Hugging Face folder or Megatron checkpoint; or a recipe with a reference"
    )
    parser.add_argument("data", nargs="?", default="", help="JSONL with `tokens` (ids) or `text`")
    parser.add_argument("--out", type=Path, metavar="FILE")
    _ranks(parser)


def _score(args: Arguments) -> int:
    from moetrain.cluster import launch

    code = launch.as_ranks(args.argv, args.nproc)
    if code is not None:
        return code
    if args.model.endswith((".yaml", ".yml")):
        from moetrain.config.load import load_recipe
        from moetrain.loops.reference import fill

        return fill(load_recipe(Path(args.model), [args.data, *args.overrides][not args.data :]))
    if not args.data or args.out is None:
        raise MoetrainError("score: give MODEL DATA --out FILE, or a recipe with a reference.")
    from moetrain.loops.score import score

    return score(args.model, Path(args.data), args.out, args.overrides)


def _tokenizer_arguments(parser: Parser) -> None:
    parser.add_argument("action", choices=["train"])
    parser.add_argument(
        "inputs", nargs="+", type=Path, help="text or JSONL files, or folders of them"
    )
    parser.add_argument("--vocab-size", type=positive, default=32000, metavar="N")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")


def _tokenizer(args: Arguments) -> int:
    from moetrain.data.tokenizer import train

    train(args.inputs, args.vocab_size, args.out)
    return 0


# action -> (its line of help, its paths)
CONVERSIONS: dict[str, tuple[str, tuple[str, ...]]] = {
    "hf2mcore": ("a Megatron checkpoint of a Hugging Face folder", ("source", "destination")),
    "mcore2hf": ("a Hugging Face folder of a Megatron checkpoint", ("source", "destination")),
    "verify": ("compare the weights of two folders", ("a", "b")),
    "adapter": ("a run's adapter as a PEFT folder", ("run", "destination")),
    "merge": ("a plain model of a base and a PEFT folder", ("base", "adapter", "destination")),
    "expand": ("a deeper model that answers as before", ("source", "destination")),
}


def _convert_arguments(parser: Parser) -> None:
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


def _convert(args: Arguments) -> int:
    paths: list[Path] = [vars(args)[path] for path in CONVERSIONS[args.action][1]]
    if args.action in ("merge", "expand"):
        from moetrain.loops import hf_convert

        if args.action == "merge":
            return hf_convert.merge(*paths)
        return hf_convert.expand(*paths, every=args.every)
    from moetrain.loops import convert

    actions = {
        "hf2mcore": convert.hf2mcore,
        "mcore2hf": convert.mcore2hf,
        "verify": convert.verify,
        "adapter": convert.adapter,
    }
    return actions[args.action](*paths)


def _sweep_arguments(parser: Parser) -> None:
    parser.add_argument("recipe", type=Path)
    parser.add_argument(
        "--grid",
        action="append",
        required=True,
        metavar="key=value,value",
        help="a key and its values; several --grid make the product",
    )
    parser.add_argument("--jobs", choices=["local", "slurm"], default="local")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="of the runs (default: run_dir with -sweep)"
    )
    parser.add_argument(
        "--task", type=positive, metavar="K", help="run line K of DIR/sweep.jsonl alone"
    )
    _ranks(parser)


def _sweep(args: Arguments) -> int:
    from moetrain.cluster import launch
    from moetrain.loops import sweep

    nodes = launch.num_nodes(args.nproc)
    plan = sweep.plan_sweep(args.recipe, args.grid, args.overrides, args.nproc, args.out, nodes)
    if args.task:
        return sweep.run_task(plan, args.task)
    if launch.joined(None) is not None:
        raise MoetrainError(
            "A sweep starts its ranks itself: leave torchrun or srun out, or give --task."
        )
    if args.jobs == "slurm":
        return sweep.submit(plan, args.argv)
    return sweep.run_sweep(plan, args.argv)


def _requeue_arguments(parser: Parser) -> None:
    parser.add_argument("--codes", required=True, help="exit codes of the step and its nodes")
    parser.add_argument("--told", choices=["USR1", "TERM", "nothing"], default="nothing")
    parser.add_argument("--retries", type=int, default=3, metavar="N")
    parser.add_argument("--pause", type=int, default=60, metavar="SECONDS")
    parser.add_argument("words", nargs="...", help="-- and the step's own words")


def _requeue(args: Arguments) -> int:
    from moetrain.cluster.requeue import after, cause
    from moetrain.config.load import load_recipe
    from moetrain.loops.sweep import plan_sweep

    job = parse([word for word in args.words if word != "--"])
    if job.command == "sweep":
        plan = plan_sweep(job.recipe, job.grid, job.overrides, job.nproc, job.out, checks=False)
        run_dir = plan.runs[job.task - 1].recipe.run_dir
    else:
        run_dir = load_recipe(job.recipe, job.overrides).run_dir
    code = cause([int(code) for code in args.codes.split()])
    print(after(run_dir, code, args.told, args.retries, args.pause))
    return 0


def _report_arguments(parser: Parser) -> None:
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folder, or of runs")
    parser.add_argument("-o", "--out", type=Path, default=Path("report.html"), metavar="FILE")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="default: beside the page")


def _report(args: Arguments) -> int:
    from moetrain.observe.report import write_report

    return write_report(args.runs, args.out, args.csv)


def _serve_arguments(parser: Parser) -> None:
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--port", type=positive, required=True, metavar="N")
    parser.add_argument("overrides", nargs="*", metavar="key=value")


def _serve(args: Arguments) -> int:
    from moetrain.config.load import load_recipe
    from moetrain.plan.model import read_hf_config
    from moetrain.rollout.serve import serve

    recipe = load_recipe(args.recipe, args.overrides)
    return serve(recipe, dict(read_hf_config(recipe.model)), args.port)


def _quickstart(args: Arguments) -> int:
    from moetrain.loops.quickstart import main

    return main(args.out) or 0


COMMANDS: dict[str, Command] = {
    "train": Command("train by a recipe", _train_arguments, _train),
    "score": Command("per-token log-probs of given sequences", _score_arguments, _score),
    "sample": Command(
        "several answers to each prompt", cli_answers.sample_arguments, cli_answers.sample
    ),
    "pairs": Command(
        "preference pairs from answers", cli_answers.pairs_arguments, cli_answers.pairs
    ),
    "eval": Command(
        "a benchmark answered and scored", cli_answers.eval_arguments, cli_answers.eval
    ),
    "grade": Command(
        "what rewards pay for completions in a file", cli_answers.grade_arguments, cli_answers.grade
    ),
    "serve": Command("a vLLM server for rollout.address", _serve_arguments, _serve),
    "tokenizer": Command("train a byte-level BPE tokenizer", _tokenizer_arguments, _tokenizer),
    "data": Command(
        "see what is learned of records; index a corpus", cli_data.data_arguments, cli_data.data
    ),
    "convert": Command("checkpoints, adapters, deeper models", _convert_arguments, _convert),
    "sweep": Command("runs over a grid of settings", _sweep_arguments, _sweep),
    "launch": Command("a recipe as a Slurm job", cli_cluster.launch_arguments, cli_cluster.launch),
    "requeue": Command("for slurm/: what comes after a step", _requeue_arguments, _requeue),
    "report": Command("runs side by side: page, CSV, table", _report_arguments, _report),
    "swift": Command("recipes from and to ms-swift's commands", cli_swift.arguments, cli_swift.run),
    "doctor": Command(
        "what would fail in the job, before it", cli_cluster.doctor_arguments, cli_cluster.doctor
    ),
    "quickstart": Command(
        "a whole small run on this machine",
        lambda p: p.add_argument("--out", type=Path, default=Path("runs/quickstart")) and None,
        _quickstart,
    ),
}


def parse(argv: Sequence[str]) -> Arguments:
    """The arguments of a command line; argparse exits where it is none."""
    parser = Parser(
        prog="moetrain", description="Train large mixture-of-experts models on Megatron Core."
    )
    parser.add_argument("--version", action="version", version=f"moetrain {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        command.arguments(commands.add_parser(name, help=command.help, description=command.help))
    args, rest = parser.parse_known_args(argv)
    args.argv = list(argv)  # what local ranks are started with
    for word in rest:  # argparse gathers overrides only where they stand together
        if "overrides" not in args or word.startswith("-"):
            parser.error(f"unrecognized arguments: {word}")
        args.overrides.append(word)
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code. A user's mistake is one line on stderr and exit code
    2, and so is a disk that takes no more.
    """
    args = parse(sys.argv[1:] if argv is None else argv)
    try:
        code = COMMANDS[args.command].run(args)
        sys.stdout.flush()
        return code
    except MoetrainError as error:
        line = " ".join(str(error).splitlines())
        if len(line) > LONGEST_ERROR:  # a name in a file may be of any length
            line = f"{line[: LONGEST_ERROR // 2]} ... {line[-LONGEST_ERROR // 2 :]}"
        _say(f"moetrain: error: {line}")
        return error.exit_code
    except KeyboardInterrupt:
        _say("moetrain: interrupted.")
        return 130
    except BrokenPipeError:
        _drop(sys.stdout)
        return 141
    except OSError as error:
        from moetrain import files

        if (line := files.told(error)) is None:
            raise
        _say(f"moetrain: error: {line}")
        return 1 if error.errno in files.PASSING else MoetrainError.exit_code


def _say(line: str) -> None:
    """On stderr, after what is on its way to stdout; either may be a file on a full disk."""
    for stream, text in ((sys.stdout, ""), (sys.stderr, line + "\n")):
        try:
            stream.write(text)
            stream.flush()
        except OSError:
            _drop(stream)


def _drop(stream: TextIO) -> None:
    """Python would try once more to write what is left, at its end, and fail then."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
