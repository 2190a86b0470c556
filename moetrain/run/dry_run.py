"""What `moetrain train RECIPE --dry-run` prints: the resolved recipe, the ranks, and static bytes
per GPU.
"""

from collections.abc import Iterator
from math import lcm

from moetrain.config.load import dump_recipe
from moetrain.config.recipe import Recipe
from moetrain.config.reward_files import check_reward_files
from moetrain.errors import ConfigError, plural
from moetrain.layout.activations import activation_bytes
from moetrain.layout.batch import batch_bytes, describe
from moetrain.layout.memory import GIB, StageBytes, static_bytes, trained
from moetrain.layout.mesh import check_layout, plan_mesh, rank_table
from moetrain.layout.passed import check_passed
from moetrain.layout.teacher import teacher_bytes, teacher_model
from moetrain.models import Model
from moetrain.models.lookup import model_of
from moetrain.planner.fit import is_predicted
from moetrain.planner.gpu import gpu_gib

MAX_RANKS_SHOWN = 64


def world_size(recipe: Recipe, num_procs: int | None) -> int:
    """Ranks of the run: --nproc, cluster.world_size, nodes * gpus_per_node, or the smallest world
    of the layout.
    """
    cluster, p = recipe.cluster, recipe.parallel
    if num_procs:
        return num_procs
    if cluster.world_size:
        return cluster.world_size
    if cluster.nodes:
        return cluster.nodes * cluster.gpus_per_node
    return lcm(p.tp * p.cp * p.pp, p.etp * p.ep * p.pp)


def check(recipe: Recipe, num_ranks: int, *, dry: bool = False) -> Model:
    """Everything about model and layout that can be refused before a process is started."""
    model = model_of(recipe, dry=dry)
    plan = plan_mesh(recipe.parallel, num_ranks)
    check_layout(model, recipe.parallel, recipe.data.seq_len * recipe.train.micro_batch)
    if not recipe.method.samples and recipe.train.global_batch % plan.dp:
        raise ConfigError(
            f"train.global_batch={recipe.train.global_batch} does not divide over {plan.dp} "
            f"data-parallel ranks. "
            f"Use {-(-recipe.train.global_batch // plan.dp) * plan.dp}."
        )
    if recipe.rollout is not None and recipe.rollout.max_tokens >= recipe.data.seq_len:
        raise ConfigError(
            f"rollout.max_tokens={recipe.rollout.max_tokens} leaves no room for a prompt in"
            f" data.seq_len={recipe.data.seq_len}, which holds both. Give less, or raise it."
        )
    if recipe.method.name == "cpt" and (
        recipe.model.hf is not None or recipe.model.init == "random"
    ):
        raise ConfigError(
            "method cpt goes on from given weights: set model.path without model.init=random, or "
            "method.name=pretrain."
        )
    if recipe.optim.offload and recipe.model.dtype == "fp32":
        raise ConfigError(
            "optim.offload keeps the fp32 main weights of a bf16 model on the host, and "
            "model.dtype=fp32 has none. Use bf16, or leave optim.offload out."
        )
    check_passed(recipe, model)
    teacher_model(recipe, dry=dry)
    trained(recipe, model)
    check_reward_files(recipe.rewards)
    if recipe.rollout is not None:
        from moetrain.environments import check_environment  # numpy, which others do without

        check_environment(recipe)
    return model


