"""`moetrain convert`: checkpoints, adapters, deeper models."""

import argparse
import os
from dataclasses import replace
from pathlib import Path

from moetrain.commands.common import Arguments, Command, Parser, positive
from moetrain.errors import ConfigError

# action -> (its line of help, its paths)
CONVERSIONS: dict[str, tuple[str, tuple[str, ...]]] = {
    "hf2mcore": ("a Megatron checkpoint of a Hugging Face folder", ("source", "destination")),
    "mcore2hf": ("a Hugging Face folder of a Megatron checkpoint", ("source", "destination")),
    "verify": ("compare the weights of two folders", ("a", "b")),
    "inspect": ("what a folder of weights holds", ("folder",)),
    "adapter": ("a run's adapter as a PEFT folder", ("run", "destination")),
    "merge": ("a plain model of a base and a PEFT folder", ("base", "adapter", "destination")),
    "expand": ("a deeper model that answers as before", ("source", "destination")),
    "quantize": ("a Hugging Face folder in fewer bits, for serving", ("source", "destination")),
}
STREAMED = ("hf2mcore", "mcore2hf", "merge", "expand", "quantize")
MERGING = ("hf2mcore", "mcore2hf", "verify", "quantize")
QUANTIZED = ("fp8", "fp8-block", "nvfp4", "int4-awq")


