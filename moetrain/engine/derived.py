"""Hugging Face folders out of others, without Megatron: an adapter merged, a model made deeper."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moetrain import files
from moetrain.data import assets
from moetrain.errors import CheckpointError, ConfigError, WeightsError
from moetrain.models import Model, read_model, with_scalar_head
from moetrain.models.lookup import HF, read_mapping
from moetrain.models.quantisation import plain_config
from moetrain.weights import expand as depth
from moetrain.weights.dequantised import open_weights
from moetrain.weights.merge import merged
from moetrain.weights.peft_config import read_config
from moetrain.weights.peft_reader import PeftReader
from moetrain.weights.peft_writer import CONFIG, HEAD
from moetrain.weights.reader import Reader
from moetrain.weights.side_files import SideFiles, side_files_of_adapter
from moetrain.weights.transport import check_names
from moetrain.weights.writer import write_hf


def merge(base: Path, adapter: Path, dst: Path) -> int:
    """Write the Hugging Face folder `base` with the PEFT folder `adapter`, or an adapter run's
    checkpoint, put in as `dst`, which must not exist.
    """
    refuse_existing(dst)
    if not (adapter / CONFIG).is_file():
        adapter = _of_run(adapter)
    base = _local(base)
    hf, model, reader = _hf_model(base)
    if read_config(adapter / CONFIG).scalar_head and not model.heads.scalar:
        hf = with_scalar_head(hf)
        model = read_model(hf)
    peft = PeftReader(adapter, model, reader)
    if model.heads.scalar and peft.head is None and HEAD not in reader.names():
        raise WeightsError(f"Neither {base} nor {adapter} has {HEAD}, the model's head.")
    same = {name: name for name in reader.names()}
    _write(side_files_of_adapter(base, adapter), dst, hf, reader, same, merged(reader, peft))
    print(f"{dst}: {base} with {adapter} in it")
    return 0


def _of_run(folder: Path) -> Path:
    """The PEFT folder of an adapter run, or of its checkpoint; anything else as it is."""
    from moetrain.engine import on_disk  # Megatron, which nothing else here needs

    if (folder / "resolved.yaml").is_file():
        folder = on_disk.latest(folder)
    folder = Path(on_disk.model_in(str(folder)))
    return on_disk.as_peft(folder) if on_disk.is_adapter(folder) else folder


def expand(src: Path, dst: Path, every: int) -> int:
    """Write the Hugging Face folder `src` with a block that changes nothing after each `every`-th
    as `dst`, which must not exist.
    """
    refuse_existing(dst)
    src = _local(src)
    hf, model, reader = _hf_model(src)
    expansion = depth.plan(model.num_layers, every)
    names = depth.sources(model, expansion)
    with published(dst) as part:
        config = depth.expanded_config(hf, expansion)
        old = {new: source.old for new, source in names.items()}
        _write(SideFiles.of(src), part, config, reader, old, depth.expanded(reader, names))
        (part / "expanded.json").write_text(depth.note(expansion))
    print(f"{dst}: {src} with {len(expansion.added)} new blocks. To train them alone:")
    print(f"trainable: [{', '.join(expansion.trainable)}]")
    return 0


def _local(model: Path) -> Path:
    """The folder of a model, of a run's export, or of a built-in model."""
    folder = assets.resolve(model)
    has_export = (folder / "resolved.yaml").is_file() and (folder / "hf" / HF).is_file()
    return folder / "hf" if has_export else folder


def _hf_model(folder: Path) -> tuple[dict[str, object], Model, Reader]:
    """A Hugging Face folder that holds all that its config.json promises."""
    try:
        hf = read_mapping(folder / HF)
    except ConfigError as error:
        raise WeightsError(
            f"{folder}: no Hugging Face model, its config.json cannot be read ({error}) Give a "
            f"model folder; mcore2hf makes one of a Megatron checkpoint."
        ) from None
    hf = plain_config(hf)
    model = read_model(hf)
    reader = open_weights(folder, model)
    check_names((), model.table, reader, model)
    return hf, model, reader


def _write(
    side_files: SideFiles,
    dst: Path,
    config: dict[str, Any],
    reader: Reader,
    old: Mapping[str, str],
    tensors: Iterator[tuple[str, Tensor]],
) -> None:
    """A Hugging Face folder; `old` says which tensor's dtype a new one has."""
    write_hf(
        tensors,
        dst,
        side_files=side_files,
        config=config,
        dtypes={new: reader.dtype(name) for new, name in old.items()},
        default=torch.float32,
    )


def refuse_existing(dst: Path) -> None:
    """Raises CheckpointError."""
    if dst.exists():
        raise CheckpointError(f"{dst} exists. Give another folder or remove it.")


@contextmanager
def published(dst: Path) -> Iterator[Path]:
    """A folder beside `dst` that takes its name when all went well, and is removed otherwise."""
    try:
        with files.publish_folder(dst) as part:
            yield part
    except OSError as error:
        raise CheckpointError(f"{dst} cannot be written: {error.strerror or error}.") from error
    except WeightsError as error:  # which knows the folder as it is for now
        message = re.sub(rf"{re.escape(str(dst.parent))}/\.\S+", str(dst), str(error))
        raise WeightsError(message) from error