def _work(model: Model, seq_len: int) -> str:
    """What a pack costs, where one sequence fills it. A backward pass is two forward ones."""
    teraflops = 3 * model.flops(seq_len, seq_len * (seq_len + 1) // 2) / 1e12
    return (
        f"# {model.active_params / 1e9:.3f} B parameters act on a token; a pack of {seq_len} tokens"
        f" takes {teraflops:.4g} TFLOP forward and backward."
    )


def dry_run(recipe: Recipe, num_procs: int | None) -> str:
    """The text of a dry run. Raises ConfigError or LayoutError as the run itself would."""
    num_ranks = world_size(recipe, num_procs)
    model = check(recipe, num_ranks, dry=True)
    plan = plan_mesh(recipe.parallel, num_ranks)
    table = model.table
    lines = [
        dump_recipe(recipe),
        f"# {plural(plan.world_size, 'rank')}: "
        + " ".join(f"{k}={v}" for k, v in vars(plan).items()),
    ]
    rows = rank_table(plan)
    lines.append("  ".join(f"{key:>5}" for key in rows[0]))
    lines += ["  ".join(f"{value:>5}" for value in row.values()) for row in rows[:MAX_RANKS_SHOWN]]
    if len(rows) > MAX_RANKS_SHOWN:
        lines.append(f"... and {len(rows) - MAX_RANKS_SHOWN} more")
    total = sum(rule.num_params for rule in table.values())
    learns = trained(recipe, model)
    stages = static_bytes(model, plan, recipe, learns)
    worst = max(stages, key=lambda s: s.total)
    name, unit = ("GiB", GIB) if worst.total >= GIB else ("MiB", GIB // 1024)
    num_trained = sum(rule.num_params for rule in learns.values())
    part = f", {num_trained / 1e9:.4f} B trained" if len(learns) != len(table) else ""
    lines.append("\n" + _work(model, recipe.data.seq_len))
    most = activation_bytes(model, plan, recipe)
    beside = teacher_bytes(recipe, plan, dry=True)
    totals = [held.total + sum(more) for held, *more in zip(stages, most, beside, strict=True)]
    fullest = totals.index(max(totals))
    lines.append(
        f"# With activations, logits and their gradients stage {fullest} holds at most"
        f" {totals[fullest] / unit:.2f} {name} where routing is balanced"
        f" ({most[fullest] / unit:.2f} of it; a bound by formula, see layout/activations.py)."
    )
    if any(beside):
        lines.append(
            f"# {max(beside) / unit:.2f} {name} of that are the teacher's weights, which stay"
            " beside the student."
        )
    if recipe.method.samples:
        lines.append(describe(batch_bytes(recipe, model, plan)))
    lines.append(
        f"# {model.architecture}, {total / 1e9:.3f} B parameters{part}. Static {name} per "
        f"GPU, before activations:"
    )
    lines.append("stage  params(B)  weights  gradients  optimizer    total")
    limit = gpu_gib(recipe.cluster.gpu_name)
    for s in stages:
        lines.append(
            f"{s.stage:>5}  {s.num_params / 1e9:>9.3f}  {s.weights / unit:>7.2f}  "
            f"{s.gradients / unit:>9.2f}  {s.optimizer / unit:>9.2f}  {s.total / unit:>7.2f}"
        )
    if is_predicted(recipe):  # `check_fits` says more
        return "\n".join(lines)
    lines += _too_much(recipe, worst, totals[fullest], fullest, limit)
    return "\n".join(lines)


def _too_much(
    recipe: Recipe, worst: StageBytes, most: int, fullest: int, limit: float
) -> Iterator[str]:
    """What to warn of: stage `fullest` may hold `most` bytes with activations, `worst` has most
    before them; limit: GiB of a GPU.
    """
    if worst.total / GIB <= limit < most / GIB:
        yield (
            f"WARNING: stage {fullest} may need {most / GIB:.1f} GiB with activations,"
            f" and a {recipe.cluster.gpu_name} has {limit:.1f}. If it does not fit, set"
            " train.recompute=full, a smaller data.seq_len, or parallel.cp."
        )
    if worst.total / GIB > limit:
        yield (
            f"WARNING: stage {worst.stage} needs {worst.total / GIB:.1f} GiB before activations "
            f"and a {recipe.cluster.gpu_name} "
            f"has {limit:.1f}. Use more ranks, more ep or pp, or optim.offload."
        )
