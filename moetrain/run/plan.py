"""`moetrain plan`: a search for each length that is asked for; its answer as a table, as JSON, as a
recipe, as a job and as a chart.
"""

import json
import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from moetrain import files
from moetrain.config.load import dump_recipe, load_recipe
from moetrain.config.recipe import Recipe
from moetrain.errors import ConfigError, MoetrainError
from moetrain.models import read_model
from moetrain.models.lookup import find_model
from moetrain.planner.cost import NATURAL_LOAD
from moetrain.planner.gpu import Gpu, find_gpu
from moetrain.planner.longest import at_length, longest
from moetrain.planner.rl_step import RlStep, Sampled, with_answers
from moetrain.planner.rollout import Lengths, has_servers, server_nodes
from moetrain.planner.search import Planned, Search, SearchResult, tracers
from moetrain.run.dry_run import check, world_size
from moetrain.run.plan_chart import write_chart
from moetrain.run.plan_text import as_json, as_text


@dataclass(frozen=True)
class _Answer:
    """Of one length. `size`: GPUs that train."""

    recipe: Recipe
    size: int
    search: Search
    result: SearchResult
    sampled: Sampled | None = None


def plan(args: Namespace) -> int:
    """The exit code: that of a mistake where nothing fits."""
    _check_options(args)
    with tracers() as pool:
        return _plan(_with(args, pool=pool))


def _with(args: Namespace, **more: Any) -> Namespace:
    """The same arguments with others."""
    return Namespace(**vars(args) | more)


def _plan(args: Namespace) -> int:
    recipe = load_recipe(args.recipe, args.overrides)
    gpu_name = args.gpu or recipe.cluster.gpu_name
    gpu = find_gpu(gpu_name, "--gpu" if args.gpu else "cluster.gpu")
    answers: list[_Answer] = []
    for seq_len in args.seq or [recipe.data.seq_len]:
        given = recipe if seq_len == recipe.data.seq_len else at_length(recipe, seq_len)
        answer = _answer(args, given, gpu)
        answers.append(answer)
        best = _with_layout(answer.recipe, answer.result.best, gpu_name, answer.size)
        check(best, answer.size, dry=True)
        if not args.json:
            title = [f"data.seq_len={answer.recipe.data.seq_len}"] * (
                len(args.seq) > 1 or args.goal == "longest"
            )
            print(*title, as_text(answer.result, gpu, answer.size, answer.sampled), sep="\n")
    if args.json:
        print(json.dumps(_json(answers, several=len(args.seq) > 1)), flush=True)
    if args.chart is not None:
        last = answers[-1]
        write_chart(last.search, last.result.best, args.chart)
    if not all(answer.result.best.fits for answer in answers):
        return MoetrainError.exit_code
    if args.write is not None:
        files.write_text(args.write, dump_recipe(best))
    return 0


def _json(answers: Sequence[_Answer], *, several: bool) -> dict[str, Any]:
    rows = [
        {"seq_len": answer.recipe.data.seq_len} | as_json(answer.result, answer.sampled)
        for answer in answers
    ]
    return {"lengths": rows} if several else rows[0]


def _answer(args: Namespace, recipe: Recipe, gpu: Gpu) -> _Answer:
    if not has_servers(recipe):
        if args.answer_tokens is not None:
            raise ConfigError("--answer-tokens is of answers that vLLM samples. Leave it out.")
        return _searched(args, recipe, gpu, recipe, world_size(recipe, args.gpus))
    _, rollout = recipe.sampling
    if (args.answer_tokens or 0) > rollout.max_tokens:
        raise ConfigError(
            f"--answer-tokens {args.answer_tokens} is the mean, and rollout.max_tokens="
            f"{rollout.max_tokens} the most. Give less."
        )
    lengths = Lengths.of(recipe, args.answer_tokens)
    answer = _with_servers(args, recipe, gpu, lengths)
    sampled = answer.sampled
    assert sampled is not None
    may_share = not args.as_is and not rollout.address and rollout.push != "ipc"
    if may_share and sampled.better is not None and answer.result.best.fits:
        servers = sampled.better.servers
        _report(f"rollout.num_servers={servers} looks faster; a search with it")
        total = sampled.better.trainers + servers * recipe.cluster.gpus_per_node
        shared = rollout.model_copy(update={"num_servers": servers})
        given = recipe.model_copy(update={"rollout": shared})
        other = _with_servers(_with(args, gpus=total), given, gpu, lengths, answer.recipe)
        assert other.sampled is not None
        if other.result.best.fits and other.sampled.split.step_s < sampled.split.step_s:
            return other
    return answer


