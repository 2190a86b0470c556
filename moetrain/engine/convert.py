"""Hugging Face <-> Megatron, the proof that two folders hold the same weights, and the adapter of a
run. One process each.
"""

import os
from pathlib import Path

from moetrain import files
from moetrain.engine import Engine, on_disk
from moetrain.engine.derived import published, refuse_existing
from moetrain.engine.on_disk import mark_dtypes, recipe_for
from moetrain.errors import WeightsError
from moetrain.models.lookup import checkpoint_at
from moetrain.weights.compare import compare


def hf2mcore(src: Path, dst: Path) -> int:
    """Write the Hugging Face folder `src` as a Megatron torch_dist checkpoint `dst`, which must not
    exist.
    """
    engine = _open(src, dst)
    with published(dst) as part:
        engine.save(part, {}, optimizer=False)
        mark_dtypes(part, engine)
    engine.close()
    print(f"{dst}: Megatron checkpoint of {src}")
    return 0


def mcore2hf(src: Path, dst: Path) -> int:
    """Write the Megatron checkpoint `src` as a Hugging Face folder `dst`, which must not exist."""
    src = checkpoint_at(src)
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
    with files.scratch(_roomy()) as scratch:
        folders = [
            _as_hf(checkpoint_at(path), scratch / name) for path, name in ((a, "a"), (b, "b"))
        ]
        differences = list(compare(*folders))
    for difference in differences:
        print(difference)
    num = len(differences)
    counted = f"{num} difference{'s' if num > 1 else ''}"
    print(counted if num else f"{a} and {b} hold the same weights")
    return 1 if differences else 0


def adapter(run: Path, dst: Path) -> int:
    """Write the adapter of a run's last checkpoint, or of a checkpoint, as a PEFT folder `dst`,
    which must not exist.
    """
    refuse_existing(dst)
    source = Path(on_disk.model_in(str(run))) if not (run / "resolved.yaml").is_file() else run
    base = on_disk.write_adapter(source, dst)
    print(f"{dst}: PEFT adapter of {source}, for {base}")
    return 0


def _open(src: Path, dst: Path) -> Engine:
    if not src.is_dir():
        raise WeightsError(
            f"{src} is no folder. Give a Hugging Face model folder or a Megatron checkpoint."
        )
    refuse_existing(dst)
    return Engine(recipe_for(str(src), dst.parent), train=False)


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
