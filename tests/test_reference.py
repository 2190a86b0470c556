"""What a reference's cache is known by, and several runs that fill it at once."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from moetrain.errors import WeightsError
from moetrain.loops.reference import keep
from moetrain.testing.tiny import save_model
from moetrain.weights.digest import STRIDE, file_digest


def test_a_model_is_known_by_every_part_of_it(tmp_path: Path) -> None:
    """One small trained tensor anywhere makes another model; a copy is the same."""
    save_model("qwen3_moe", tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    known = file_digest(path)
    again = Path(shutil.copytree(tmp_path / "model", tmp_path / "again")) / path.name
    os.utime(again)
    assert file_digest(again) == known
    tensors = load_file(path)
    for name in tensors:
        if "experts" in name and ".3." not in name:
            continue
        save_file(tensors | {name: tensors[name] + 1e-3}, path, metadata={"format": "pt"})
        assert file_digest(path) != known, name


def test_a_large_tensor_is_looked_at_more_than_once(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    large = torch.zeros(3 * STRIDE // 4)
    save_file({"a": large}, path)
    known = file_digest(path)
    for third in large.chunk(3):
        third += 1
        save_file({"a": large}, path)
        assert file_digest(path) != known
        third -= 1
    other = path.with_suffix(".distcp")  # its tensors are not told apart
    shutil.copy(path, other)
    before = file_digest(other)
    os.utime(other, (1, 1))
    assert file_digest(other) != before


def test_a_header_that_is_none_is_refused_in_a_line(tmp_path: Path) -> None:
    """An adapter's weights are known by a look into them before anything reads them."""
    path = tmp_path / "adapter_model.safetensors"
    save_file({"a": torch.zeros(4)}, path)
    whole = path.read_bytes()
    assert file_digest(path)
    for broken in (
        whole.replace(b"data_offsets", b"data\xffoffsets"),
        whole.replace(b'"a"', b"'a'"),
        whole.replace(b"[0,16]", b"[0,99]"),
        whole[:20],
        b"\xff" * 64,
        b"",
    ):
        path.write_bytes(broken)
        with pytest.raises(WeightsError, match=r"adapter_model\.safetensors") as caught:
            file_digest(path)
        assert "\n" not in str(caught.value)


def test_runs_that_fill_a_cache_at_once(tmp_path: Path) -> None:
    """The first one's stays; the second one is none the worse."""
    for value in (1.0, 2.0):
        keep(tmp_path / "reference" / "key", torch.full((3,), value), {"version": 1})
    assert np.load(tmp_path / "reference" / "key" / "logp.npy").tolist() == [1, 1, 1]
    assert [path.name for path in (tmp_path / "reference").glob("key*")] == ["key"]
