"""Models, runs and adapters as they lie on disk, for what needs no recipe of its own."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from moetrain.config.load import apply_override, load_recipe, read_content, recipe_from
from moetrain.config.recipe import ModelConfig, Recipe
from moetrain.data.cache import build_once, cache_root, key_of
from moetrain.engine import device
from moetrain.engine.adapter_state import adapter_of
from moetrain.engine.checkpoint_folder import Checkpoints
from moetrain.engine.source import ModelSource, find_source, model_of
from moetrain.errors import CheckpointError
from moetrain.models import read_model
from moetrain.models.lookup import NOTE, checkpoint_at, read_mapping
from moetrain.models.rules import VALUE_HEAD
from moetrain.weights.adapter_init import InitialAdapter, whole
from moetrain.weights.convert import refuse_existing
from moetrain.weights.dequantised import open_weights
from moetrain.weights.digest import file_digest
from moetrain.weights.folder import ADAPTER, has_weights
from moetrain.weights.peft_writer import write_peft
from moetrain.weights.reader import McoreReader
from moetrain.weights.side_files import SideFiles

BF16 = "bfloat16"


def stored_dtypes(source: ModelSource) -> set[str]:
    """Names of the dtypes of a model's weights ("bfloat16", ...), from the files, else from its
    config.
    """
    if source.folder is not None and has_weights(source.folder):
        reader = open_weights(source.folder)
        return {str(reader.dtype(name)).removeprefix("torch.") for name in reader.names()}
    return {str(source.hf.get("dtype") or source.hf.get("torch_dtype") or BF16)}


def model_in(model: str) -> str:
    """The model that a run_dir holds: its export, else its last checkpoint, which may be an
    adapter; RUN/checkpoints/best is the best one; any other folder as it is.
    """
    run = Path(model).expanduser()
    if (checkpoint := checkpoint_at(run)) != run:
        return str(checkpoint)
    if not (run / "resolved.yaml").is_file():
        return model
    if (run / "hf" / "config.json").is_file():
        return str(run / "hf")
    return str(latest(run))


def run_of(model: str) -> Path | None:
    """The run that a model is of: its run_dir, or a folder in it."""
    path = Path(model).expanduser()
    return next((p for p in (path, *path.parents) if (p / "resolved.yaml").is_file()), None)


# What of a run's `data` makes the prompts that its model was trained on.
ASKED = ("chat_template", "chat_template_kwargs", "system")


def prompt_settings_of(model: str) -> dict[str, Any]:
    """What of a recipe's `data` a run's model has to be asked with; nothing for other models."""
    run = run_of(model)
    if run is None:
        return {}
    # Not as a recipe: an older run's may have what is refused today.
    data = read_content(run / "resolved.yaml", (), "a run's recipe").get("data")
    given: dict[str, Any] = dict(data) if isinstance(data, dict) else {}
    return {key: given[key] for key in ASKED if given.get(key)}


def latest(run: Path) -> Path:
    """The last checkpoint of a run. CheckpointError without one."""
    latest = Checkpoints(run, keep=1).latest()
    if latest is None:
        raise CheckpointError(
            f"{run} has neither hf nor a checkpoint yet. Wait until it has saved its first"
            f" checkpoint."
        )
    return latest


def is_adapter(folder: Path) -> bool:
    """Whether `folder` is a checkpoint of a run that trains an adapter."""
    note = folder / NOTE
    return note.is_file() and "adapter_of" in read_mapping(note)


def sections_of(model: str) -> tuple[str, dict[str, Any]]:
    """(path of the model, or of the base; further sections of a recipe) for what `model_in` gave:
    an adapter's checkpoint is written as a PEFT folder into the cache, once.
    """
    if not is_adapter(Path(model).expanduser()):
        return model, {}
    checkpoint = Path(model).expanduser()
    recipe = _recipe_of(checkpoint)
    if recipe.model.path is None:
        raise CheckpointError(
            f"{checkpoint} is an adapter of random weights, which are in no folder. Export the run"
            f" with checkpoint.export_hf=true."
        )
    return recipe.model.path, {"adapter": {"path": str(as_peft(checkpoint))}}


def as_peft(checkpoint: Path) -> Path:
    """The PEFT folder of an adapter's checkpoint, in the cache."""
    state = [path.read_bytes().hex() for path in sorted(checkpoint.glob("*.json"))]
    folder = cache_root() / "adapters" / key_of([str(checkpoint.resolve()), *state])
    return build_once(folder, lambda tmp: write_adapter(checkpoint, tmp / "adapter")) / "adapter"


