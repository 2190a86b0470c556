"""`moetrain plan`: the search's answer as a table, as JSON, as a recipe and as a job."""

import json
import sys
from argparse import Namespace
from typing import Any

from moetrain import files
from moetrain.config.load import dump_recipe, load_recipe
from moetrain.config.recipe import Recipe
from moetrain.errors import ConfigError, MoetrainError, plural
from moetrain.planner.cost import NATURAL_LOAD
from moetrain.planner.gpu import Gpu, find_gpu
from moetrain.planner.search import Planned, Search, SearchResult
from moetrain.run.dry_run import check, world_size

SHOWN = 8
AXES = ("tp", "cp", "pp", "vpp", "ep", "etp")


def plan(args: Namespace) -> int:
    """The exit code: that of a mistake where nothing fits."""
    _check_options(args)
    recipe = load_recipe(args.recipe, args.overrides)
    gpu_name = args.gpu or recipe.cluster.gpu
    gpu = find_gpu(gpu_name, "--gpu" if args.gpu else "cluster.gpu")
    size = args.gpus or world_size(recipe, None)
    search = Search(recipe, size, gpu, args.goal or "speed", _load(args.routing))
    if search.load > 1 and search.model.moe is None:
        raise ConfigError(f"--routing {args.routing}: this model has no experts. Leave it out.")
    if args.as_is:
        check(recipe, size, dry=True)
        result = search.as_is()
    else:
        result = search.best(lambda line: print(f"# {line}", file=sys.stderr, flush=True))
    planned = _with_layout(recipe, result.best, gpu_name, size)
    check(planned, size, dry=True)
    print(json.dumps(as_json(result)) if args.json else as_text(result, gpu, size))
    if not result.best.fits:
        return MoetrainError.exit_code
    if args.write is not None:
        files.write_text(args.write, dump_recipe(planned))
    return 0


def _check_options(args: Namespace) -> None:
    if args.sbatch and args.write is None:
        raise ConfigError(
            "--sbatch prints the job of the recipe that is written. Give --write too."
        )
    if args.sbatch and args.json:
        raise ConfigError("--sbatch and --json both print. Give one of them.")
    if args.as_is and args.goal is not None:
        raise ConfigError("--goal chooses among layouts, and --as-is looks at one. Leave one out.")


def _load(routing: str) -> float:
    known = {"balanced": 1.0, "natural": NATURAL_LOAD}
    if routing in known:
        return known[routing]
    try:
        load = float(routing)
    except ValueError:
        load = 0.0
    if not 1 <= load < 1e3:
        raise ConfigError(
            f"--routing {routing}: give balanced, natural, or the tokens of the fullest"
            " expert-parallel rank over the mean, such as 1.5."
        )
    return load


def changes(planned: Planned) -> dict[str, dict[str, Any]]:
    """The keys of the recipe that make the layout."""
    parallel, train = planned.recipe.parallel, planned.recipe.train
    return {
        "parallel": {axis: getattr(parallel, axis) or 1 for axis in AXES},
        "train": {"micro_batch": train.micro_batch, "recompute": train.recompute},
    }


def as_json(result: SearchResult) -> dict[str, Any]:
    """As docs/planning.md says."""
    return {
        "layouts": [_row(planned) for planned in result.layouts],
        "best": 0 if result.best.fits else None,
        "considered": result.considered,
        "seconds": round(result.seconds, 2),
    }


def _row(planned: Planned) -> dict[str, Any]:
    seconds = planned.seconds
    return changes(planned) | {
        "peak_gib": round(planned.peak_gib, 3),
        "memory": {name: round(gib, 3) for name, gib in planned.memory.items()},
        "step_s": planned.step_s,
        "tokens_per_s": seconds.tokens_per_s,
        "tflops_per_gpu": seconds.tflops,
        "bubble": seconds.bubble_share,
        "exposed_comm_s": seconds.exposed_s,
        "fits": planned.fits,
        "traced": True,
    }


