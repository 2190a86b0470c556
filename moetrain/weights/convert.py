"""Hugging Face <-> Megatron, as rows that stream: no process holds a tensor, and neither torch nor
Megatron nor a process group is needed.
"""

import json
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moetrain import manifest
from moetrain.errors import CheckpointError, WeightsError
from moetrain.models import Model
from moetrain.models.lookup import NOTE
from moetrain.weights import hf_files, mcore_files, megatron_lm
from moetrain.weights.blobs import TORCH_NAMES, object_blob
from moetrain.weights.compare import NO_ADAPTERS, Adapters, compare
from moetrain.weights.fused import PutTogether, file_names
from moetrain.weights.mcore_layout import Style, style_for
from moetrain.weights.opening import Opened, open_model
from moetrain.weights.rows import Converted, Rows, readable
from moetrain.weights.side_files import SideFiles
from moetrain.weights.stream import JOURNAL, Plan, Written, check_room, part_of, stream

DTYPES = {"bf16": "BF16", "fp16": "F16", "fp32": "F32"}  # as recipes name them


@dataclass(frozen=True)
class Options:
    """How a result is written."""

    workers: int = 2
    resume: bool = False
    dtype: str | None = None  # of all tensors; None: each as it was
    shard_bytes: int = hf_files.SHARD_BYTES
    style: str = "moetrain"  # or megatron-lm, of a Megatron checkpoint


PLAIN = Options()


def hf2mcore(src: Path, dst: Path, options: Options = PLAIN, adapter: Path | None = None) -> int:
    """Write the Hugging Face folder `src`, with the PEFT folder `adapter` in it, as a Megatron
    torch_dist checkpoint `dst`, which must not exist; in Megatron-LM's style as one of its folders,
    with this checkpoint as the release.
    """
    if options.style == megatron_lm.STYLE:
        return _hf2megatron_lm(src, dst, options, adapter)
    refuse_existing(dst)
    source = _hugging_face(src, adapter)
    _write_megatron(source, dst, options, style_for(source.model))
    print(f"{dst}: Megatron checkpoint of {src}")
    return 0


def _hf2megatron_lm(src: Path, dst: Path, options: Options, adapter: Path | None) -> int:
    megatron_lm.refuse_taken(dst, resume=options.resume)
    source = _hugging_face(src, adapter)
    megatron_lm.check(source.model)
    common = megatron_lm.common_state(source.model)
    nothing = megatron_lm.extra_states(source.model)
    target = dst / megatron_lm.RELEASE
    try:
        if not target.exists():
            _write_megatron(source, target, options, "by_layer", common, nothing)
        megatron_lm.name_release(dst)
    finally:
        with suppress(OSError):
            dst.rmdir()  # empty after an error
    print(f"{dst}: {src} for Megatron-LM's --load {dst} {megatron_lm.flags(source.model)}")
    return 0


def _hugging_face(src: Path, adapter: Path | None) -> Opened:
    source = open_model(src, adapter=adapter)
    if source.is_megatron:
        raise WeightsError(f"{src} is a Megatron checkpoint already. Give a Hugging Face folder.")
    return source


def _write_megatron(
    source: Opened,
    dst: Path,
    options: Options,
    style: Style,
    common: Mapping[str, Any] | None = None,
    nothing: Iterable[str] = (),
) -> None:
    """Write a Megatron checkpoint; with `common`, what Megatron-LM reads beside the weights."""
    rows = _wanted(source.rows, source.model, options)
    dtypes = {name: rows.dtype_name(name) for name in source.model.hf_names}
    rows = Converted(rows, mcore_files.dtype_names(rows, source.model, style))
    plan, index = mcore_files.plan(
        rows, source.model, style, [common or {}], nothing, options.shard_bytes
    )
    side_files = source.side_files()

    def finish(part: Path) -> None:
        mcore_files.write_notes(part, index, {"steps_done": 0, "format": 1, "has_optimizer": False})
        noted = {name: TORCH_NAMES[dtypes[name]] for name in sorted(dtypes)}
        note = {"hf": side_files.config(source.hf), "dtypes": noted}
        (part / NOTE).write_text(json.dumps(note, indent=1))
        side_files.write(part, source.hf)
        if common is not None:
            (part / megatron_lm.COMMON_FILE).write_bytes(object_blob(common))

    _write(plan, rows, dst, source.origin(), options, finish)


def mcore2hf(
    src: Path,
    dst: Path,
    options: Options = PLAIN,
    config: Path | None = None,
    adapter: Path | None = None,
) -> int:
    """Write the Megatron checkpoint `src`, with the PEFT folder `adapter` in it, as a Hugging Face
    folder `dst`, which must not exist. `config` says what model a checkpoint of Megatron-LM's is.
    """
    refuse_existing(dst)
    source = open_model(src, config, adapter)
    if not source.is_megatron:
        raise WeightsError(
            f"{src} has no {NOTE}, so it is no Megatron checkpoint of moetrain's. Give the folder"
            " that hf2mcore wrote, <run_dir>/checkpoints/step_..., or one of Megatron-LM's."
        )
    rows = _wanted(source.rows, source.model, options)
    write_hf_rows(
        rows,
        source.model.hf_names,
        source.model,
        dst,
        config=source.hf,
        side_files=source.side_files(),
        origin=source.origin(),
        options=options,
    )
    print(f"{dst}: Hugging Face model of {src}")
    return 0


