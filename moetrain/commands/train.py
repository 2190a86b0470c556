"""`moetrain train`: train by a recipe."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from moetrain.commands.common import Arguments, Command, Parser, add_ranks

if TYPE_CHECKING:
    from moetrain.config.recipe import Recipe
    from moetrain.models import Model


def arguments(parser: Parser) -> None:
    """Declare the arguments."""
    parser.add_argument("recipe", type=Path)
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print recipe, ranks, bytes per GPU and what the data comes to; run nothing",
    )
    add_ranks(parser)


def run(args: Arguments) -> int:
    """Run it; the exit code."""
    from moetrain import pulse
    from moetrain.cluster import launch
    from moetrain.cluster.watchdog import Watch
    from moetrain.config.load import load_recipe
    from moetrain.run.dry_run import check
    from moetrain.run.inputs import check_inputs

    recipe = load_recipe(args.recipe, args.overrides)
    if args.dry_run:
        _dry_run(recipe, args.nproc)
        return 0
    world_size = launch.joined(args.nproc) or (args.nproc or 1) * launch.num_nodes(args.nproc)
    model = check(recipe, world_size)  # mistakes show before any process starts
    check_inputs(recipe)
    _fits(recipe, model, world_size)
    quiet = recipe.cluster.hang_seconds
    if recipe.rollout is not None:  # the other ranks wait in one collective while a server starts
        quiet += recipe.rollout.start_timeout
    watch = Watch(quiet, recipe.run_dir / "stacks")
    with _recorded(recipe.run_dir, is_rank=launch.joined(args.nproc) is not None) as end:
        end.code = launch.as_ranks(args.argv, args.nproc, watch)
        if end.code is not None:
            return end.code
        pulse.listen()
        if recipe.method.samples:
            from moetrain.loops.rl import train
        else:
            from moetrain.loops.supervised import train
        end.code = train(recipe)
        return end.code


@contextmanager
def _recorded(run_dir: Path, *, is_rank: bool) -> Iterator[Arguments]:
    """Records the exit code that is set within, or that of the error, in starts.jsonl; a rank
    leaves that to whoever started it.
    """
    from moetrain.errors import DivergedError, MoetrainError
    from moetrain.run.starts import num_starts, record_end

    end, before = Arguments(code=None), num_starts(run_dir)
    try:
        yield end
    except BaseException as error:
        interrupted = 130 if isinstance(error, KeyboardInterrupt) else 1
        end.code = error.exit_code if isinstance(error, MoetrainError) else interrupted
        raise
    finally:
        # One that was refused has not started: the last start may be another, which goes on.
        if not is_rank and num_starts(run_dir) > before:
            good = (0, MoetrainError.exit_code, DivergedError.exit_code, 130, 143)
            record_end(run_dir, end.code, good)


def _fits(recipe: "Recipe", model: "Model", size: int) -> None:
    """Refuse, or warn of, a recipe that does not fit the GPUs that it names, where this machine has
    some; whoever starts ranks does it for them.
    """
    import sys

    from moetrain.planner.fit import check_fits, is_predicted
    from moetrain.planner.gpu import find_gpu
    from moetrain.pulse import PULSE
    from moetrain.run.prediction import has_gpus

    is_other = PULSE in os.environ or os.environ.get("RANK", "0") != "0"
    if is_other or not is_predicted(recipe):
        return
    if find_gpu(recipe.cluster.gpu_name, "cluster.gpu").asynchronous != has_gpus():
        return
    line = check_fits(recipe, model, size)
    if line is not None and line.startswith("WARNING"):
        print(f"moetrain: {line}", file=sys.stderr)


def _dry_run(recipe: "Recipe", num_procs: int | None) -> None:
    from moetrain.models.lookup import model_of
    from moetrain.planner.fit import check_fits
    from moetrain.run.dry_run import dry_run, world_size
    from moetrain.run.inputs import check_inputs, has_own_data, is_planned, missing

    size = world_size(recipe, num_procs)
    text = dry_run(recipe, num_procs)
    model = model_of(recipe, dry=True)
    if is_planned(recipe):  # on another machine than the run's
        print(text, *(f"# NOT HERE: {error}" for error in missing(recipe)), sep="\n", flush=True)
    else:
        check_inputs(recipe)
        print(text, flush=True)
    line = check_fits(recipe, model, size)
    if line is not None:
        print(f"# {line}")
    if is_planned(recipe):
        return
    if has_own_data(recipe):
        from moetrain.run.ahead import look_ahead

        lines = look_ahead(recipe)
        print(*(f"# {line}" for line in lines), sep="\n")
        if any(line.startswith("WARNING") for line in [*lines, line or ""]):
            return
    print("# nothing was found that would stop this run")


COMMAND = Command("train by a recipe", arguments, run)
