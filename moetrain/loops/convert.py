"""Hugging Face <-> Megatron, and the proof that two folders hold the same weights. One process
each.
"""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moetrain.engine import Engine
from moetrain.errors import CheckpointError, WeightsError
from moetrain.loops.models import mark_dtypes, open_engine, recipe_for
from moetrain.weights.compare import compare


def hf2mcore(src: Path, dst: Path) -> int:
    """Write the Hugging Face folder `src` as a Megatron torch_dist checkpoint `dst`, which must not
    exist.
    """
    engine = _open(src, dst)
    with _published(dst) as part:
        engine.save(part, {}, optimizer=False)
        mark_dtypes(part, engine)
    engine.close()
    print(f"{dst}: Megatron checkpoint of {src}")
    return 0


def mcore2hf(src: Path, dst: Path) -> int:
    """Write the Megatron checkpoint `src` as a Hugging Face folder `dst`, which must not exist."""
    if not (src / "moetrain.json").is_file():
        raise WeightsError(
            f"{src} has no moetrain.json, so it is no Megatron checkpoint of moetrain's. Give the"
            " folder"
            " that hf2mcore wrote, or <run_dir>/checkpoints/step_...."
        )
    engine = _open(src, dst)
    engine.export_hf(dst)
    engine.close()
    print(f"{dst}: Hugging Face model of {src}")
    return 0


def verify(a: Path, b: Path) -> int:
    """Compare the weights of two folders, Hugging Face or Megatron, tensor by tensor. Returns 0
    when equal, else 1.
    """
    with tempfile.TemporaryDirectory(prefix="moetrain-verify-", dir=_roomy()) as scratch:
        folders = [_as_hf(path, Path(scratch) / name) for path, name in ((a, "a"), (b, "b"))]
        differences = list(compare(*folders))
    for difference in differences:
        print(difference)
    num = len(differences)
    counted = f"{num} difference{'s' if num > 1 else ''}"
    print(counted if num else f"{a} and {b} hold the same weights")
    return 1 if differences else 0


def _open(src: Path, dst: Path) -> Engine:
    if not src.is_dir():
        raise WeightsError(
            f"{src} is no folder. Give a Hugging Face model folder or a Megatron checkpoint."
        )
    if dst.exists():
        raise CheckpointError(f"{dst} exists. Give another folder or remove it.")
    return open_engine(recipe_for(str(src), dst.parent))


@contextmanager
def _published(dst: Path) -> Iterator[Path]:
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


def _as_hf(path: Path, scratch: Path) -> Path:
    """`path` if it is a Hugging Face folder, else its export in `scratch`."""
    if not (path / "moetrain.json").is_file():
        return path
    engine = _open(path, scratch)
    engine.export_hf(scratch)
    engine.close()
    return scratch


def _roomy() -> str | None:
    """Where scratch files go: $TMPDIR when set, else here, since /tmp is often small or memory."""
    return None if "TMPDIR" in os.environ else os.getcwd()