def write_adapter(run: Path, dst: Path) -> str:
    """Write the adapter of a run's last checkpoint, or of the one that is given, as a PEFT folder,
    in one process; the base's name.
    """
    checkpoint = latest(run) if (run / "resolved.yaml").is_file() else run
    recipe = _recipe_of(checkpoint)
    if recipe.adapter is None or not is_adapter(checkpoint):
        raise CheckpointError(
            f"{run} has no adapter in its recipe. Give the run_dir of a run with adapter: ..., or"
            f" one of its checkpoints."
        )
    source = model_of(recipe)
    model = read_model(source.hf, value_head=recipe.method.value_head)
    reader = source.reader(recipe, model)
    table = adapter_of(recipe, model, reader)
    assert table is not None, "the recipe has an adapter"
    heads = {name: model.table[name] for name in model.heads.added if name != VALUE_HEAD}
    stored = McoreReader(checkpoint, model, heads | dict(table))
    hf = read_mapping(checkpoint / NOTE).get("hf")
    if not isinstance(hf, dict):
        raise CheckpointError(f"{checkpoint / NOTE} has no 'hf' mapping. Restore the file.")
    base = recipe.model.path or "random weights"
    initial = None if table.spec.starts_at_base else InitialAdapter(reader, table, recipe.seed)
    tensors = ((name, whole(stored, name)) for name in stored.names())
    dtypes = {name: stored.dtype(name) for name in stored.names()}
    write_peft(tensors, dtypes, dst, table, base, initial, (SideFiles.of(checkpoint), hf))
    return base


def adapter(run: Path, dst: Path) -> int:
    """Write the adapter of a run's last checkpoint, or of a checkpoint, as a PEFT folder `dst`,
    which must not exist.
    """
    refuse_existing(dst)
    source = Path(model_in(str(run))) if not (run / "resolved.yaml").is_file() else run
    base = write_adapter(source, dst)
    print(f"{dst}: PEFT adapter of {source}, for {base}")
    return 0


def peft_folder(folder: Path) -> Path:
    """The PEFT folder of an adapter run, or of its checkpoint; anything else as it is."""
    if (folder / ADAPTER).is_file():
        return folder
    if (folder / "resolved.yaml").is_file():
        folder = latest(folder)
    folder = Path(model_in(str(folder)))
    return as_peft(folder) if is_adapter(folder) else folder


def _recipe_of(checkpoint: Path) -> Recipe:
    """The recipe of the run that a checkpoint is of."""
    resolved = checkpoint.resolve().parents[1] / "resolved.yaml"
    if not resolved.is_file():
        raise CheckpointError(
            f"{checkpoint} is in no run (no {resolved}). Give a run_dir, or one of its"
            f" checkpoints where it was written."
        )
    return load_recipe(resolved)


def recipe_for(
    model: str,
    out: Path,
    overrides: Sequence[str] = (),
    sections: Mapping[str, Any] | None = None,
) -> Recipe:
    """A recipe that only names `model` and its dtype, with further `sections`; `overrides` as on
    the command line.

    The dtype is bf16 for a checkpoint that is bf16 throughout and fp32 for any other, so that no
    weight is rounded.
    """
    device.prepare()
    source = find_source(ModelConfig.model_validate({"path": model}))
    content: dict[str, Any] = {
        "run_dir": str(out),
        "model": {"path": model, "dtype": "bf16" if stored_dtypes(source) == {BF16} else "fp32"},
        "method": "sft",
        "data": {"train": ["-"]},
        "train": {"steps": 1},
    } | copy.deepcopy(dict(sections or {}))
    for override in overrides:
        apply_override(content, override)
    return recipe_from(content, source="command line")


def model_digest(recipe: Recipe, source: ModelSource) -> str:
    """A name for a model's weights and configuration."""
    parts: list[Any] = [source.hf]
    folder = source.folder or source.megatron
    if folder is None or recipe.model.init == "random":
        parts += [recipe.seed, recipe.model.init_std]
    else:
        parts += [file_digest(path) for path in _weight_files(folder)]
    return key_of(parts)


def _weight_files(folder: Path) -> Iterator[Path]:
    yield from sorted(p for p in folder.iterdir() if p.suffix in (".safetensors", ".distcp"))