def _with_servers(
    args: Namespace, recipe: Recipe, gpu: Gpu, lengths: Lengths, at: Recipe | None = None
) -> _Answer:
    """at: has the data.seq_len that a search before this one has come to."""
    if at is not None:
        recipe = at_length(recipe, at.data.seq_len)
    traced = with_answers(recipe, lengths)
    served = read_model(find_model(recipe.model, dry=True).hf)  # adapters are merged into it
    step = RlStep(traced, served, gpu, lengths)
    answer = _searched(args, recipe, gpu, traced, _trainers(args, recipe), again=at is not None)
    servers = max(1, server_nodes(recipe))
    search, best = answer.search, answer.result.best
    sampled = step.whole(best, answer.size, servers, lambda size: search.estimate(best, size))
    return replace(answer, sampled=sampled)


def _searched(
    args: Namespace, recipe: Recipe, gpu: Gpu, traced: Recipe, size: int, *, again: bool = False
) -> _Answer:
    """traced: the recipe as it is traced; again: at the length that was found before."""
    goal = "speed" if args.goal in (None, "longest") else args.goal
    search = Search(traced, size, gpu, goal, _load(args.routing), args.pool)
    if search.load > 1 and search.model.moe is None:
        raise ConfigError(f"--routing {args.routing}: this model has no experts. Leave it out.")
    if args.as_is:
        check(recipe, size, dry=True)
        return _Answer(recipe, size, search, search.as_is())
    if args.goal == "longest" and not again:
        search = longest(search, _report)
        recipe = at_length(recipe, search.recipe.data.seq_len)
    return _Answer(recipe, size, search, search.best(_report))


def _report(line: str) -> None:
    print(f"# {line}", file=sys.stderr, flush=True)


def _trainers(args: Namespace, recipe: Recipe) -> int:
    """GPUs that train: --gpus counts the servers' nodes too."""
    if args.gpus is None:
        return world_size(recipe, None)
    servers = server_nodes(recipe) * recipe.cluster.gpus_per_node
    if args.gpus <= servers:
        raise ConfigError(
            f"--gpus {args.gpus}: rollout.num_servers={server_nodes(recipe)} take a node of"
            f" {recipe.cluster.gpus_per_node} each, and none is left to train. Give more, or fewer"
            " servers."
        )
    return args.gpus - servers


def _check_options(args: Namespace) -> None:
    if args.sbatch and args.write is None:
        raise ConfigError(
            "--sbatch prints the job of the recipe that is written. Give --write too."
        )
    if args.sbatch and args.json:
        raise ConfigError("--sbatch and --json both print. Give one of them.")
    if args.as_is and args.goal is not None:
        raise ConfigError("--goal chooses among layouts, and --as-is looks at one. Leave one out.")
    if args.seq and args.goal == "longest":
        raise ConfigError(
            "--goal longest looks for the length, and --seq gives some. Leave one out."
        )
    if len(args.seq) > 1 and (args.write or args.chart):
        raise ConfigError("--write and --chart are of one length. Give one to --seq.")


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


def _with_layout(recipe: Recipe, best: Planned, gpu: str, size: int) -> Recipe:
    """The recipe for that layout on `size` of these GPUs."""
    nodes, rest = divmod(size, recipe.cluster.gpus_per_node)
    machines = {"nodes": None if rest else nodes, "world_size": size if rest else None}
    return recipe.model_copy(
        update={
            "parallel": best.recipe.parallel,
            "train": best.recipe.train,
            "optim": best.recipe.optim,
            "cluster": recipe.cluster.model_copy(update=machines | {"gpu": gpu}),
        }
    )