def verify(
    a: Path,
    b: Path,
    workers: int = PLAIN.workers,
    config: Path | None = None,
    most: int | None = None,
    adapters: Adapters = NO_ADAPTERS,
) -> int:
    """Compare the weights of two folders, Hugging Face or Megatron, tensor by tensor. Returns 0
    when equal, else 1. `config` is that of a checkpoint of Megatron-LM's; `most` bounds the list;
    `adapters` are merged into them on the way.
    """
    report = Progress("verify")
    num = 0
    for difference in compare(a, b, workers, report, config, adapters):
        report.close()
        num += 1
        if most is None or num <= most:
            print(difference)
    report.close()
    counted = f"{num} difference{'s' if num > 1 else ''}"
    if most is not None and num > most:
        counted += f"; the first {most} are shown, verify without --logits lists all"
    sides = (
        f"{path} with {adapter} in it" if adapter else f"{path}"
        for path, adapter in zip((a, b), adapters, strict=True)
    )
    print(counted if num else f"{' and '.join(sides)} hold the same weights")
    return 1 if num else 0


def write_hf_rows(
    rows: Rows,
    names: Sequence[str],
    model: Model,
    dst: Path,
    *,
    config: Mapping[str, Any],
    side_files: SideFiles,
    origin: Sequence[str],
    options: Options,
    more: Callable[[Path], None] | None = None,
) -> None:
    """Write tensors as a Hugging Face folder, which appears whole or not at all.

    Args:
        names: of `model`'s table, and others, in the order in which shards take them.
        config: content of config.json as it was; `side_files` says how answers end now.
        origin: what tells this source from another, to resume.
        more: writes further files.

    Raises OSError; WeightsError for too little room; whatever reading raises.
    """
    rows, names = PutTogether(rows, model.table), list(file_names(model.table, names))
    groups = hf_files.shards(hf_files.targets(rows, names), options.shard_bytes)
    files = dict(zip(hf_files.shard_names(len(groups)), groups, strict=True))

    def finish(part: Path) -> None:
        hf_files.write_beside(part, files, side_files, config)
        if more is not None:
            more(part)

    _write(hf_files.plan(files), rows, dst, origin, options, finish)


def _write(
    plan: Plan,
    rows: Rows,
    dst: Path,
    origin: Sequence[str],
    options: Options,
    finish: Callable[[Path], None],
) -> None:
    """The plan's files, what `finish` puts beside them, and a manifest; published together."""
    with part_of(dst, resume=options.resume) as part:
        check_room(plan, part)
        report = Progress(dst.name)
        written: Written = stream(
            plan, rows, part, origin=origin, workers=options.workers, report=report
        )
        report.close()
        finish(part)
        known = manifest.complete(part, written.entries)
        known.pop(JOURNAL)  # it goes last
        manifest.write(part, known, written.tensors)


def _wanted(rows: Rows, model: Model, options: Options) -> Rows:
    """In the dtype that was asked for."""
    if options.dtype is None:
        return rows
    return Converted(rows, dict.fromkeys(model.hf_names, DTYPES[options.dtype]))


def refuse_existing(dst: Path) -> None:
    """Raises CheckpointError."""
    if dst.exists():
        raise CheckpointError(f"{dst} exists. Give another folder or remove it.")


class Progress:
    """Bytes and the time that is left, on stderr: a line that changes, or in a log one every ten
    seconds.
    """

    def __init__(self, name: str):
        self.name, self._started = name, time.monotonic()
        self._first: int | None = None  # bytes that an earlier process had written
        self._shown = self._started
        self._is_terminal = sys.stderr.isatty()

    def __call__(self, written: int, total: int) -> None:
        now = time.monotonic()
        if self._first is None:
            self._first = written
        if now - self._shown < (0.2 if self._is_terminal else 10.0):
            return
        self._shown = now
        speed = (written - self._first) / max(now - self._started, 1e-3)
        left = f"{(total - written) / speed:,.0f} s left" if speed else ""
        line = f"{self.name}: {readable(written)} of {readable(total)}, {readable(speed)}/s, {left}"
        end = "" if self._is_terminal else "\n"
        print(
            f"\r\033[K{line}" if self._is_terminal else line, end=end, file=sys.stderr, flush=True
        )

    def close(self) -> None:
        """Take the line away."""
        if self._is_terminal:
            print("\r\033[K", end="", file=sys.stderr, flush=True)
