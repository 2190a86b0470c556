"""What model a recipe names: its config, read without loading anything."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import cast

from moetrain.config.builtin import MODELS, published, quantised_name
from moetrain.config.recipe import ModelConfig
from moetrain.errors import ConfigError
from moetrain.manifest import read_text

NOTE, HF = "moetrain.json", "config.json"


def read_hf_config(model: ModelConfig, *, dry: bool = False) -> Mapping[str, object]:
    """The Hugging Face config that `model` names. Raises ConfigError.

    `dry`: a published model need not be here; it is known by its name.
    """
    if model.hf is not None:
        return model.hf
    path = str(model.path)
    if path.startswith("builtin:"):
        name = path.removeprefix("builtin:")
        if name not in MODELS:
            raise ConfigError(f"model.path={path}: known built-in models: {', '.join(MODELS)}")
        return MODELS[name]
    folder = Path(path)
    if dry and not folder.exists():
        word = quantised_name(path)
        if word is not None:
            raise ConfigError(
                f"model.path={path} is quantised ({word}), and weights are trained as they are:"
                f" fp32 or bf16. Name the model that it was made from."
            )
        known = published(path)
        if known is not None:
            return known
    return config_of(folder)[0]


def config_of(folder: Path) -> tuple[dict[str, object], bool]:
    """The Hugging Face config of the model in `folder`, and whether it is a Megatron checkpoint.

    Raises ConfigError where there is none, or two, or only an adapter of one.
    """
    note, hf = folder / NOTE, folder / HF
    if note.is_file() and hf.is_file():
        raise ConfigError(
            f"{folder} holds a Megatron checkpoint ({NOTE}) and a Hugging Face model ({HF}). Move"
            f" one of them to another folder."
        )
    if hf.is_file():
        return read_mapping(hf), False
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
