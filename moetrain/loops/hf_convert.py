"""Hugging Face folders out of others, without Megatron: an adapter merged, a model made deeper."""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moetrain.errors import CheckpointError, WeightsError
from moetrain.families import Dims, Family, family_of, with_scalar_head
from moetrain.families import expand as expand_table
from moetrain.weights import expand as depth
from moetrain.weights.merge import merged
from moetrain.weights.peft import CONFIG, HEAD
from moetrain.weights.peft_config import read_config
from moetrain.weights.peft_reader import PeftReader
from moetrain.weights.reader import SafetensorsReader
from moetrain.weights.transport import check_names
from moetrain.weights.writer import write_hf


def merge(base: Path, adapter: Path, dst: Path) -> int:
    """Write the Hugging Face folder `base` with the PEFT folder `adapter` put in as `dst`, which
    must not exist.
    """
    refuse_existing(dst)
    hf, family, dims, reader = _hf_model(base)
    if read_config(adapter / CONFIG).scalar_head and not dims.scalar_head:
        hf = with_scalar_head(hf, family.architecture)
        dims = family.dims(hf)
    peft = PeftReader(adapter, family, dims, reader)
    if dims.scalar_head and peft.head is None and HEAD not in reader.names():
        raise WeightsError(f"Neither {base} nor {adapter} has {HEAD}, the model's head.")
    _write(base, dst, hf, reader, {name: name for name in reader.names()}, merged(reader, peft))
    print(f"{dst}: {base} with {adapter} in it")
    return 0


def expand(src: Path, dst: Path, every: int) -> int:
    """Write the Hugging Face folder `src` with a block that changes nothing after each `every`-th
    as `dst`, which must not exist.
    """
    refuse_existing(dst)
    hf, family, dims, reader = _hf_model(src)
    expansion = depth.plan(dims.num_layers, every)
    names = depth.sources(family, dims, expansion)
    with published(dst) as part:
        config = depth.expanded_config(hf, expansion)
        old = {new: source.old for new, source in names.items()}
        _write(src, part, config, reader, old, depth.expanded(reader, names))
        (part / "expanded.json").write_text(depth.note(expansion))
    print(f"{dst}: {src} with {len(expansion.added)} new blocks. To train them alone:")
    print(f"trainable: [{', '.join(expansion.trainable)}]")
    return 0


def _hf_model(folder: Path) -> tuple[dict[str, Any], Family, Dims, SafetensorsReader]:
    """A Hugging Face folder that holds all that its config.json promises."""
    try:
        hf = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise WeightsError(
            f"{folder}: no Hugging Face model, its config.json cannot be read ({error}). Give a "
            f"model folder; mcore2hf makes one of a Megatron checkpoint."
        ) from None
    family = family_of(hf)
    dims = family.dims(hf)
    reader = SafetensorsReader(folder, family, dims)
    check_names((), expand_table(family, dims), reader, dims)
    return hf, family, dims, reader


def _write(
    source: Path,
    dst: Path,
    config: dict[str, Any],
    reader: SafetensorsReader,
    old: Mapping[str, str],
    tensors: Iterator[tuple[str, Tensor]],
) -> None:
    """A Hugging Face folder; `old` says which tensor's dtype a new one has."""
    write_hf(
        tensors,
        dst,
        source=source,
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
    part = dst.with_name(f".{dst.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        dst.parent.mkdir(parents=True, exist_ok=True)
        part.mkdir()
        yield part
        os.replace(part, dst)
    except OSError as error:
        raise CheckpointError(f"{dst} cannot be written: {error.strerror or error}.") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
