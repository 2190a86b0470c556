"""Whether what a recipe reads is there: looked at before a process is started, without torch."""

import os
from collections.abc import Iterator
from pathlib import Path

from moetrain.config.builtin import published
from moetrain.config.method import ReferencedMethod
from moetrain.config.recipe import Recipe
from moetrain.data.sources import find_sources
from moetrain.data.tokenizer_files import HUB_NAME
from moetrain.errors import ConfigError, DataError, MoetrainError
from moetrain.models.lookup import BUILTIN, HF, NOTE, checkpoint_at

RUN, ADAPTER = "resolved.yaml", "adapter_config.json"
MODEL = (RUN, HF, NOTE)
START = ("start", "base")  # references that are no other model


def is_planned(recipe: Recipe) -> bool:
    """Whether the model is not on this machine and known by its published config alone, so that
    only its layout can be tried out here.
    """
    path = recipe.model.path
    return path is not None and not Path(path).exists() and published(path) is not None


def has_own_data(recipe: Recipe) -> bool:
    """Whether any data is not the package's own."""
    data = recipe.data
    asked = recipe.train.sample_prompts or BUILTIN
    paths = (*data.train, *data.eval, *data.demonstrations, asked)
    return not all(path.startswith(BUILTIN) for path in paths)


def check_inputs(recipe: Recipe) -> None:
    """Raises ConfigError or DataError for the first thing that the run would read and cannot."""
    for problem in missing(recipe):
        raise problem


def missing(recipe: Recipe) -> Iterator[MoetrainError]:
    """An error for each thing that the run would read and that is not there."""
    if is_planned(recipe):
        yield ConfigError(
            f"model.path={recipe.model.path} is not on this machine, and a run would stop at once."
            " Download the model, or check the path."
        )
    yield from _text(recipe)
    yield from _models(recipe)
    yield from _data(recipe)
    yield from _prompts(recipe)
    yield from _files(recipe)


def _text(recipe: Recipe) -> Iterator[MoetrainError]:
    given, template = recipe.model.tokenizer, recipe.data.chat_template
    if given is None and recipe.model.path is None and recipe.method.learns_from != "corpus":
        yield DataError(
            "A model made from model.hf has no tokenizer: set model.tokenizer (a folder or"
            " builtin:NAME)."
        )
    if given is not None and not given.startswith(BUILTIN) and not Path(given).is_dir():
        if not HUB_NAME.fullmatch(given):
            yield DataError(
                f"model.tokenizer={given} is no tokenizer folder. Give a folder, builtin:NAME or a"
                " Hub name (org/name)."
            )
    if template is not None and "{" not in template and not Path(template).is_file():
        yield DataError(f"data.chat_template={template} is not a file. Check the path.")


def _models(recipe: Recipe) -> Iterator[MoetrainError]:
    method = recipe.method
    if isinstance(method, ReferencedMethod) and method.reference not in START:
        yield from _folder("method.reference", method.reference, MODEL)
    teacher = None if recipe.teacher is None else recipe.teacher.path
    if teacher is not None and teacher not in START:
        yield from _folder("teacher.path", teacher, (*MODEL, "resolved.yaml"))
    if recipe.adapter is not None and recipe.adapter.path is not None:
        yield from _folder("adapter.path", str(recipe.adapter.path), (ADAPTER,))
    for reward in recipe.rewards:
        # Only the first rank grades; the folder may be on its node alone.
        if reward.name == "reward_model" and os.environ.get("RANK", "0") == "0":
            where = "rewards: reward_model: path"
            files = ("tokenizer.json",) if reward.options.get("address") else MODEL
            yield from _folder(where, str(reward.options.get("path")), files)


def _folder(key: str, path: str, files: tuple[str, ...]) -> Iterator[MoetrainError]:
    """What is wrong with a folder that shall hold one of `files`."""
    folder = Path(path).expanduser()
    if path.startswith(BUILTIN):
        return
    try:
        folder = checkpoint_at(folder)
    except ConfigError as error:
        yield error
        return
    if not folder.is_dir():
        yield ConfigError(f"{key}={path} is not there. Check the path.")
    elif files and not any((folder / name).is_file() for name in files):
        yield ConfigError(f"{key}={path} holds no {' and no '.join(files)}. Check the path.")


def _data(recipe: Recipe) -> Iterator[MoetrainError]:
    data = recipe.data
    for key in ("train", "eval", "demonstrations"):
        paths: list[str] = vars(data)[key]
        for path in (path for path in paths if not path.startswith(BUILTIN)):
            if recipe.method.learns_from == "corpus":
                yield from _corpus(path)
                continue
            try:
                find_sources([path], held_out=key == "eval")
            except DataError as error:
                yield DataError(f"data.{key}: {error}")


def _prompts(recipe: Recipe) -> Iterator[MoetrainError]:
    path = recipe.train.sample_prompts
    if path is not None and not path.startswith(BUILTIN):
        try:
            find_sources([path])
        except DataError as error:
            yield DataError(f"train.sample_prompts: {error}")


def _corpus(path: str) -> Iterator[MoetrainError]:
    prefix = path.removesuffix(".bin").removesuffix(".idx")
    file = next((f for f in (f"{prefix}.idx", f"{prefix}.bin") if not Path(f).is_file()), None)
    if file is not None:
        yield DataError(
            f"{file} does not exist: pretraining reads index prefixes. Make one with"
            f" `moetrain data index INPUT --tokenizer FOLDER --out {prefix}`."
        )


def _files(recipe: Recipe) -> Iterator[MoetrainError]:
    replay = recipe.rollout.replay if recipe.rollout is not None else None
    for key, path in (("data.reference", recipe.data.reference), ("rollout.replay", replay)):
        if path is not None and not path.is_dir():
            yield ConfigError(f"{key}={path} is not there. Check the path.")
