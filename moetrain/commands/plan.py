"""`moetrain plan`: what a step holds and takes on GPUs that are not here, and the best layout."""

from pathlib import Path

from moetrain.commands.common import Arguments, Command, Parser, add_overrides, positive


def arguments(parser: Parser) -> None:
    """Declare the arguments."""
    parser.add_argument("recipe", type=Path)
    parser.add_argument(
        "--gpus",
        type=positive,
        metavar="N",
        help="all of the job, with those of servers; default: as the recipe's cluster says",
    )
    parser.add_argument(
        "--gpu", metavar="NAME", help="a known GPU, or FILE.yaml; default: cluster.gpu"
    )
    parser.add_argument(
        "--goal",
        choices=["speed", "memory", "longest"],
        help="the fastest layout that fits, the one that holds least, or the fastest at the longest"
        " data.seq_len at which any fits (default: speed)",
    )
    parser.add_argument(
        "--seq",
        type=_lengths,
        default=[],
        metavar="N[,N...]",
        help="a plan for each of these data.seq_len",
    )
    parser.add_argument(
        "--answer-tokens",
        type=positive,
        metavar="N",
        help="of an answer in the mean, where vLLM samples (default: half of rollout.max_tokens)",
    )
    parser.add_argument(
        "--as-is", action="store_true", help="predict the recipe's own layout, search none"
    )
    parser.add_argument(
        "--routing",
        default="balanced",
        metavar="balanced|natural|X",
        help="tokens of the fullest expert-parallel rank over the mean (default: balanced, 1)",
    )
    parser.add_argument(
        "--chart",
        type=Path,
        metavar="FILE.png",
        help="what the fullest rank holds over a step; FILE.json: its numbers",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--write", type=Path, metavar="R.yaml", help="write the recipe with the best layout"
    )
    parser.add_argument(
        "--sbatch",
        action="store_true",
        help="print the Slurm script of the recipe that --write wrote",
    )
    add_overrides(parser)


def _lengths(text: str) -> list[int]:
    """Whole numbers, between commas."""
    return sorted({positive(word) for word in text.split(",")})


def run(args: Arguments) -> int:
    """Run it; the exit code."""
    from moetrain.cluster import submit
    from moetrain.run.plan import plan

    code = plan(args)
    if code == 0 and args.sbatch:
        print(submit.script_of(args.write, (), None, "24:00:00"), end="")
    return code


COMMAND = Command("predict a step on GPUs that are not here, and find the layout", arguments, run)
