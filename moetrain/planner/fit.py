"""Whether a recipe fits the GPU that it names, before it waits in a queue: by formula where that is
enough, else by a trace; and the nearest layout that fits. Imports no torch before it traces.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from moetrain.config.recipe import Recipe
from moetrain.errors import LayoutError
from moetrain.layout.activations import activation_bytes
from moetrain.layout.memory import GIB, static_bytes, trained
from moetrain.layout.mesh import plan_mesh
from moetrain.layout.teacher import teacher_bytes
from moetrain.models import Model
from moetrain.planner.candidates import changed
from moetrain.planner.closed import fixed
from moetrain.planner.gpu import Gpu, find_gpu

if TYPE_CHECKING:
    from moetrain.planner.search import Planned

GO_ON = "cluster.prediction=warn goes on anyway."


@dataclass(frozen=True)
class Verdict:
    """One line, and whether it fits."""

    fits: bool
    text: str


def is_predicted(recipe: Recipe) -> bool:
    """Whether the recipe names a GPU and lets its step be predicted."""
    return recipe.cluster.gpu is not None and recipe.cluster.prediction != "none"


def check_fits(recipe: Recipe, model: Model, size: int) -> str | None:
    """A line on what the fullest of `size` GPUs will hold, None where no GPU is named. Raises
    LayoutError with the nearest layout that fits, where this one does not and the recipe does not
    say to go on.
    """
    if not is_predicted(recipe):
        return None
    answer = verdict(recipe, model, size)
    if answer.fits:
        return answer.text
    if recipe.cluster.prediction == "refuse":
        raise LayoutError(f"{answer.text} {GO_ON}")
    return f"WARNING: {answer.text}"


def verdict(recipe: Recipe, model: Model, size: int) -> Verdict:
    """Whether a step on `size` of the GPUs that cluster.gpu names fits. What the formula cannot say
    is traced, which takes seconds, or minutes for a model whose layers are not alike.
    """
    gpu = find_gpu(recipe.cluster.gpu_name, "cluster.gpu")
    limit = gpu.memory_gib.value
    has = f"{gpu.name} has {limit:.1f}"
    least, most = _bounds(recipe, model, size, gpu)
    if most <= limit:
        return Verdict(True, f"fits: a GPU holds at most {most:.1f} GiB, and {has}")
    from moetrain.planner.search import Search, tracers  # and torch, which takes seconds

    with tracers() as pool:
        search = Search(recipe, size, gpu, pool=pool)
        if least > limit:
            needs = f"a GPU would hold {least:.1f} GiB before activations"
        else:
            planned = search.as_is().best
            holds = f"{planned.peak_gib:.1f} GiB by a traced step of {planned.step_s:.3g} s"
            if planned.fits:
                return Verdict(True, f"fits: a GPU holds {holds}, and {has}")
            needs = f"a GPU would hold {holds}"
        return Verdict(False, f"{needs}, and {has}. {_way_out(recipe, search.nearest(), size)}")


def _bounds(recipe: Recipe, model: Model, size: int, gpu: Gpu) -> tuple[float, float]:
    """(before activations, at most) GiB of the fullest GPU, with what is no tensor."""
    plan = plan_mesh(recipe.parallel, size)
    static = [stage.total for stage in static_bytes(model, plan, recipe, trained(recipe, model))]
    more = activation_bytes(model, plan, recipe)
    teachers = teacher_bytes(recipe, plan, dry=True)
    static = list(map(sum, zip(static, teachers, strict=True)))
    most = max(map(sum, zip(static, more, strict=True))) + fixed(gpu, size)
    return (max(static) + gpu.fixed_bytes(0)) / GIB, most / GIB


def _way_out(recipe: Recipe, near: "Planned | None", size: int) -> str:
    if near is None:
        return (
            f"No layout near it fits {size} GPUs: `moetrain plan RECIPE --gpus N` looks at all of"
            " them; more GPUs, an adapter, optim.offload=1 or a smaller data.seq_len would help."
        )
    words = " ".join(f"{key}={value}" for key, value in changed(recipe, near.recipe).items())
    return f"The nearest that fits: {words} ({near.peak_gib:.1f} GiB, {near.step_s:.3g} s a step)."
