"""Checkpoints that are written while training goes on, verified, and passed over when damaged."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_supervised import make_recipe, rows

from moetrain import manifest
from moetrain.engine.manifest import damage_of_share
from moetrain.errors import CheckpointError
from moetrain.loops.supervised import train
from moetrain.run.folder import check_writable
from moetrain.run.starts import read_starts
from moetrain.testing import ranks
from moetrain.testing.gloo import Workers

pytestmark = pytest.mark.gloo
KEEP = {"keep": 9}


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def a_part(folder: Path) -> Path:
    return next(iter(sorted(folder.glob("*.distcp"))))


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a bit": (lambda f: flip(a_part(f)), "has other bytes than were written"),
    "an end": (lambda f: a_part(f).write_bytes(a_part(f).read_bytes()[:-9]), "bytes, "),
    "a file": (lambda f: a_part(f).unlink(), "is missing"),
    "the state": (lambda f: (f / "state.json").write_text("{"), "bytes, "),
    "the index": (lambda f: flip(f / ".metadata"), "has other bytes than were written"),
    "the manifest": (lambda f: (f / "manifest.json").write_text("{"), "manifest.json"),
    "no manifest": (lambda f: (f / "manifest.json").unlink(), "no manifest.json"),
}


def test_damage_is_seen_and_the_one_before_is_taken(workers: Workers, tmp_path: Path) -> None:
    run = make_recipe(tmp_path, checkpoint=KEEP)
    assert workers.run(2, train, run) == [0, 0]
    made, newest = rows(run), run.run_dir / "checkpoints" / "step_00000006"
    assert damage_of_share(newest, 0, 1) == ""
    for name, (harm, says) in DAMAGE.items():
        copy = Path(shutil.copytree(newest, tmp_path / name))
        harm(copy)
        try:
            found = [damage_of_share(copy, rank, 2) for rank in range(2)]
        except ValueError as error:  # a manifest that is no JSON
            found = [f"manifest.json: {error}"]
        assert any(says in problem for problem in found), (name, found)
    flip(a_part(newest))
    assert workers.run(2, train, run) == [0, 0]
    assert rows(run) == made
    last = read_starts(run.run_dir)[-1]
    assert last["step"] == 4 and "step_00000006 is damaged" in last["damaged"][0]
    names = sorted(path.name for path in newest.parent.glob("*step*"))
    assert names == ["damaged_step_00000006", *(f"step_0000000{i}" for i in (2, 4, 6))]


def test_none_is_whole_or_it_is_newer_than_the_code(workers: Workers, tmp_path: Path) -> None:
    run = make_recipe(tmp_path, train={"steps": 4, "eval_every": None}, checkpoint=KEEP)
    assert workers.run(1, train, run) == [0]
    folder = run.run_dir / "checkpoints" / "step_00000004"
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps(state | {"format": 99}))
    manifest.write(folder, manifest.complete(folder, {}))
    with pytest.raises(CheckpointError, match="written by a newer moetrain"):
        workers.run(1, train, run)
    for path in folder.parent.glob("step_*"):
        flip(a_part(path))
    with pytest.raises(CheckpointError, match="no checkpoint before it is whole"):
        workers.run(1, train, run)


def test_a_step_during_a_save_is_not_in_it(
    workers: Workers, tiny: Callable[[str], tuple[str, Any]], tmp_path: Path
) -> None:
    folder, _ = tiny("qwen3_moe")
    sequences = [[list(range(1, 20))], [list(range(30, 60))]]
    tokens = [part for whole in sequences for part in whole]
    for was_writing, before, restored in workers.run(
        2, ranks.saved_in_the_background, folder, {"ep": 2}, tokens, tmp_path
    ):
        assert was_writing
        assert before.keys() == restored.keys()
        assert all(torch.equal(before[name], restored[name]) for name in before)


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    """A real one: mounted read-only, which root cannot write either."""
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written"):
        check_writable(tmp_path / "file")
    code = (
        "import sys\nfrom pathlib import Path\nfrom moetrain.run.folder import check_writable\n"
        f"check_writable(Path({str(tmp_path)!r}) / 'disk' / 'run')"
    )
    disk = tmp_path / "disk"
    disk.mkdir()
    script = f'mount -t tmpfs -o ro none {disk} || exit 99\n{sys.executable} -c "{code}"'
    done = subprocess.run(
        ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode == 99 or "unshare" in done.stderr:
        pytest.skip("no mount namespaces here: a read-only folder stays unproven")
    assert "CheckpointError" in done.stderr and "Read-only file system" in done.stderr
