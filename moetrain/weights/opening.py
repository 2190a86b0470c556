"""A folder of weights, whatever it holds, under Hugging Face names and by rows. No torch, unless
what it holds has to be computed.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moetrain.errors import CheckpointError, ConfigError, WeightsError
from moetrain.models import Model, read_model
from moetrain.models.lookup import HF, NOTE, checkpoint_at, config_of, read_mapping
from moetrain.models.quantisation import KEY, plain_config
from moetrain.models.rules import EMBEDDING, HEAD
from moetrain.weights.blobs import TORCH_NAMES
from moetrain.weights.checks import check_tensors
from moetrain.weights.rows import Converted, Rows
from moetrain.weights.stored import StoredFolder
from moetrain.weights.torch_dist import McoreRows

_BY_TORCH = {torch_name: name for name, torch_name in TORCH_NAMES.items()}


@dataclass(frozen=True)
class Opened:
    """A model's weights, all of them there."""

    folder: Path
    hf: dict[str, Any]
    model: Model
    rows: Rows
    is_megatron: bool
    files: tuple[Path, ...]  # that hold the weights

    def origin(self) -> list[str]:
        """What says, without reading them, that files are the same as before."""
        stats = ((path, path.stat()) for path in self.files)
        return [f"{path.resolve()} {one.st_size} {one.st_mtime_ns}" for path, one in stats]


def open_model(path: Path) -> Opened:
    """A Hugging Face folder, a run's export, a Megatron checkpoint or a built-in model.

    Raises ConfigError, WeightsError, CheckpointError: what it holds is no model, or not all of it.
    """
    folder = local_folder(path)
    hf, is_megatron = config_of(folder)
    model = read_model(hf)
    rows: Rows
    if is_megatron:
        found = McoreRows(folder, model)
        rows, files = Converted(found, noted_dtypes(folder, hf, found.names())), found.sources()
    else:
        stored = StoredFolder(folder, model)
        rows, files = _plain(stored, model), stored.sources()
    check_tensors(rows, model.table, model.ignored_keys)
    _check_doubles(rows, model)
    return Opened(folder, dict(hf), model, rows, is_megatron, tuple(files))


def open_weights_of(path: Path) -> tuple[Rows, Model | None]:
    """Whatever weights a folder holds, whole or not; under the model's names where it is known.

    Raises ConfigError, WeightsError, CheckpointError where they cannot be read.
    """
    folder = local_folder(path)
    if (folder / NOTE).is_file():
        hf, _ = config_of(folder)
        model = read_model(hf)
        rows = McoreRows(folder, model)
        return Converted(rows, noted_dtypes(folder, hf, rows.names())), model
    try:
        model = read_model(plain_config(read_mapping(folder / HF)))
    except ConfigError:
        return StoredFolder(folder), None
    return _plain(StoredFolder(folder, model), model), model


def noted_dtypes(folder: Path, hf: Mapping[str, Any], names: Iterable[str]) -> dict[str, str]:
    """Name -> dtype that a Megatron checkpoint's weights had as a Hugging Face model: as it was
    noted, else as the config says; none where nothing does. Raises CheckpointError.
    """
    noted = read_mapping(folder / NOTE).get("dtypes", {})
    given = hf.get("dtype") or hf.get("torch_dtype")
    usual = _BY_TORCH.get(str(given).removeprefix("torch."))
    result: dict[str, str] = {}
    for name in names:
        word = noted.get(name) if isinstance(noted, dict) else noted
        if word is not None and word not in _BY_TORCH:
            raise CheckpointError(
                f"{folder / NOTE}: {name} has dtype {word!r}; known: {', '.join(_BY_TORCH)}."
            )
        dtype = usual if word is None else _BY_TORCH[str(word)]
        if dtype is not None:
            result[name] = dtype
    return result


def local_folder(path: Path) -> Path:
    """Where the weights of a model, a run or a built-in model lie. Raises WeightsError."""
    if str(path).startswith("builtin:"):
        from moetrain.data import assets  # makes it where it is not there yet

        return assets.resolve(path)
    folder = checkpoint_at(path.expanduser())
    if not folder.is_dir():
        raise WeightsError(
            f"{folder} is no folder. Give a Hugging Face model folder or a Megatron checkpoint."
        )
    exported = folder / "hf"
    return (
        exported if (folder / "resolved.yaml").is_file() and (exported / HF).is_file() else folder
    )


def _plain(stored: StoredFolder, model: Model) -> Rows:
    """Its rows, dequantised where they are quantised."""
    has_fp8 = any(stored.dtype_name(name).startswith("F8") for name in stored.names())
    is_noted = read_mapping(stored.folder / HF).get(KEY) is not None
    if not has_fp8 and not is_noted:
        return stored
    from moetrain.weights.dequantised import open_weights
    from moetrain.weights.reader import ReaderRows

    return ReaderRows(open_weights(stored.folder, model))


def _check_doubles(rows: Rows, model: Model) -> None:
    """What a source holds beside its parameters says nothing else than they do."""
    held = set(rows.names())
    if not held & model.rotary_keys and not (model.heads.tied and {HEAD, EMBEDDING} <= held):
        return
    from moetrain.weights.doubles import contradiction
    from moetrain.weights.reader import RowsReader

    problem = contradiction(RowsReader(rows), model)
    if problem:
        raise WeightsError(f"{rows}: {problem}")
