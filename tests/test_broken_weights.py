"""What tools/fuzz/convert.py found in conversions, each as one case. No torch."""

import json
import shutil
import struct
import sys
import zipfile
from collections.abc import Callable
from dataclasses import replace
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from moetrain import manifest
from moetrain.errors import CheckpointError, WeightsError
from moetrain.manifest import DamageError, Manifest
from moetrain.weights import convert, stream
from moetrain.weights.blobs import tensor_blob, tensor_of
from moetrain.weights.compare import compare
from moetrain.weights.header import read_header
from moetrain.weights.torch_index import read_index, write_index

sys.path.append(str(Path(__file__).parents[1] / "tools" / "fuzz"))
from convert import SIDES, SIZES
from wholes import content, plain_folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("broken") / "model"
    plain_folder(folder, SIZES, SIDES)
    return folder


@pytest.fixture
def checkpoint(model: Path, tmp_path: Path) -> Path:
    """Without a manifest."""
    convert.hf2mcore(model, tmp_path / "checkpoint")
    (tmp_path / "checkpoint" / manifest.NAME).unlink()
    return tmp_path / "checkpoint"


def archive(change: Callable[[dict[str, bytes]], Any], packed: int = zipfile.ZIP_STORED) -> bytes:
    """A tensor's archive with other members."""
    blob = tensor_blob("F32", (2,))
    with zipfile.ZipFile(BytesIO(blob.prefix + bytes(8) + blob.suffix(0x6522DF69))) as given:
        members = {name: given.read(name) for name in given.namelist()}
    change(members)
    made = BytesIO()
    with zipfile.ZipFile(made, "w", packed) as file:
        for name, data in members.items():
            file.writestr(name, data)
    return made.getvalue()


def described(more: bytes, at: int = 2) -> Callable[[dict[str, bytes]], None]:
    def change(members: dict[str, bytes]) -> None:
        own = members["archive/data.pkl"]
        members["archive/data.pkl"] = own[:at] + more + own[at:]

    return change


def moved(offset: int) -> bytes:
    """Its directory places a member elsewhere."""
    raw = bytearray(archive(lambda members: None))
    at = raw.rindex(b"archive/data/0") - 4
    raw[at : at + 4] = struct.pack("<I", offset)
    return bytes(raw)


@pytest.mark.parametrize(
    "blob",
    [
        archive(described(b"]r\xff\xff\xff\x7f0")),
        archive(described(b"\x96" + struct.pack("<Q", 1 << 40))),
        archive(described(bytes(1 << 20), at=10**6), zipfile.ZIP_DEFLATED),
        archive(described(b"\x81")),
        archive(lambda members: members.update({"archive/data.pkl": b"\x80"})),
        archive(lambda members: None)[:-1],
        moved(1 << 30),
    ],
    ids=["memo", "bytearray", "bomb", "instruction", "cut", "short", "elsewhere"],
)
def test_an_archive_that_is_no_tensor(blob: bytes) -> None:
    with pytest.raises(ValueError, match="no tensor as torch"):
        tensor_of(BytesIO(blob))


def test_what_stands_around_a_tensor_is_known_to_the_byte() -> None:
    """Whatever its CRC-32; else the archive is read as one."""
    blob = tensor_blob("BF16", (3, 5))
    suffix = blob.suffix(0x1234567)
    assert blob.is_around(blob.prefix, suffix)
    for known in (blob.prefix, suffix):
        for at in range(len(known)):
            flipped = known[:at] + bytes([known[at] ^ 1]) + known[at + 1 :]
            sides = (flipped, suffix) if known is blob.prefix else (blob.prefix, flipped)
            assert not blob.is_around(*sides), at
    assert not blob.is_around(blob.prefix, b"")


def test_parts_that_overlap_and_leave_a_gap(checkpoint: Path) -> None:
    """Their sizes add up, and half of the tensor would be zeros."""
    index = read_index(checkpoint)
    key = "decoder.layers.0.self_attention.linear_proj.weight"
    (own,) = index.tensors[key].chunks
    tensors = dict(index.tensors)
    parts = []
    data = checkpoint / own.file
    blob = tensor_blob("BF16", (8, 16))
    for row in (0, 4):
        start = data.stat().st_size
        with data.open("ab") as file:
            file.write(blob.prefix + bytes(256) + blob.suffix(0))
        parts.append(replace(own, offsets=(row, 0), sizes=(8, 16), start=start, length=blob.size))
    tensors[key] = replace(tensors[key], chunks=tuple(parts))
    write_index(checkpoint / ".metadata", replace(index, tensors=tensors))
    with pytest.raises(CheckpointError, match=f"{key} is there more than once"):
        convert.mcore2hf(checkpoint, checkpoint.with_name("out"))
    assert not checkpoint.with_name("out").exists()


