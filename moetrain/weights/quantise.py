"""`convert quantize`: a model in fewer bits, as a Hugging Face folder that vLLM serves."""

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from moetrain import files
from moetrain.errors import ConfigError
from moetrain.models import Model
from moetrain.models.quantisation import KEY
from moetrain.models.rules import EMBEDDING
from moetrain.weights import block_fp8, calibration, modelopt
from moetrain.weights.convert import PLAIN, Options, Progress, refuse_existing, write_hf_rows
from moetrain.weights.dequantised import MODELOPT
from moetrain.weights.opening import Opened, open_model
from moetrain.weights.reader import ReaderRows, RowsReader
from moetrain.weights.rows import Bytes, Converted, Rows

BLOCKS = "fp8-block"
FORMATS = (BLOCKS, *modelopt.CONFIGS)


def quantize(
    src: Path,
    dst: Path,
    to: str,
    data: Path | None = None,
    options: Options = PLAIN,
    adapter: Path | None = None,
) -> int:
    """Write the model `src` with its matrices quantised as `dst`, which must not exist; routers,
    embeddings, heads and norms stay as they are.

    Args:
        to: one of FORMATS.
        data: text that activations are measured on, for a format that has scales of them.
        adapter: a PEFT folder that is merged into the model on the way.
    """
    refuse_existing(dst)
    _check(to, data)
    source = open_model(src, adapter=adapter)
    model = source.model
    taken = block_fp8.quantised_names(model)
    if data is None:
        block_fp8.check_servable(model)
        blocks = ReaderRows(block_fp8.BlockFp8(RowsReader(source.rows), taken))
        _write(source, blocks, block_fp8.config_of(model), dst, [to], options)
    else:
        modelopt.load()
        modelopt.check_servable(model, to)
        sequences = calibration.read_sequences(data, source.folder, model.heads.vocab)
        reader = RowsReader(source.rows)
        with files.scratch(str(dst.absolute().parent)) as scratch:
            layers = calibration.layers(source.hf, model, reader, sequences)
            report = Progress(f"{dst.name}, calibration")
            made = modelopt.Exported(layers, model, to, scratch, report)
            report.close()
            rows = _Beside(source.rows, made, taken)
            stat = data.stat()
            origin = [to, f"{data.resolve()} {stat.st_size} {stat.st_mtime_ns}"]
            _write(source, rows, made.config, dst, origin, options, made.note)
        num = sum(map(len, sequences))
        print(f"calibrated with {len(sequences)} sequences, {num:,} tokens")
        if made.unmet:
            print(_unmet(made.unmet, model))
    print(f"{dst}: {src} in {to}, {len(taken)} matrices quantised")
    return 0


def _check(to: str, data: Path | None) -> None:
    if to == "int4-awq":
        raise ConfigError(
            "--to int4-awq is not written: ModelOpt 0.47 cannot export it of experts, and vLLM 0.32"
            f" reads no int4 of ModelOpt's. Take --to {', '.join(FORMATS)}."
        )
    if to == BLOCKS and data is not None:
        raise ConfigError(f"--to {to} needs no calibration. Leave --calibration out.")
    if to != BLOCKS and data is None:
        raise ConfigError(
            f"--to {to} has scales of activations: give --calibration FILE, a JSONL of text or"
            f" messages such as the model will be asked. --to {BLOCKS} needs none."
        )


def _write(
    source: Opened,
    rows: Rows,
    quantisation: Mapping[str, Any],
    dst: Path,
    origin: list[str],
    options: Options,
    note: Mapping[str, Any] | None = None,
) -> None:
    """Tensors in the model's order, each with its scales. Of a model in fp32 what stays plain
    becomes bf16, which is what servers compute in.
    """
    config = source.hf | {KEY: dict(quantisation)}
    rest: dict[str, list[str]] = {}
    for name in sorted(set(rows.names()) - source.model.ignored_keys):
        stem = name.rpartition(".")[0]
        rest.setdefault(stem, []).append(name)
    keys = source.model.hf_names
    stems = dict.fromkeys(name.rpartition(".")[0] for name in keys)
    if source.rows.dtype_name(EMBEDDING) == "F32":
        config = {k: v for k, v in config.items() if k != "torch_dtype"} | {"dtype": "bfloat16"}
        wide = [name for name in keys if rows.dtype_name(name) == "F32"]
        rows = Converted(rows, dict.fromkeys(wide, "BF16"))

    def more(folder: Path) -> None:
        if note is not None:
            (folder / MODELOPT).write_text(json.dumps(note, indent=4) + "\n")

    write_hf_rows(
        rows,
        [name for stem in stems for name in rest.pop(stem)],
        source.model,
        dst,
        config=config,
        side_files=source.side_files(),
        origin=[*source.origin(), *origin],
        options=options,
        more=more,
    )


def _unmet(unmet: Mapping[int, list[int]], model: Model) -> str:
    """What to know of experts that no token of the calibration met."""
    num, total = sum(map(len, unmet.values())), sum(model.moe_layers) * model.num_experts
    layer, experts = next(iter(unmet.items()))
    some = ", ".join(map(str, experts[:8])) + (", ..." if len(experts) > 8 else "")
    return (
        f"{num} of {total} experts met no token of the calibration (layer {layer}: {some}); their"
        f" input scales are what the other experts of their layer met. Give more text."
    )


class _Beside:
    """The rows of `base` without `taken`, and those of `made`."""

    def __init__(self, base: Rows, made: Rows, taken: Collection[str]):
        self.base, self.made = base, made
        self._plain = set(base.names()) - set(taken)

    def __str__(self) -> str:
        return str(self.base)

    def _of(self, name: str) -> Rows:
        return self.base if name in self._plain else self.made

    def names(self) -> Collection[str]:
        return self._plain | set(self.made.names())

    def shape(self, name: str) -> tuple[int, ...]:
        return self._of(name).shape(name)

    def dtype_name(self, name: str) -> str:
        return self._of(name).dtype_name(name)

    def rows(self, name: str, start: int, stop: int) -> Bytes:
        return self._of(name).rows(name, start, stop)
