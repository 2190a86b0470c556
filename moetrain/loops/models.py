"""An engine around a model as it lies on disk, for what needs no recipe: scoring and conversion."""

import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from moetrain.config.load import apply_override, load_recipe, recipe_from
from moetrain.config.recipe import ModelConfig, ParallelConfig, Recipe
from moetrain.data.cache import key_of
from moetrain.engine import Engine, device
from moetrain.engine.checkpoints import Checkpoints
from moetrain.engine.source import ModelSource, find_model
from moetrain.errors import CheckpointError
from moetrain.families.adapter import AdapterTable
from moetrain.weights.adapter import InitialAdapter
from moetrain.weights.digest import file_digest
from moetrain.weights.reader import SafetensorsReader

BF16 = "bfloat16"


def stored_dtypes(source: ModelSource) -> set[str]:
    """Names of the dtypes of a model's weights ("bfloat16", ...), from the files, else from its
    config.
    """
    if source.folder is not None and any(source.folder.glob("*.safetensors*")):
        reader = SafetensorsReader(source.folder)
        return {str(reader.dtype(name)).removeprefix("torch.") for name in reader.names()}
    return {str(source.hf.get("dtype") or source.hf.get("torch_dtype") or BF16)}


def model_in(model: str) -> str:
    """The model that a run_dir holds: its export, else its last checkpoint; any other folder as it
    is.
    """
    run = Path(model).expanduser()
    if not (run / "resolved.yaml").is_file():
        return model
    if (run / "hf" / "config.json").is_file():
        return str(run / "hf")
    latest = Checkpoints(run, keep=1).latest()
    if latest is None:
        raise CheckpointError(
            f"{run} has neither hf nor a checkpoint yet. Let the run come so far."
        )
    return str(latest)


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
    source = find_model(ModelConfig.model_validate({"path": model}))
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


def open_engine(recipe: Recipe) -> Engine:
    """The model alone: no gradients, no optimizer."""
    return Engine(recipe, train=False)


def mark_dtypes(folder: Path, engine: Engine) -> None:
    """Note in a Megatron folder which dtype each weight had, for the way back to Hugging Face."""
    found = engine.source.dtypes(engine.family, engine.dims)
    note = json.loads((folder / "moetrain.json").read_text())
    note["dtypes"] = {n: str(found[n]).removeprefix("torch.") for n in sorted(found)}
    (folder / "moetrain.json").write_text(json.dumps(note, indent=1))


def adapter_of(
    run: Path,
) -> tuple[AdapterTable, str, Iterator[tuple[str, Tensor]], InitialAdapter | None]:
    """The adapter of a run's last checkpoint, in one process: (its table, the base's name, its
    tensors, what it started from).
    """
    resolved = run / "resolved.yaml"
    if not resolved.is_file():
        raise CheckpointError(f"{run} has no resolved.yaml, so it is no run. Give a run_dir.")
    recipe = load_recipe(resolved)
    alone = recipe.model_copy(update={"parallel": ParallelConfig()})
    latest = Checkpoints(run, keep=1).latest()
    if recipe.adapter is None or latest is None:
        lacks = "no checkpoint" if recipe.adapter is not None else "no adapter in its recipe"
        raise CheckpointError(f"{run} has {lacks}. Give the run_dir of a run with adapter: ...")
    engine = Engine(alone, train=False)
    engine.restore(latest)
    assert engine.adapters is not None
    base = recipe.model.path or "random weights"
    return engine.adapters, base, engine.export_adapter(), engine.initial_adapter


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
