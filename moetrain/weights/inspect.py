"""What a folder of weights holds, from its headers and notes alone: no tensor is read, no torch
imported.
"""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

from moetrain.errors import ConfigError, WeightsError
from moetrain.models import Model, read_model
from moetrain.models.lookup import HF, NOTE, read_mapping
from moetrain.models.quantisation import KEY, plain_config, read_quantisation
from moetrain.weights import megatron_lm
from moetrain.weights.blobs import TORCH_NAMES
from moetrain.weights.folder import ADAPTER, ADAPTER_WEIGHTS
from moetrain.weights.header import SIZES, Stored, read_header
from moetrain.weights.opening import local_folder
from moetrain.weights.rows import readable
from moetrain.weights.stored import StoredFolder
from moetrain.weights.torch_dist import is_weight
from moetrain.weights.torch_index import INDEX, read_index


@dataclass(frozen=True)
class Summary:
    """What is there. `parameters` and `bytes` are those of the weights that are stored."""

    style: str  # hf, moetrain, megatron-lm or peft
    family: str | None  # the architecture; None where nothing says it
    parameters: int
    bytes: int
    dtypes: Mapping[str, int]  # torch's name -> number of parameters
    tensors: int
    files: int
    layers: int | None
    experts: int | None
    tied: bool | None
    parts: Mapping[str, int]  # attention, experts, ... -> number of parameters
    quantisation: str | None
    adapter: Mapping[str, Any] | None  # rank, alpha, targets and the base's name
    step: int | None  # of a run's checkpoint
    has_optimizer: bool
    ranks: int | None  # that wrote a Megatron checkpoint


type Tensors = Mapping[str, tuple[str, tuple[int, ...]]]
"""Name -> (safetensors' dtype, shape)."""


def inspect(folder: Path, *, as_json: bool) -> int:
    """Print it; the exit code."""
    summary = summary_of(folder)
    if as_json:
        print(json.dumps(asdict(summary)))
        return 0
    print(f"{folder}: {summary.style}, {summary.family or 'unknown family'}")
    for name, value in _lines(summary):
        print(f"  {name:<13}{value}".encode(errors="backslashreplace").decode())
    return 0


def summary_of(path: Path) -> Summary:
    """What `path` holds. Raises ConfigError, WeightsError, CheckpointError, DamageError."""
    folder = local_folder(path)
    if (folder / INDEX).is_file():
        return _megatron(folder)
    if (folder / ADAPTER).is_file() and not (folder / HF).is_file():
        header = read_header(folder / ADAPTER_WEIGHTS, None)
        config = read_mapping(folder / ADAPTER)
        return _summary("peft", _plain(header), 1, None, adapter=_adapter(config))
    if not (folder / HF).is_file() and not any(folder.glob("*.safetensors")):
        raise WeightsError(
            f"{folder} holds no weights: neither {HF} with safetensors, nor {INDEX}, nor {ADAPTER}."
            " Check the path."
        )
    hf = read_mapping(folder / HF) if (folder / HF).is_file() else {}
    stored = StoredFolder(folder)
    tensors = {name: (stored.dtype_name(name), stored.shape(name)) for name in stored.names()}
    how = read_quantisation(hf) if hf.get(KEY) is not None else None
    model = _model(plain_config(hf) if how is not None else hf)
    num_files = len(stored.sources())
    return _summary("hf", tensors, num_files, model, quantisation=how.name if how else None)


def _megatron(folder: Path) -> Summary:
    index = read_index(folder)
    weights = {
        key: (tensor.dtype_name, tensor.shape)
        for key, tensor in index.tensors.items()
        if is_weight(key)
    }
    files = {chunk.file for tensor in index.tensors.values() for chunk in tensor.chunks}
    note = read_mapping(folder / NOTE) if (folder / NOTE).is_file() else {}
    hf = note.get("hf")
    state = read_mapping(folder / "state.json") if (folder / "state.json").is_file() else {}
    step = state.get("steps_done")
    of = note.get("adapter_of")
    return _summary(
        megatron_lm.STYLE if megatron_lm.is_one(folder) else "moetrain",
        weights,
        len(files),
        _model(hf) if isinstance(hf, dict) else None,
        adapter={"base": of} if of is not None else None,
        step=step if isinstance(step, int) and state.get("has_optimizer") else None,
        has_optimizer=len(weights) < len(index.tensors),
        ranks=len({file.split("_")[2] for file in files if file.startswith("__")}),
    )


