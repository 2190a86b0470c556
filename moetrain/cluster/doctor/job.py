"""The recipe: what its layout divides into, and whether that fits."""

from moetrain.cluster.doctor.base import Finding, Subject, fail, ok, skip, warn
from moetrain.errors import plural
from moetrain.layout.mesh import plan_mesh
from moetrain.planner.fit import check_fits
from moetrain.run import dry_run


def layout(subject: Subject) -> Finding:
    """Whether model, batch and world divide by the layout."""
    plan = subject.plan
    assert plan is not None
    recipe = plan.recipe
    dry_run.check(recipe, plan.num_ranks, dry=True)
    mesh = plan_mesh(recipe.parallel, plan.num_ranks)
    axes = " ".join(f"{k}={v}" for k, v in vars(mesh).items() if v > 1 and k != "world_size")
    asked = recipe.cluster.nodes and recipe.cluster.nodes * recipe.cluster.gpus_per_node
    ranks = subject.ranks
    if ranks is not None and plan.num_procs is None:
        nodes = len(ranks.leaders)
        if recipe.cluster.nodes not in (None, nodes):
            return fail(
                f"{nodes} nodes were started where cluster.nodes={recipe.cluster.nodes}",
                "start as many (sbatch --nodes), or override cluster.nodes",
            )
    if plan.num_procs and asked and asked != plan.num_procs:
        return fail(
            f"{plan.num_procs} ranks were started where cluster.nodes={recipe.cluster.nodes} and"
            f" gpus_per_node={recipe.cluster.gpus_per_node} make {asked}",
            "start as many, or override cluster.nodes",
        )
    return ok(f"{plural(plan.num_ranks, 'rank')}: {axes or 'nothing is split'}")


def step(subject: Subject) -> Finding:
    """Whether a step fits the GPUs that the recipe names, as it is predicted."""
    plan = subject.plan
    assert plan is not None
    if subject.ranks is not None:  # they would wait for a trace
        return skip("looked at before the ranks are started")
    line = check_fits(plan.recipe, plan.model, plan.num_ranks)
    if line is None:
        return skip("nothing is predicted: cluster.gpu is not given, or cluster.prediction=none")
    if line.startswith("WARNING"):
        return warn(line.removeprefix("WARNING: "), "cluster.prediction=warn goes on anyway")
    return ok(line)
