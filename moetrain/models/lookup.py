"""What model a recipe names: its config, read without loading anything."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

from moetrain.config.builtin import MODELS, published, quantised_name
from moetrain.errors import ConfigError
from moetrain.manifest import read_text
from moetrain.models import Model, read_model, with_scalar_head
from moetrain.models.quantisation import plain_config

if TYPE_CHECKING:
    from moetrain.config.recipe import ModelConfig, Recipe  # which take 0.2 s to import

NOTE, HF = "moetrain.json", "config.json"
BUILTIN = "builtin:"
ADAPTER = "adapter_config.json"


@dataclass(frozen=True)
class FoundModel:
    """What `model` names: its Hugging Face config, and the folder that it was read from."""

    hf: Mapping[str, object]
    folder: Path | None = None  # None: a config alone, or a built-in model
    is_megatron: bool = False  # the folder is a checkpoint that Engine.save wrote


def find_model(model: "ModelConfig", *, dry: bool = False) -> FoundModel:
    """Find what `model` names, without loading weights. Raises ConfigError, DamageError.

    `dry`: a published model need not be on disk; its config is known by its name.
    """
    if model.hf is not None:
        return FoundModel(model.hf)
    path = str(model.path)
    if path.startswith(BUILTIN):
        name = path.removeprefix(BUILTIN)
        if name not in MODELS:
            raise ConfigError(f"model.path={path}: known built-in models: {', '.join(MODELS)}")
        return FoundModel(MODELS[name])
    folder = checkpoint_at(Path(path))
    if dry and not folder.exists():
        word = quantised_name(path)
        if word is not None:
            raise ConfigError(
                f"model.path={path} is quantised ({word}), and what is read is fp32, bf16, FP8 or"
                f" NVFP4. Name the model that it was made from."
            )
        known = published(path)
        if known is not None:
            return FoundModel(known)
    if not folder.is_dir():
        raise ConfigError(
            f"model.path={path}: no such folder. Give a Hugging Face or Megatron folder, or"
            f" builtin:NAME."
        )
    hf, is_megatron = config_of(folder)
    return FoundModel(hf, folder, is_megatron)


def model_of(recipe: "Recipe", *, dry: bool = False) -> Model:
    """The model that a recipe trains, with the head of its method. Raises as `find_model`."""
    hf = find_model(recipe.model, dry=dry).hf
    if recipe.method.scalar_head:
        hf = with_scalar_head(hf)
    return read_model(hf, value_head=recipe.method.value_head)


def has_config(model: "ModelConfig") -> bool:
    """Whether `find_model` has a config to read: a folder may hold a tokenizer alone."""
    path = str(model.path)
    builtin = path.removeprefix(BUILTIN) in MODELS if path.startswith(BUILTIN) else False
    return (
        model.hf is not None
        or builtin
        or any((checkpoint_at(Path(path)) / f).is_file() for f in (NOTE, HF))
    )


def checkpoint_at(path: Path) -> Path:
    """`path`, or the checkpoint that <run_dir>/checkpoints/best stands for. ConfigError without
    one.
    """
    if path.name != "best" or path.exists():
        return path
    record = path.with_name("best.json")
    if not record.is_file():
        raise ConfigError(f"{path}: no best checkpoint. Set checkpoint.best in the run's recipe.")
    return path.with_name(str(read_mapping(record).get("name")))


def config_of(folder: Path) -> tuple[dict[str, object], bool]:
    """The Hugging Face config of the model in `folder`, as that of plain weights, and whether it is
    a Megatron checkpoint.

    Raises ConfigError where there is none, or two, or only an adapter of one.
    """
    note, hf = folder / NOTE, folder / HF
    if note.is_file() and hf.is_file():
        raise ConfigError(
            f"{folder} holds a Megatron checkpoint ({NOTE}) and a Hugging Face model ({HF}). Move"
            f" one of them to another folder."
        )
    if hf.is_file():
        return plain_config(read_mapping(hf)), False
    if not note.is_file() and (folder / ADAPTER).is_file():
        raise ConfigError(
            f"model.path={folder} holds an adapter. Give its base as model.path, and"
            f" adapter.path={folder}."
        )
    if not note.is_file() and (folder / "resolved.yaml").is_file():
        raise ConfigError(
            f"model.path={folder} is a run, not a model: give its hf, a folder in its checkpoints,"
            f" or, of a run with an adapter, its base and adapter.path={folder / 'adapter'}."
        )
    if not note.is_file():
        raise ConfigError(
            f"model.path={folder}: no {HF} or {NOTE} there, so neither a Hugging Face model nor a"
            f" Megatron checkpoint. Check the path."
        )
    content = read_mapping(note)
    if "adapter_of" in content:
        raise ConfigError(
            f"{folder} holds an adapter of {content['adapter_of']}, not a model. Write it with"
            f" `tools/convert adapter {folder} DST`, and give the base as model.path and DST as"
            f" adapter.path."
        )
    if not isinstance(content.get("hf"), dict):
        raise ConfigError(f"{note} has no 'hf' mapping, the model's config. Restore the file.")
    return cast(dict[str, object], content["hf"]), True


def read_mapping(path: Path) -> dict[str, object]:
    """What a JSON file says, checked by the folder's manifest. Raises ConfigError, DamageError."""
    try:
        content = json.loads(read_text(path))
    except ValueError as error:  # also what is no UTF-8
        raise ConfigError(f"{path}: not JSON ({error}). Restore the file.") from None
    except RecursionError:
        raise ConfigError(f"{path}: nested too deeply. Restore the file.") from None
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}. Check its permissions.") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: a mapping is wanted, not {type(content).__name__}.")
    return cast(dict[str, object], content)
