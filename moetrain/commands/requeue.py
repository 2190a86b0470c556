"""`moetrain requeue`, for slurm/: what comes after a step of a job."""

from moetrain.commands import sweep, train
from moetrain.commands.common import Arguments, Command, Parser, parse


def arguments(parser: Parser) -> None:
    """Declare the arguments."""
    parser.add_argument("--codes", required=True, help="exit codes of the step and its nodes")
    parser.add_argument("--told", choices=["USR1", "TERM", "nothing"], default="nothing")
    parser.add_argument("--retries", type=int, default=3, metavar="N")
    parser.add_argument("--pause", type=int, default=60, metavar="SECONDS")
    parser.add_argument("words", nargs="...", help="-- and the step's own words")


def run(args: Arguments) -> int:
    """Run it; the exit code."""
    from moetrain.cluster.requeue import after, cause
    from moetrain.config.load import load_recipe
    from moetrain.run.sweep import plan_sweep

    words = [word for word in args.words if word != "--"]
    job = parse(words, {"train": train.COMMAND, "sweep": sweep.COMMAND})
    if job.command == "sweep":
        plan = plan_sweep(job.recipe, job.grid, job.overrides, job.nproc, job.out, checks=False)
        run_dir = plan.runs[job.task - 1].recipe.run_dir
    else:
        run_dir = load_recipe(job.recipe, job.overrides).run_dir
    code = cause([int(code) for code in args.codes.split()])
    print(after(run_dir, code, args.told, args.retries, args.pause))
    return 0


COMMAND = Command("for slurm/: what comes after a step", arguments, run)