def _summary(
    style: str,
    tensors: Tensors,
    files: int,
    model: Model | None,
    *,
    quantisation: str | None = None,
    adapter: Mapping[str, Any] | None = None,
    step: int | None = None,
    has_optimizer: bool = False,
    ranks: int | None = None,
) -> Summary:
    dtypes: Counter[str] = Counter()
    parts: Counter[str] = Counter()
    for name, (dtype, shape) in tensors.items():
        dtypes[TORCH_NAMES[dtype]] += prod(shape)
        parts[_part(name)] += prod(shape)
    parameters = sum(dtypes.values())
    counts_more = ranks is not None or quantisation is not None  # padding, scales
    if counts_more and model is not None and adapter is None:
        parameters = sum(rule.num_params for rule in model.table.values())
    return Summary(
        style=style,
        family=None if model is None else model.architecture,
        parameters=parameters,
        bytes=sum(prod(shape) * SIZES[dtype] for dtype, shape in tensors.values()),
        dtypes=dict(dtypes.most_common()),
        tensors=len(tensors),
        files=files,
        layers=None if model is None else model.num_layers,
        experts=None if model is None else model.num_experts,
        tied=None if model is None else model.heads.tied,
        parts=dict(parts.most_common()),
        quantisation=quantisation,
        adapter=adapter,
        step=step,
        has_optimizer=has_optimizer,
        ranks=ranks,
    )


# The first of these words in a tensor's name says which part it belongs to.
_PARTS = {
    "lora": "adapters",
    "embed": "embedding",
    "norm": "norms",
    "shared_expert": "shared experts",
    "experts": "experts",
    "router": "router",
    "mlp.gate.": "router",
    "mlp": "dense MLP",
    "attn": "attention",
    "attention": "attention",
    "head": "heads",
    "score": "heads",
    "output_layer": "heads",
}


def _part(name: str) -> str:
    return next((part for word, part in _PARTS.items() if word in name), "other")


def _plain(header: Mapping[str, Stored]) -> Tensors:
    return {name: (one.dtype, one.shape) for name, one in header.items()}


def _adapter(config: Mapping[str, Any]) -> dict[str, Any]:
    names = {"rank": "r", "alpha": "lora_alpha", "targets": "target_modules"}
    named = {ours: config.get(theirs) for ours, theirs in names.items()}
    return {**named, "base": config.get("base_model_name_or_path")}


def _model(hf: Mapping[str, object]) -> Model | None:
    """None for a family that is not known here."""
    try:
        return read_model(dict(hf))
    except ConfigError:
        return None


def _lines(summary: Summary) -> list[tuple[str, str]]:
    """(what, how much) for people."""

    def counts(values: Mapping[str, int]) -> str:
        return ", ".join(f"{name} {_millions(count)}" for name, count in values.items())

    lines = [
        ("parameters", f"{_millions(summary.parameters)} in {summary.tensors} tensors"),
        (
            "stored",
            f"{readable(summary.bytes)} in {summary.files} file{'s' * (summary.files != 1)}",
        ),
        ("dtypes", counts(summary.dtypes)),
        ("parts", counts(summary.parts)),
    ]
    if summary.layers is not None:
        experts = f", {summary.experts} experts each" if summary.experts else ""
        lines.append(("layers", f"{summary.layers}{experts}"))
        lines.append(("embeddings", "tied" if summary.tied else "not tied"))
    if summary.quantisation:
        lines.append(("quantised", summary.quantisation))
    if summary.adapter is not None:
        lines.append(("adapter", ", ".join(f"{k} {v}" for k, v in summary.adapter.items())))
    if summary.step is not None:
        lines.append(("step", str(summary.step)))
    if summary.ranks is not None:
        optimizer = "with" if summary.has_optimizer else "without"
        lines.append(("written by", f"{summary.ranks} ranks, {optimizer} the optimizer's state"))
    return lines


def _millions(count: int) -> str:
    for unit, size in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if count >= size:
            return f"{count / size:.4g}{unit}"
    return str(count)
