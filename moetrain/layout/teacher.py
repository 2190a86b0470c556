"""A teacher that a job's ranks hold: which model it is, and what it takes on a GPU."""

from pathlib import Path

from moetrain.config.distill import START
from moetrain.config.recipe import Recipe
from moetrain.errors import ConfigError, LayoutError
from moetrain.layout.memory import static_bytes
from moetrain.layout.mesh import MeshPlan, check_layout
from moetrain.models import Model, read_model
from moetrain.models.lookup import HF, NOTE, find_model


def teacher_model(recipe: Recipe, *, dry: bool = False) -> Model | None:
    """The model in teacher.path, where it is another than the student. Raises ConfigError, and
    LayoutError where the student's layout does not divide it.
    """
    if recipe.teacher is None or recipe.teacher.path in (None, START):
        return None
    folder = _weights_in(Path(str(recipe.teacher.path)).expanduser())
    named = recipe.model.model_copy(update={"path": str(folder), "hf": None, "init": None})
    try:
        model = read_model(find_model(named, dry=dry).hf)
        tokens = recipe.data.seq_len * recipe.train.micro_batch
        check_layout(model, recipe.parallel, tokens)
    except ConfigError as error:
        raise ConfigError(f"teacher.path: {error}") from None
    except LayoutError as error:
        raise LayoutError(f"teacher.path has the student's layout: {error}") from None
    return model


def teacher_bytes(recipe: Recipe, plan: MeshPlan, *, dry: bool = False) -> list[int]:
    """[stage] its weights, beside the student's while that learns: 0 where it is gone by then."""
    model = teacher_model(recipe, dry=dry)
    if model is None or not recipe.method.samples:
        return [0] * plan.pp
    return [stage.weights for stage in static_bytes(model, plan, recipe, {})]


def _weights_in(folder: Path) -> Path:
    """A run's export, else its last checkpoint; another folder as it is."""
    if (folder / "hf" / HF).is_file():
        return folder / "hf"
    saved = sorted(folder.glob("checkpoints/step_*"))
    whole = [path for path in saved if (path / NOTE).is_file()]
    return whole[-1] if whole else folder
