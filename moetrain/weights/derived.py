"""Hugging Face folders out of others, by rows: an adapter merged, a model made deeper."""

from collections.abc import Collection
from pathlib import Path

import numpy as np

from moetrain.errors import WeightsError
from moetrain.models import read_model
from moetrain.weights import expand as depth
from moetrain.weights.convert import PLAIN, Options, refuse_existing, write_hf_rows
from moetrain.weights.opening import Opened, open_model
from moetrain.weights.rows import Bytes, Renamed, Rows, row_bytes


def merge(base: Path, adapter: Path, dst: Path, options: Options = PLAIN) -> int:
    """Write `base` with the PEFT folder `adapter` put in as `dst`, which must not exist."""
    refuse_existing(dst)
    source = _hugging_face(base, adapter)
    write_hf_rows(
        source.rows,
        source.model.hf_names,
        source.model,
        dst,
        config=source.hf,
        side_files=source.side_files(),
        origin=source.origin(),
        options=options,
    )
    print(f"{dst}: {base} with {adapter} in it")
    return 0


def expand(src: Path, dst: Path, every: int, options: Options = PLAIN) -> int:
    """Write the model `src` with a block that changes nothing after each `every`-th as `dst`, which
    must not exist.
    """
    refuse_existing(dst)
    source = _hugging_face(src)
    expansion = depth.plan(source.model.num_layers, every)
    names = depth.sources(source.model, expansion)
    config = depth.expanded_config(source.hf, expansion)
    rows = Renamed(source.rows, {new: one.old for new, one in names.items()})

    def more(folder: Path) -> None:
        (folder / "expanded.json").write_text(depth.note(expansion))

    write_hf_rows(
        _Zeroed(rows, {new for new, one in names.items() if one.zero}),
        list(names),
        read_model(config),
        dst,
        config=config,
        side_files=source.side_files(),
        origin=[*source.origin(), f"every {every}"],
        options=options,
        more=more,
    )
    print(f"{dst}: {src} with {len(expansion.added)} new blocks. To train them alone:")
    print(f"trainable: [{', '.join(expansion.trainable)}]")
    return 0


def _hugging_face(folder: Path, adapter: Path | None = None) -> Opened:
    source = open_model(folder, adapter=adapter)
    if source.is_megatron:
        raise WeightsError(
            f"{folder}: no Hugging Face model. Give a model folder; mcore2hf makes one of a"
            f" Megatron checkpoint."
        )
    return source


class _Zeroed:
    """Rows of which some tensors are zero."""

    def __init__(self, base: Rows, zero: Collection[str]):
        self.base, self.zero = base, zero
        self.names, self.shape, self.dtype_name = base.names, base.shape, base.dtype_name

    def rows(self, name: str, start: int, stop: int) -> Bytes:
        if name not in self.zero:
            return self.base.rows(name, start, stop)
        width = row_bytes(self.shape(name), self.dtype_name(name))
        return np.zeros((stop - start, width), np.uint8)