@pytest.mark.parametrize("word", [[], 7, "int64", "float8_e4m3fn"])
def test_a_dtype_that_cannot_have_been(checkpoint: Path, word: Any) -> None:
    path = checkpoint / "moetrain.json"
    note = json.loads(path.read_text())
    note["dtypes"]["lm_head.weight"] = word
    path.write_text(json.dumps(note))
    with pytest.raises(CheckpointError, match=r"lm_head\.weight"):
        convert.mcore2hf(checkpoint, checkpoint.with_name("out"))


def test_one_kind_of_halves_was_not_another(model: Path, tmp_path: Path) -> None:
    """bf16 is stored for what was bf16; fp16 would round and overflow."""
    folder = tmp_path / "checkpoint"
    convert.hf2mcore(model, folder, convert.Options(dtype="bf16"))
    (folder / manifest.NAME).unlink()
    test_a_dtype_that_cannot_have_been(folder, "float16")


def test_a_file_of_a_checkpoint_that_is_gone(checkpoint: Path) -> None:
    (checkpoint / "__0_0.distcp").rename(checkpoint / "x")
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp is missing"):
        convert.mcore2hf(checkpoint, checkpoint.with_name("out"))


def test_damage_to_padding_is_seen(model: Path, tmp_path: Path) -> None:
    """Rows that no Hugging Face tensor has, but Megatron reads."""
    convert.hf2mcore(model, tmp_path / "checkpoint")
    index = read_index(tmp_path / "checkpoint")
    last = index.tensors["output_layer.weight"].chunks[-1]
    assert last.offsets[0] == SIZES["vocab_size"]
    path = tmp_path / "checkpoint" / last.file
    raw = bytearray(path.read_bytes())
    raw[last.start + last.length // 2] ^= 1
    path.write_bytes(raw)
    with pytest.raises(DamageError, match=last.file):
        list(compare(tmp_path / "checkpoint", model))


@pytest.mark.parametrize("hash", manifest.HASHES)
def test_a_manifest_of_any_version_finds_damage(model: Path, tmp_path: Path, hash: str) -> None:
    """By each of the hashes that were ever written, in a part and in the whole."""
    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    path = folder / "model.safetensors"
    raw = path.read_bytes()
    cuts = [0, 1000, len(raw) - 8, len(raw)]
    pieces = [[stop, manifest.digest_of(raw[start:stop], hash)] for start, stop in pairwise(cuts)]
    whole = manifest.digest_of("".join(digest for _, digest in pieces).encode(), hash)
    content = {"hash": hash, "files": {path.name: [len(raw), whole]}, "pieces": {path.name: pieces}}
    content["sha256"] = manifest._digest(content)
    (folder / manifest.NAME).write_text(manifest._text(content))
    assert not list(compare(folder, model))
    path.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    with pytest.raises(DamageError, match=r"model\.safetensors has other bytes"):
        list(compare(folder, model))


@pytest.mark.parametrize("name", ["../secret", "/dev/null", "a\0b", "\ud800"])
def test_a_manifest_names_files_of_its_folder(tmp_path: Path, name: str) -> None:
    files = {"files": {name: [0, "0"]}, "pieces": {}}
    text = files | {"sha256": manifest._digest(files)}
    (tmp_path / manifest.NAME).write_text(manifest._text(text))
    with pytest.raises(DamageError, match=r"manifest\.json is damaged"):
        Manifest.of(tmp_path)


def header(path: Path, text: str) -> Path:
    path.write_bytes(struct.pack("<Q", len(text)) + text.encode())
    return path


def test_headers_of_many_or_strange_names(tmp_path: Path) -> None:
    entry = '{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
    many = "{" + ",".join(f'"k{i}":{entry}' for i in range(500_001)) + "}"
    with pytest.raises(WeightsError, match="header of about 500002 tensors"):
        read_header(header(tmp_path / "a", many), None)
    with pytest.raises(WeightsError, match="surrogates not allowed"):
        read_header(header(tmp_path / "b", f'{{"\\ud800":{entry}}}'), None)


def test_rows_of_no_bytes_take_no_time(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        text = '{"x":{"dtype":"F32","shape":[1000000000000000000,0],"data_offsets":[0,0]}}'
        header(tmp_path / name / "model.safetensors", text)
    assert not list(compare(tmp_path / "a", tmp_path / "b"))


def test_a_circle_of_links(model: Path, tmp_path: Path) -> None:
    convert.hf2mcore(model, tmp_path / "checkpoint")
    convert.mcore2hf(tmp_path / "checkpoint", tmp_path / "copy")
    (tmp_path / "copy" / manifest.NAME).unlink()
    path = tmp_path / "copy" / "generation_config.json"
    path.unlink()
    path.symlink_to(path.name)
    convert.hf2mcore(tmp_path / "copy", tmp_path / "out")
    assert not (tmp_path / "out" / path.name).exists()


class Killed(BaseException):
    pass


def truncated(part: Path, outside: Path) -> None:
    (part / "model.safetensors").write_bytes((part / "model.safetensors").read_bytes()[:5000])


def gone(part: Path, outside: Path) -> None:
    (part / "model.safetensors").unlink()


def linked(part: Path, outside: Path) -> None:
    gone(part, outside)
    (part / "model.safetensors").symlink_to(outside)


def other_entry(part: Path, outside: Path) -> None:
    """A bit of a digest flipped."""
    raw = bytearray((part / stream.JOURNAL).read_bytes())
    raw[-20] = ord("0") if raw[-20] != ord("0") else ord("1")
    (part / stream.JOURNAL).write_bytes(raw)


def no_text(part: Path, outside: Path) -> None:
    with (part / stream.JOURNAL).open("ab") as file:
        file.write(b"\xff\n" + b"[" * 100_000 + b"\n[0, null, 1]\n")


def strays(part: Path, outside: Path) -> None:
    (part / "model-00009-of-00009.safetensors").write_bytes(b"x")
    (part / "folder").mkdir()
    (part / "other").symlink_to(part / "folder")


@pytest.mark.parametrize("damage", [truncated, gone, linked, other_entry, no_text, strays])
def test_an_unfinished_conversion_that_was_damaged(
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    damage: Callable[[Path, Path], None],
) -> None:
    """It ends as if it had not been."""
    convert.hf2mcore(model, tmp_path / "checkpoint")
    convert.mcore2hf(tmp_path / "checkpoint", tmp_path / "whole")
    outside = tmp_path / "outside"
    outside.write_bytes(b"of somebody")

    def killed(*given: Any) -> None:
        raise Killed

    options = convert.Options(resume=True)
    with monkeypatch.context() as patch:
        patch.setattr(manifest, "write", killed)
        with pytest.raises(Killed):
            convert.mcore2hf(tmp_path / "checkpoint", tmp_path / "out", options)
    damage(tmp_path / ".out.part", outside)
    convert.mcore2hf(tmp_path / "checkpoint", tmp_path / "out", options)
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    assert outside.read_bytes() == b"of somebody"


def test_a_conversion_of_a_version_with_another_hash_begins_anew(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its journal has digests of which a manifest could not say what they are."""
    part = tmp_path / ".out.part"
    monkeypatch.setattr(stream, "HASH", "blake3")
    monkeypatch.setattr(convert.manifest, "write", lambda *_: sys.exit("killed"))
    with pytest.raises(SystemExit):
        convert.hf2mcore(model, tmp_path / "out")
    assert len((part / stream.JOURNAL).read_text().splitlines()) > 1
    monkeypatch.undo()
    convert.hf2mcore(model, tmp_path / "out", convert.Options(resume=True))
    convert.hf2mcore(model, tmp_path / "whole")
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_an_unfinished_conversion_is_no_link(model: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter").touch()
    (tmp_path / ".out.part").symlink_to(tmp_path / "mine")
    with pytest.raises(OSError):
        convert.hf2mcore(model, tmp_path / "out")
    assert (tmp_path / "mine" / "letter").exists()
