"""Where a model comes from: a Hugging Face folder, a Megatron checkpoint, a built-in, or a configuration alone."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moetrain.config.recipe import ModelConfig, Recipe
from moetrain.errors import ConfigError, WeightsError
from moetrain.families import Family
from moetrain.families.dims import Dims
from moetrain.weights.reader import RandomReader, Reader, SafetensorsReader

TOKENIZER_FILES = (
    "tokenizer.json tokenizer_config.json special_tokens_map.json vocab.json merges.txt tokenizer.model "
    "added_tokens.json chat_template.jinja generation_config.json"
).split()


@dataclass(frozen=True)
class ModelSource:
    """A model as found: its Hugging Face config and where weights and tokenizer lie."""

    hf: dict[str, Any]
    folder: Path | None  # a Hugging Face folder with safetensors
    megatron: Path | None  # a checkpoint that Engine.save wrote
    tokenizer: Path | None

    def reader(self, recipe: Recipe, family: Family, dims: Dims) -> Reader:
        """What to load: the folder's weights, or random ones that are the same at every layout."""
        if self.folder is not None and recipe.model.init != "random":
            return SafetensorsReader(self.folder, family.fused)
        return RandomReader(family, dims, recipe.seed, recipe.model.init_std)

    def dtypes(self, default: torch.dtype) -> Mapping[str, torch.dtype]:
        """Hugging Face name -> dtype for an export: the source's own, `default` where there is none."""
        if self.folder is None or not any(self.folder.glob("*.safetensors*")):
            return {}
        reader = SafetensorsReader(self.folder)
        return {name: reader.dtype(name) for name in reader.names()}

    def hf_for_export(self, recipe: Recipe) -> dict[str, Any]:
        """The config.json to write: the source's, with the trained dtype where weights were made here."""
        if self.folder is not None and recipe.model.init != "random":
            return self.hf
        return {"dtype": {"fp32": "float32", "bf16": "bfloat16"}[recipe.model.dtype]} | self.hf

    def copy_tokenizer(self, folder: Path) -> None:
        """Copy the tokenizer's files and chat template into `folder`."""
        for name in TOKENIZER_FILES if self.tokenizer else ():
            if self.tokenizer and (self.tokenizer / name).is_file():
                shutil.copyfile(self.tokenizer / name, folder / name)


def find_model(model: ModelConfig) -> ModelSource:
    """Read the configuration that `model` names. Raises ConfigError or WeightsError naming what is missing."""
    tokenizer = _folder(model.tokenizer) if model.tokenizer else None
    if model.path is None:
        assert model.hf is not None, "the recipe's validation asks for path or hf"
        return ModelSource(dict(model.hf), None, None, tokenizer)
    folder = _folder(model.path)
    if (folder / "moetrain.json").is_file():
        hf = _json(folder / "moetrain.json")["hf"]
        return ModelSource(hf, None, folder, tokenizer or folder)
    if not (folder / "config.json").is_file():
        raise WeightsError(
            f"model.path={model.path}: no config.json (Hugging Face) or moetrain.json (Megatron) there. Check the path."
        )
    return ModelSource(_json(folder / "config.json"), folder, None, tokenizer or folder)


def _folder(path: str) -> Path:
    if path.startswith("builtin:"):
        from moetrain.data.assets import resolve

        return Path(resolve(path))
    folder = Path(path)
    if not folder.is_dir():
        raise WeightsError(f"{path}: no such folder. Give a Hugging Face or Megatron folder, or builtin:NAME.")
    return folder


def _json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())  # type: ignore[no-any-return]
    except ValueError as error:
        raise ConfigError(f"{path}: not JSON ({error}). Restore the file.") from error
