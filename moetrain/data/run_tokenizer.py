"""A run's tokenizer and chat template, and the model that they must fit."""

from collections.abc import Mapping
from pathlib import Path

from moetrain.config.recipe import Recipe
from moetrain.data import assets
from moetrain.data.cache import cache_root
from moetrain.data.chat import Chat, ChatOptions
from moetrain.data.tokenizer_check import check_for_export
from moetrain.data.tokenizer_files import FILES, HUB_NAME, check_folder
from moetrain.errors import DataError
from moetrain.models.lookup import checkpoint_at, find_model, has_config


def locate(name: str | Path, root: Path | None = None) -> Path:
    """The local folder of a tokenizer: a folder, "builtin:NAME" (built under the cache `root`) or a
    Hub name (HF_HUB_OFFLINE is honoured). DataError where there is none.
    """
    folder = assets.resolve(name, root)
    if folder.exists() or not HUB_NAME.fullmatch(str(name)):
        check_folder(folder)
        return folder
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(name), allow_patterns=list(FILES)))
    except Exception as error:  # the Hub's client raises a dozen unrelated types
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f"{name} is no folder here and cannot be had from the Hub: {reason}"
        ) from error


def model_vocab(recipe: Recipe) -> int | None:
    """The model's vocab_size as its configuration says; None when there is none to be read.
    DataError, ConfigError, DamageError.
    """
    vocab = _model_hf(recipe).get("vocab_size")
    if vocab is None:
        return None
    if type(vocab) is not int or vocab < 1:
        raise DataError(f"The model's vocab_size is {str(vocab)[:40]!r}: give a number of tokens.")
    return vocab


def tokenizer_notes(recipe: Recipe) -> list[str]:
    """What to report about the run's tokenizer next to the model that it exports. DataError."""
    kind = _model_hf(recipe).get("model_type")
    problem = check_for_export(tokenizer_of(recipe), kind if isinstance(kind, str) else None)
    return [f"note: {problem}"] if problem else []


def _model_hf(recipe: Recipe) -> Mapping[str, object]:
    """The model's Hugging Face configuration; {} for a folder that has a tokenizer alone."""
    return find_model(recipe.model).hf if has_config(recipe.model) else {}


def adapter_tokenizer(recipe: Recipe) -> Path | None:
    """The folder of an adapter to go on from, where the tokenizer that it was trained with lies
    beside it and the recipe names no other.
    """
    folder = recipe.adapter.path if recipe.adapter is not None else None
    if folder is None or recipe.model.tokenizer is not None:
        return None
    return folder if (folder / "tokenizer.json").is_file() else None


def tokenizer_of(recipe: Recipe) -> Path:
    """The local folder of the run's tokenizer. DataError when the recipe names none."""
    name: str | Path | None = recipe.model.tokenizer or adapter_tokenizer(recipe)
    path = recipe.model.path
    if name is None and path is not None:
        name = path if assets.is_builtin(path) else checkpoint_at(Path(path))
    if name is None:
        raise DataError(
            "A model made from model.hf has no tokenizer: set model.tokenizer (a folder or"
            " builtin:NAME)."
        )
    return locate(name, cache_root(recipe.data.cache))


def chat_of(recipe: Recipe) -> Chat:
    """The run's tokenizer with its chat template. DataError where there is none."""
    return ChatOptions.of(recipe.data).open(tokenizer_of(recipe))
