"""An engine around a model as it lies on disk, for what needs no recipe: scoring and conversion."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moetrain.config.load import apply_override, recipe_from
from moetrain.config.recipe import ModelConfig, Recipe
from moetrain.engine import Engine, device
from moetrain.engine.source import ModelSource, find_model
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


def recipe_for(model: str, out: Path, overrides: Sequence[str] = ()) -> Recipe:
    """A recipe that only names `model` and its dtype; `overrides` as on the command line.

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
    }
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