def arguments(parser: Parser) -> None:
    """Declare the arguments."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    for action, (line, paths) in CONVERSIONS.items():
        action_parser = actions.add_parser(action, help=line, description=line)
        for path in paths:
            action_parser.add_argument(path, type=Path)
        if action in (*STREAMED, "verify"):
            cores = len(os.sched_getaffinity(0))
            action_parser.add_argument(
                "--workers",
                type=positive,
                default=min(cores, 16),
                metavar="N",
                help="threads that read and write (default: one a core, 16 at most)",
            )
        if action in MERGING:
            action_parser.add_argument(
                "--adapter",
                type=Path,
                metavar="DIR",
                help="a PEFT folder, or a run that trained one: merged into the"
                f" {paths[0]} on the way",
            )
        if action in STREAMED:
            _add_writing(action_parser, has_dtype=action in ("hf2mcore", "mcore2hf"))
        if action == "quantize":
            action_parser.add_argument("--to", required=True, choices=QUANTIZED)
            action_parser.add_argument(
                "--calibration", type=Path, metavar="FILE", help="a JSONL of text or messages"
            )
        if action == "hf2mcore":
            action_parser.add_argument(
                "--style",
                choices=["moetrain", "megatron-lm"],
                default="moetrain",
                help="megatron-lm: a folder for Megatron-LM's --load",
            )
        if action in ("mcore2hf", "verify"):
            action_parser.add_argument(
                "--hf",
                type=Path,
                metavar="CONFIG",
                help="config.json of a checkpoint of Megatron-LM's, or a folder that has it",
            )
        if action == "verify":
            _add_logits(action_parser)
        if action == "inspect":
            action_parser.add_argument("--json", action="store_true", help="for programs")
        if action == "expand":
            action_parser.add_argument(
                "--every",
                type=positive,
                default=4,
                metavar="K",
                help="a new block after every K-th (default 4)",
            )


def _add_writing(parser: Parser, *, has_dtype: bool) -> None:
    """How a result is written."""
    parser.add_argument(
        "--resume", action="store_true", help="go on with what a killed conversion has written"
    )
    parser.add_argument(
        "--shard-bytes",
        type=size,
        default=5_000_000_000,
        metavar="N",
        help="a file grows to at most so many bytes: 500MB, 5GB (default 5GB)",
    )
    if has_dtype:
        parser.add_argument(
            "--dtype", choices=["bf16", "fp16", "fp32"], help="of all weights (default: as it is)"
        )


def _add_logits(parser: Parser) -> None:
    """Whether two models answer alike."""
    parser.add_argument(
        "--logits",
        type=positive,
        metavar="N",
        help="also run N tokens through both, a layer in memory: what differs after each, and in"
        " the log-probs; exits 0 when that is within --tolerance, whatever the tensors are",
    )
    parser.add_argument(
        "--tolerance",
        type=_fraction,
        metavar="X",
        help="of --logits: mean relative difference of what a layer alone, or the output, makes of"
        " the same hidden states (default 0.02)",
    )
    parser.add_argument(
        "--data",
        type=Path,
        metavar="FILE",
        help="of --logits: a JSONL of text, messages or tokens (default: tokens that are drawn)",
    )


def _fraction(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 0")
    return value


def size(text: str) -> int:
    """Bytes: 5000000, 500MB, 5GB."""
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "B": 1}
    number, unit = text.upper().strip(), 1
    for suffix, factor in units.items():
        if number.endswith(suffix):
            number, unit = number.removesuffix(suffix).strip(), factor
            break
    if not number.isdecimal() or int(number) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; give bytes, or 500MB, 5GB")
    return int(number) * unit


def run(args: Arguments) -> int:
    """Run it; the exit code."""
    # numpy's threads, which convert nothing, would turn beside the workers for the first tenths of
    # a second.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    paths: list[Path] = [vars(args)[path] for path in CONVERSIONS[args.action][1]]
    if args.action == "adapter":
        from moetrain.engine import on_disk

        return on_disk.adapter(*paths)
    if args.action == "inspect":
        from moetrain.weights.inspect import inspect

        return inspect(_of_run(args.folder), as_json=args.json)
    if args.action == "verify":
        return _verify(args)
    from moetrain.weights import convert, derived

    options = convert.Options(args.workers, args.resume, vars(args).get("dtype"), args.shard_bytes)
    if args.action == "expand":
        return derived.expand(paths[0], paths[1], args.every, options)
    adapter = None if args.adapter is None else _peft(args.adapter)
    if args.action == "merge":
        assert adapter is not None
        return derived.merge(paths[0], adapter, paths[2], options)
    if args.action == "hf2mcore":
        return convert.hf2mcore(paths[0], paths[1], replace(options, style=args.style), adapter)
    if args.action == "mcore2hf":
        return convert.mcore2hf(_of_run(paths[0]), paths[1], options, args.hf, adapter)
    from moetrain.weights.quantise import quantize

    return quantize(paths[0], paths[1], args.to, args.calibration, options, adapter)


def _verify(args: Arguments) -> int:
    (a, of_a), (b, of_b) = _weights(args.a), _weights(args.b)
    if args.adapter is not None:
        if of_a is not None:
            raise ConfigError(f"{args.a} has an adapter already. Leave --adapter out.")
        of_a = _peft(args.adapter)
    adapters = (of_a, of_b)
    if args.logits is not None:
        from moetrain.weights import logits

        return logits.verify(
            a,
            b,
            args.logits,
            tolerance=args.tolerance,
            data=args.data,
            workers=args.workers,
            config=args.hf,
            adapters=adapters,
        )
    for name in ("tolerance", "data"):
        if vars(args)[name] is not None:
            raise ConfigError(f"--{name} is of --logits: give --logits N too, or leave it out.")
    from moetrain.weights import convert

    return convert.verify(a, b, workers=args.workers, config=args.hf, adapters=adapters)


def _of_run(path: Path) -> Path:
    """The last checkpoint of a run that has no export; anything else as it is."""
    from moetrain.models.lookup import HF, checkpoint_at

    path = checkpoint_at(path)
    if not (path / "resolved.yaml").is_file() or (path / "hf" / HF).is_file():
        return path
    from moetrain.engine.on_disk import latest

    return latest(path)


def _weights(path: Path) -> tuple[Path, Path | None]:
    """(folder of a model, the adapter to merge into it): of an adapter's checkpoint its base and
    itself as a PEFT folder.
    """
    from moetrain.models.lookup import NOTE, read_mapping

    path = _of_run(path)
    note = path / NOTE
    if not note.is_file() or "adapter_of" not in read_mapping(note):
        return path, None
    from moetrain.engine.on_disk import sections_of

    base, sections = sections_of(str(path))
    return Path(base), Path(sections["adapter"]["path"])


def _peft(folder: Path) -> Path:
    """The PEFT folder that `folder` is, or that of a run or of its checkpoint."""
    from moetrain.weights.folder import ADAPTER

    if (folder / ADAPTER).is_file():
        return folder
    from moetrain.engine.on_disk import peft_folder

    return peft_folder(folder)


COMMAND = Command("checkpoints, adapters, deeper models", arguments, run)