def as_text(result: SearchResult, gpu: Gpu, size: int) -> str:
    """A table, and what it says in words."""
    head = [*AXES, "micro", "recompute", "GiB", "s/step", "tok/s/GPU", "TFLOP/s", "bubble", "comm"]
    rows = [head, *(_cells(planned) for planned in result.layouts[:SHOWN])]
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines = [
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    ]
    lines += ["", *_in_words(result, gpu, size)]
    return "\n".join(lines)


def _cells(planned: Planned) -> list[str]:
    seconds, layout = planned.seconds, changes(planned)
    return [
        *(str(layout["parallel"][axis]) for axis in AXES),
        *(str(value) for value in layout["train"].values()),
        f"{planned.peak_gib:.1f}" + ("" if planned.fits else "!"),
        f"{planned.step_s:.2f}",
        f"{seconds.tokens_per_s:.0f}",
        f"{seconds.tflops:.0f}",
        f"{seconds.bubble_share:.0%}",
        f"{seconds.exposed_s / planned.step_s:.0%}",
    ]


def _in_words(result: SearchResult, gpu: Gpu, size: int) -> list[str]:
    best, limit = result.best, gpu.memory_gib.value
    considered = plural(result.considered, "layout")
    lines = [
        f"{considered} of {size} {gpu.name} considered, {len(result.layouts)} traced,"
        f" {result.seconds:.0f} s."
    ]
    if not best.fits:
        lines.append(
            f"NOTHING FITS: the leanest layout needs {best.peak_gib:.1f} GiB of a GPU with"
            f" {limit:.1f} (! above). More GPUs, optim.offload=1, an adapter, or a smaller"
            " data.seq_len would help."
        )
        return lines
    biggest = sorted(best.memory.items(), key=lambda item: -item[1])[:4]
    held = ", ".join(f"{name} {gib:.1f}" for name, gib in biggest)
    lines.append(f"Best: {_words(best)}: {best.peak_gib:.1f} of {limit:.1f} GiB ({held}).")
    lines.append(f"Its time: {_where(best)}.")
    others = [p for p in result.layouts[1:] if p.fits]
    if others:
        lines.append(f"Next: {_words(others[0])}, {_why(best, others[0])}.")
    return lines


def _words(planned: Planned) -> str:
    layout = changes(planned)
    axes = " ".join(f"{axis}={n}" for axis, n in layout["parallel"].items() if n > 1) or "no split"
    return " ".join([axes, *(f"{name}={value}" for name, value in layout["train"].items())])


def _shares(planned: Planned) -> dict[str, float]:
    seconds = planned.seconds
    return {
        "computation": sum(seconds.compute.values()),
        "waiting for communication": seconds.exposed_s,
        "the pipeline's bubble": seconds.bubble,
        "waiting for the host": seconds.launch,
        "the optimizer": seconds.optimizer,
        "log-probs before the step": seconds.before,
    }


def _where(planned: Planned) -> str:
    shares = sorted(_shares(planned).items(), key=lambda item: -item[1])
    return ", ".join(
        f"{s / planned.step_s:.0%} {name}" for name, s in shares if s > 0.01 * planned.step_s
    )


def _why(best: Planned, other: Planned) -> str:
    """What the other loses by, in seconds."""
    if other.step_s <= best.step_s:
        return f"holds {other.peak_gib - best.peak_gib:.1f} GiB more"
    ours, theirs = _shares(best), _shares(other)
    name = max(ours, key=lambda name: theirs[name] - ours[name])
    return f"{other.step_s - best.step_s:.2f} s slower, most of it {name}"


def _with_layout(recipe: Recipe, best: Planned, gpu: str, size: int) -> Recipe:
    """The recipe for that layout on `size` of these GPUs."""
    nodes, rest = divmod(size, recipe.cluster.gpus_per_node)
    machines = {"nodes": None if rest else nodes, "world_size": size if rest else None}
    return recipe.model_copy(
        update={
            "parallel": best.recipe.parallel,
            "train": best.recipe.train,
            "cluster": recipe.cluster.model_copy(update=machines | {"gpu": gpu}),
        }
    )
