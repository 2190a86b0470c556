"""A folder of weights, whatever it holds, under Hugging Face names and by rows. No torch, unless
what it holds has to be computed.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moetrain import manifest
from moetrain.errors import CheckpointError, ConfigError, WeightsError
from moetrain.models import Model, read_model
from moetrain.models.lookup import HF, NOTE, checkpoint_at, config_of, read_mapping
from moetrain.models.quantisation import KEY, plain_config
from moetrain.models.rules import EMBEDDING, HEAD
from moetrain.weights.blobs import TORCH_NAMES
from moetrain.weights.checks import check_tensors
from moetrain.weights.folder import ADAPTER
from moetrain.weights.megatron_lm import checkpoint_in
from moetrain.weights.rows import Converted, Rows
from moetrain.weights.side_files import SideFiles, side_files_of_adapter
from moetrain.weights.stored import StoredFolder
from moetrain.weights.torch_dist import DATA, McoreRows
from moetrain.weights.torch_index import INDEX

_DATA = (".safetensors", DATA)  # checked as they are read
_FLOATS = {"F64", "F32", "F16", "BF16"}
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
    beside: Path  # where its tokenizer and generation config are
    adapter: Path | None = None  # that is in them

    def origin(self) -> list[str]:
        """What says, without reading them, that files are the same as before."""
        stats = ((path, path.stat()) for path in self.files)
        return [f"{path.resolve()} {one.st_size} {one.st_mtime_ns}" for path, one in stats]

    def side_files(self) -> SideFiles:
        """What goes beside these weights elsewhere."""
        if self.adapter is None:
            return SideFiles.of(self.beside)
        return side_files_of_adapter(self.beside, self.adapter)


def open_model(path: Path, config: Path | None = None, adapter: Path | None = None) -> Opened:
    """A Hugging Face folder, a run's export, a Megatron checkpoint or a built-in model.

    Args:
        config: of a checkpoint of Megatron-LM's: config.json, or a folder of the same model.
        adapter: a PEFT folder that is merged into it as it is read.

    Raises ConfigError, WeightsError, CheckpointError: what it holds is no model, or not all of it.
    """
    folder = _model_folder(path)
    hf, is_megatron = _config_of(folder, config)
    model = read_model(hf)
    rows: Rows
    if is_megatron:
        mcore = McoreRows(folder, model)
        rows, files = _as_noted(mcore, folder, hf), mcore.sources()
        if has_no_config(folder):
            _say_padding(mcore, model)
    else:
        stored = StoredFolder(folder, model)
        rows, files = _plain(stored, model), stored.sources()
    check_tensors(rows, model.table, model.ignored_keys)
    _check_doubles(rows, model)
    beside = folder if config is None else config if config.is_dir() else config.parent
    opened = Opened(folder, dict(hf), model, rows, is_megatron, tuple(files), beside)
    if adapter is None:
        return opened
    from moetrain.weights.merge import merged

    return merged(opened, adapter)


def open_weights_of(path: Path, config: Path | None = None) -> tuple[Rows, Model | None]:
    """Whatever weights a folder holds, whole or not; under the model's names where it is known.
    `config` is what `open_model` takes, for a folder that has none.

    Raises ConfigError, WeightsError, CheckpointError where they cannot be read, or a file beside
    them is not as its manifest says.
    """
    folder = _model_folder(path)
    manifest.check(folder, (p.name for p in folder.iterdir() if p.suffix not in _DATA))
    if (folder / INDEX).is_file() or (folder / NOTE).is_file():
        hf, _ = _config_of(folder, config if has_no_config(folder) else None)
        model = read_model(hf)
        return _as_noted(McoreRows(folder, model), folder, hf), model
    try:
        model = read_model(plain_config(read_mapping(folder / HF)))
    except ConfigError:
        return StoredFolder(folder), None
    return _plain(StoredFolder(folder, model), model), model


def config_for(path: Path, config: Path) -> Path | None:
    """`config`, where a checkpoint needs one."""
    return config if has_no_config(local_folder(path)) else None


def has_no_config(folder: Path) -> bool:
    """Whether it is a checkpoint that does not say what model it is: Megatron-LM's."""
    return (folder / INDEX).is_file() and not (folder / NOTE).is_file()


def _config_of(folder: Path, config: Path | None) -> tuple[dict[str, object], bool]:
    """The config of what is in `folder`, and whether that is a Megatron checkpoint."""
    if config is not None and not (folder / INDEX).is_file():
        raise ConfigError(f"{folder} is no Megatron checkpoint. Leave --hf away.")
    if config is not None and not config.is_dir():
        return plain_config(read_mapping(config)), True
    where = folder if config is None else local_folder(config)
    if has_no_config(where):
        raise ConfigError(
            f"{where} is a checkpoint of Megatron-LM's, which does not say what model it is. Give"
            f" its config.json with --hf CONFIG."
        )
    hf, is_megatron = config_of(where)
    return hf, is_megatron or config is not None


def _say_padding(mcore: McoreRows, model: Model) -> None:
    """Which rows of a vocabulary are left out: those of tokens that were added, if the config is
    the one of the model without them.
    """
    vocab = model.heads.vocab
    rows = mcore.num_embeddings
    if rows > vocab:
        print(f"{mcore}: {vocab} of {rows} embeddings are taken (vocab_size), the rest is padding")


def _as_noted(rows: McoreRows, folder: Path, hf: Mapping[str, Any]) -> Rows:
    """A checkpoint's rows in the dtypes that they had as a Hugging Face model; those of
    Megatron-LM's as they are.
    """
    if not (folder / NOTE).is_file():
        return rows
    noted = noted_dtypes(folder, hf, rows.names())
    has_notes = bool(read_mapping(folder / NOTE).get("dtypes"))
    for name, dtype in noted.items():
        stored = rows.dtype_name(name)
        # What is noted of a weight is kept as it was, or in fp32, which holds it.
        fits = {dtype, stored} <= _FLOATS and (stored == "F32" or not has_notes)
        if dtype != stored and not fits:
            raise CheckpointError(
                f"{folder}: {name} is {TORCH_NAMES[stored]}, and {NOTE} says that it was"
                f" {TORCH_NAMES[dtype]}, which cannot be. Copy the checkpoint again."
            )
    return Converted(rows, noted)


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
        if word is not None and str(word) not in _BY_TORCH:
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
    folder = checkpoint_in(folder)
    exported = folder / "hf"
    return (
        exported if (folder / "resolved.yaml").is_file() and (exported / HF).is_file() else folder
    )


def _model_folder(path: Path) -> Path:
    folder = local_folder(path)
    if (folder / ADAPTER).is_file() and not ((folder / HF).is_file() or (folder / NOTE).is_file()):
        raise WeightsError(f"{folder} is an adapter. Give its base, and --adapter {folder}.")
    return folder


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
