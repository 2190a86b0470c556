"""Whole folders of weights, and what is in a result."""

import json
import random
import shutil
import zlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any


def plain_folder(folder: Path, config: Mapping[str, Any], sides: Mapping[str, Any]) -> None:
    """A Hugging Face folder without a manifest, of random bytes of which none is 0; where the
    config says so, with experts in MXFP4.
    """
    from moetrain.models import read_model
    from moetrain.weights.fused import file_shapes
    from moetrain.weights.hf_files import Target, header

    rng = random.Random(0)
    plain = {key: value for key, value in config.items() if key != "quantization_config"}
    table = read_model(plain).table
    shapes = {n: s for r in table.values() for n, s in zip(r.hf, r.hf_shapes, strict=True)}
    group: list[Target] = []
    for name, shape in sorted(file_shapes(table, shapes).items()):
        if "quantization_config" in config and name.endswith(("gate_up_proj", "down_proj")):
            experts, into, out = shape
            scales = experts, out, into // 32
            group.append(Target(f"{name}_blocks", "U8", (*scales, 16)))
            group.append(Target(f"{name}_scales", "U8", scales))
        else:
            group.append(Target(name, "BF16", shape))
    folder.mkdir()
    data = bytes(rng.randrange(1, 127) for one in group for _ in range(one.num_bytes))
    (folder / "model.safetensors").write_bytes(header(group) + data)
    for name, content in {"config.json": config, **sides}.items():
        (folder / name).write_text(json.dumps(content))


ADAPTERS = ("adapter", "adapter with a tokenizer")


def peft_folder(folder: Path, config: Mapping[str, Any], sides: Mapping[str, Any]) -> None:
    """An adapter of attention and experts of that model."""
    import torch

    from moetrain import manifest
    from moetrain.models import read_model
    from moetrain.models.adapter import AdapterSpec, adapter_table
    from moetrain.weights.adapter_init import table_shapes
    from moetrain.weights.peft_writer import write_peft

    table = adapter_table(read_model(dict(config)), AdapterSpec(2, 4))
    chance = torch.Generator().manual_seed(0)
    made = {n: torch.randn(s, generator=chance) for n, s in table_shapes(table).items()}
    write_peft(made.items(), dict.fromkeys(made, torch.float32), folder, table, "base")
    for name, content in sides.items():
        (folder / name).write_text(json.dumps(content))
    (folder / manifest.NAME).unlink()
    manifest.write(folder, manifest.complete(folder, {}))


def cut_columns(source: Path, folder: Path) -> None:
    """A copy of a checkpoint in which each matrix lies in two halves of its columns, as tensor
    parallel ranks write it.
    """
    from moetrain import manifest
    from moetrain.weights.blobs import tensor_blob
    from moetrain.weights.torch_dist import TorchDist
    from moetrain.weights.torch_index import Chunk, write_index

    shutil.copytree(source, folder)
    read = TorchDist(source)
    tensors = dict(read.index.tensors)
    data = folder / "__1_0.distcp"
    with data.open("wb") as file:
        for key, tensor in tensors.items():
            if len(tensor.shape) != 2:
                continue
            rows, half, chunks = tensor.shape[0], tensor.shape[1] // 2, list[Chunk]()
            values = read.rows(key, (), 0, rows)
            for left in (0, half):
                own = values[:, 2 * left : 2 * left + 2 * half].tobytes()
                blob, start = tensor_blob(tensor.dtype_name, (rows, half)), file.tell()
                file.write(blob.prefix + own + blob.suffix(zlib.crc32(own)))
                length = file.tell() - start
                chunks.append(Chunk((0, left), (rows, half), data.name, start, length))
            tensors[key] = replace(tensor, chunks=tuple(chunks))
    write_index(folder / ".metadata", replace(read.index, tensors=tensors))
    (folder / manifest.NAME).unlink()
    manifest.write(folder, manifest.complete(folder, {}))


def weights(folder: Path) -> dict[str, bytes]:
    """The files of a result that hold weights."""
    found = [*folder.glob("*.safetensors"), *folder.glob("*.distcp")]
    return {path.name: path.read_bytes() for path in found}


def content(folder: Path) -> dict[str, bytes]:
    """All of a result."""
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}
