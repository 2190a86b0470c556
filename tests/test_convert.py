"""Conversions that stream: killed and resumed, in little memory, and byte for byte the same."""

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from moetrain import cli
from moetrain.manifest import Manifest
from moetrain.testing.tiny import save_model
from moetrain.weights.hf_files import Target, header, shards

# Small pieces and an entry in the journal after each few, so that a small model has many.
IN_SMALL_STEPS = """
import sys, time
from moetrain import cli
from moetrain.weights import stream
stream.RUN = 1 << 14
stream.SYNC = 1 << 16
put = stream.put
def slow(*given):
    time.sleep(0.002)
    put(*given)
stream.put = slow
sys.exit(cli.main(sys.argv[1:]))
"""
KILLS = int(os.environ.get("MOETRAIN_KILLS", "6"))


def digests(folder: Path) -> dict[str, str]:
    """Of every file, by its name."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def start(*words: Any, code: str = IN_SMALL_STEPS) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", code, "convert", *map(str, words)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    """(exit code, stderr)."""
    _, said = process.communicate()
    return process.returncode, said


def kill(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGKILL)
    process.communicate()


def lines_of(journal: Path) -> int:
    return len(journal.read_text().splitlines()) if journal.is_file() else 0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_model("qwen3_moe", folder, vocab_size=6000)
    return folder


@pytest.mark.parametrize("action", ["hf2mcore", "mcore2hf"])
def test_killed_and_resumed(model: Path, tmp_path: Path, action: str) -> None:
    """`kill -9` at random moments, each time gone on from: the same bytes as in one go."""
    source = model
    if action == "mcore2hf":
        source = tmp_path / "mcore"
        assert cli.main(["convert", "hf2mcore", str(model), str(source)]) == 0
    whole, dst = tmp_path / "whole", tmp_path / "killed"
    assert finish(start(action, source, whole)) == (0, "")
    journal = tmp_path / ".killed.part" / "journal"
    rng, kept, on_disk = random.Random(7), 0, 0
    for _ in range(KILLS):
        process = start(action, source, dst, "--resume")
        wanted = kept + rng.randint(0, 3)
        while lines_of(journal) < wanted and process.poll() is None:
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.2))
        kill(process)
        if dst.exists():  # it was as fast as the kill
            assert digests(dst) == digests(whole)
            shutil.rmtree(dst)
            kept = 0
        lines = lines_of(journal)
        assert lines >= kept - 1, "what was on disk is not begun anew"
        kept, on_disk = lines, max(on_disk, lines)
    assert on_disk > 1
    assert finish(start(action, source, dst, "--resume")) == (0, "")
    assert digests(dst) == digests(whole)
    assert not (tmp_path / ".killed.part").exists()


def test_another_source_begins_anew(model: Path, tmp_path: Path) -> None:
    """What a killed conversion of another model has left is not mixed in, nor without --resume."""
    other = tmp_path / "other"
    save_model("qwen3_moe", other, vocab_size=6000)
    weights = load_file(other / "model.safetensors")
    save_file({name: -w for name, w in weights.items()}, other / "model.safetensors")
    dst = tmp_path / "dst"
    for source, more in ((other, []), (other, ["--resume"])):
        process = start("hf2mcore", source, dst)
        journal = tmp_path / ".dst.part" / "journal"
        while lines_of(journal) < 3:
            assert process.poll() is None
            time.sleep(0.01)
        kill(process)
        assert cli.main(["convert", "hf2mcore", str(model), str(dst), *more]) == 0
        assert cli.main(["convert", "verify", str(model), str(dst)]) == 0
        for path in dst.iterdir():
            path.unlink()
        dst.rmdir()


def test_two_at_once(model: Path, tmp_path: Path) -> None:
    first = start("hf2mcore", model, tmp_path / "dst")
    while not (tmp_path / ".dst.part" / "journal").is_file():
        time.sleep(0.01)
    first.send_signal(signal.SIGSTOP)
    for more in ([], ["--resume"]):
        code, said = finish(start("hf2mcore", model, tmp_path / "dst", *more))
        assert code == 2 and "another process" in said, said
    first.send_signal(signal.SIGCONT)
    assert finish(first) == (0, "")
    assert cli.main(["convert", "verify", str(model), str(tmp_path / "dst")]) == 0


def large(folder: Path, num_rows: int) -> None:
    """A model of one dense layer with a vocabulary of `num_rows` rows, zero and sparse on disk."""
    sizes = dict(hidden_size=1024, intermediate_size=128, num_hidden_layers=1, head_dim=64)
    heads = dict(num_attention_heads=2, num_key_value_heads=2, vocab_size=num_rows)
    hf = dict(sizes, **heads, architectures=["Qwen3ForCausalLM"], tie_word_embeddings=True)
    from moetrain.models import read_model

    table = read_model(hf).table.values()
    targets = [
        Target(name, "BF16", shape)
        for rule in table
        for name, shape in zip(rule.hf, rule.hf_shapes, strict=True)
    ]
    (targets,) = shards(targets, 1 << 62)  # in the order that the result has
    first = header(targets)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(hf))
    with (folder / "model.safetensors").open("wb") as file:
        file.write(first)
        file.truncate(len(first) + sum(one.num_bytes for one in targets))


def test_memory_does_not_grow_with_a_tensor(tmp_path: Path) -> None:
    """An embedding of 307 MB there, back and compared, with less memory than that."""
    large(tmp_path / "hf", 150_000)
    code = """
import resource, sys
resource.setrlimit(resource.RLIMIT_DATA, (250 << 20, 250 << 20))
from moetrain import cli
code = cli.main(sys.argv[1:])
assert "torch" not in sys.modules and "megatron" not in sys.modules
sys.exit(code)
"""
    there = (tmp_path / "hf", tmp_path / "mcore")
    back = (tmp_path / "mcore", tmp_path / "back")
    for words in (("hf2mcore", *there), ("mcore2hf", *back), ("verify", *there), ("verify", *back)):
        assert finish(start(*words, code=code))[0] == 0, words
    manifests = [Manifest.of(tmp_path / name) for name in ("mcore", "back")]
    assert all(found is not None for found in manifests)
    assert len({json.dumps(found.tensors) for found in manifests if found}) == 1
    assert (
        digests(tmp_path / "back")["model.safetensors"]
        == digests(tmp_path / "hf")["model.safetensors"]
    )


def test_no_room_is_said_before_the_first_byte(model: Path, tmp_path: Path) -> None:
    free = os.statvfs(tmp_path)
    rows = int(free.f_bavail * free.f_frsize * 1.5) // 2048
    large(tmp_path / "vast", rows)
    code, said = finish(start("hf2mcore", tmp_path / "vast", tmp_path / "dst"))
    assert code == 2 and "No space left on the disk" in said and "are needed" in said, said
    assert not list(tmp_path.glob(".dst*")) and not (tmp_path / "dst").exists()


def test_sizes() -> None:
    from moetrain.commands.convert import size

    assert [size(text) for text in ("7", "500MB", "5 gb", "1TB")] == [
        7,
        5 * 10**8,
        5 * 10**9,
        10**12,
    ]
    for text in ("", "0", "-1", "1.5GB", "GB"):
        with pytest.raises(Exception, match="is no size"):
            size(text)
