"""Where a model comes from: a Hugging Face folder, a Megatron checkpoint, a built-in, or a
configuration alone.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from moetrain.config.recipe import ModelConfig, Recipe
from moetrain.data import assets
from moetrain.data.chat import Chat, template_text
from moetrain.data.run_tokenizer import adapter_tokenizer, locate
from moetrain.data.tokenizer import load
from moetrain.data.tokenizer_files import tokenizer_files
from moetrain.data.turns import end_of_turn
from moetrain.models import Model, with_scalar_head
from moetrain.models.lookup import NOTE, find_model
from moetrain.weights.dequantised import open_weights
from moetrain.weights.dtypes import TORCH
from moetrain.weights.folder import has_weights
from moetrain.weights.opening import noted_dtypes
from moetrain.weights.reader import Joined, McoreReader, RandomReader, Reader
from moetrain.weights.side_files import SideFiles, check_exported


@dataclass(frozen=True)
class ModelSource:
    """A model as found: its Hugging Face config and where weights and tokenizer lie."""

    hf: dict[str, Any]
    folder: Path | None  # a Hugging Face folder with safetensors
    megatron: Path | None  # a checkpoint that Engine.save wrote
    tokenizer: Path | None

    def reader(self, recipe: Recipe, model: Model) -> Reader:
        """What to load: the folder's or the checkpoint's weights, or random ones that are the same
        at every layout.
        """
        random = RandomReader(model, recipe.seed, recipe.model.init_std)
        stored = None if recipe.model.init == "random" else self._stored(model)
        if stored is None:
            return random
        heads = {key for name in model.heads.added for key in model.table[name].hf}
        new = heads - set(stored.names())
        return Joined(stored, dict.fromkeys(new, random)) if new else stored

    def _stored(self, model: Model) -> Reader | None:
        if self.megatron is not None:
            return McoreReader(self.megatron, model)
        return None if self.folder is None else open_weights(self.folder, model)

    def dtypes(self, recipe: Recipe, model: Model) -> Mapping[str, torch.dtype]:
        """Hugging Face name -> dtype of the source's weights; empty where none were read."""
        if recipe.model.init == "random":
            return {}
        if self.megatron is not None:
            noted = noted_dtypes(self.megatron, self.hf, model.hf_names)
            return {name: TORCH[dtype] for name, dtype in noted.items()}
        if self.folder is None or not has_weights(self.folder):
            return {}
        reader = open_weights(self.folder, model)
        return {name: reader.dtype(name) for name in reader.names()}

    def hf_for_export(self, recipe: Recipe) -> dict[str, Any]:
        """The config.json to write: the source's, with the trained dtype where weights were made
        here.
        """
        made = recipe.model.init == "random" or (self.folder is None and self.megatron is None)
        if not made and ("dtype" in self.hf or "torch_dtype" in self.hf or self.folder):
            return self.hf
        hf = {key: value for key, value in self.hf.items() if key != "torch_dtype"}
        return hf | {"dtype": {"fp32": "float32", "bf16": "bfloat16"}[recipe.model.dtype]}

    def side_files(self, recipe: Recipe, *, taught: bool) -> SideFiles:
        """What is exported beside the weights: as it was found or, where the recipe has `taught`
        turns, with its template, and what ends them.
        """
        plain = SideFiles(self.tokenizer, self.folder or self.megatron)
        corpus = recipe.method.learns_from == "corpus"
        if not taught or corpus or self.tokenizer is None or not tokenizer_files(self.tokenizer):
            return plain
        template = template_text(recipe.data.chat_template)
        loaded = load(self.tokenizer)
        if recipe.method.scalar_head or not (template or loaded.chat_template):
            return replace(plain, template=template)
        ends = end_of_turn(Chat(loaded, template))
        texts = {i: str(loaded.convert_ids_to_tokens(i)) for i in ends}
        return replace(plain, template=template, ends=texts)

    def describe(self, folder: Path, recipe: Recipe, side_files: SideFiles) -> None:
        """Write beside a checkpoint what model it is of (moetrain.json), and its tokenizer."""
        hf = self.hf_for_export(recipe)
        note: dict[str, Any] = {"hf": side_files.config(hf)}
        if recipe.adapter is not None:
            note["adapter_of"] = recipe.model.path or "random weights"
        (folder / NOTE).write_text(json.dumps(note, indent=1))
        side_files.write(folder, hf)


def model_of(recipe: Recipe, *, exports: bool = False) -> ModelSource:
    """The recipe's model. The tokenizer beside an adapter to go on from is the one that it was
    trained with, so it counts before the base's, as `tokenizer_of` has it.

    With `exports` raises WeightsError at once where an export would take in what lies elsewhere.
    """
    source = find_source(recipe.model, recipe.method.scalar_head)
    tokenizer = adapter_tokenizer(recipe) or source.tokenizer
    source = replace(source, tokenizer=tokenizer)
    if exports:
        check_exported(source.tokenizer)
        check_exported(source.folder or source.megatron)
    return source


def find_source(model: ModelConfig, scalar_head: bool = False) -> ModelSource:
    """What `model` names and where its files lie; with `scalar_head`, its config as that of a model
    that ends in one. Built-in models are made on the way.

    Raises ConfigError, DataError or DamageError naming what is missing.
    """
    model_source = find_model(model)
    folder = model_source.folder
    if folder is None and model.path is not None:
        folder = assets.resolve(model.path)
    tokenizer = locate(model.tokenizer) if model.tokenizer else folder
    hf = with_scalar_head(model_source.hf) if scalar_head else model_source.hf
    if model_source.is_megatron:
        return ModelSource(dict(hf), None, folder, tokenizer)
    return ModelSource(dict(hf), folder, None, tokenizer)
