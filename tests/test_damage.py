"""Flipped bytes and hostile files: refused by what reads them, in a line, and nothing in them runs.

tools/fuzz/damage.py flips bytes under the commands themselves. `MOETRAIN_FLIPS=40` flips as many in
each file here.
"""

import io
import json
import os
import pickle
import random
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from data_helpers import tokenizer_folder
from safetensors.torch import save_file
from test_adapter import exported, spec_of

from moetrain import manifest
from moetrain.config.rewards import RewardConfig
from moetrain.data import tokenizer
from moetrain.engine import Engine, pickles
from moetrain.engine.on_disk import recipe_for
from moetrain.errors import ConfigError, MoetrainError, WeightsError
from moetrain.loops.score import score
from moetrain.manifest import BLOCK, DamageError, Manifest
from moetrain.models import read_model
from moetrain.rewards.reward_model import RewardModel
from moetrain.testing.gloo import Workers
from moetrain.testing.tiny import CONFIGS, save_model
from moetrain.weights.compare import compare
from moetrain.weights.convert import hf2mcore, mcore2hf
from moetrain.weights.derived import expand, merge
from moetrain.weights.folder import INDEX, weight_files
from moetrain.weights.peft_config import read_config
from moetrain.weights.reader import SafetensorsReader
from moetrain.weights.side_files import check_exported

FLIPS = int(os.environ.get("MOETRAIN_FLIPS", "2"))
WHOLE = "has other bytes than were written"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model from elsewhere: no manifest."""
    folder = tmp_path_factory.mktemp("model")
    save_model("qwen3_moe", folder, vocab_size=512, num_hidden_layers=1)
    shutil.copytree(tokenizer_folder(), folder, dirs_exist_ok=True)
    return folder


@pytest.fixture(scope="module")
def export(model: Path) -> Path:
    folder = model.parent / "export"
    expand(model, folder, every=1)
    return folder


@pytest.fixture(scope="module")
def adapter(export: Path) -> Path:
    folder = export.parent / "adapter"
    exported(export, spec_of("lora", "q_proj"), folder)
    return folder


@pytest.fixture(scope="module")
def checkpoint(export: Path, workers: Workers) -> Path:
    folder = export.parent / "checkpoint"
    hf2mcore(export, folder)
    return folder


def flip(path: Path, place: int, bits: int | None = None) -> None:
    """In place: a file that is written anew would wait for the disk each time (ext4)."""
    with path.open("r+b") as file:
        file.seek(place)
        (before,) = file.read(1)
        file.seek(place)
        file.write(bytes([before ^ (1 << place % 8 if bits is None else bits)]))


def refused(
    folder: Path, names: list[str], read: Callable[[Path], Any], flips: int = FLIPS
) -> None:
    """`read` takes `folder` as it is, and a copy with a flipped byte in any of the files not."""
    rng, seen = random.Random(1), 0
    read(folder)
    for name in names:
        for _ in range(flips):
            copy = Path(shutil.copytree(folder, folder.parent / "copy"))
            place = rng.randrange((copy / name).stat().st_size)
            flip(copy / name, place)
            with pytest.raises(MoetrainError) as caught:
                read(copy)
                print(name, place)
            seen += 1
            assert "\n" not in str(caught.value) and str(copy / name) in str(caught.value)
            shutil.rmtree(copy)
    print(f"{seen} flipped bytes of {folder.name}, each refused")


EXPORT = ["config.json", "model.safetensors", "manifest.json"]
TOKENIZER = ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]


def test_a_flipped_byte_in_an_export(export: Path, adapter: Path, tmp_path: Path) -> None:
    def into(make: Callable[[Path], Any]) -> None:
        make(tmp_path / "made")
        shutil.rmtree(tmp_path / "made")

    assert {*EXPORT, *TOKENIZER} <= {path.name for path in export.iterdir()}
    copied = [*EXPORT, *TOKENIZER, "generation_config.json"]
    refused(export, copied, lambda f: into(lambda out: merge(f, adapter, out)))
    refused(export, copied, lambda f: into(lambda out: expand(f, out, every=2)))
    refused(export, copied, lambda f: list(compare(f, export)))
    refused(export, TOKENIZER, tokenizer.load)
    names = ["adapter_config.json", "adapter_model.safetensors", "manifest.json"]
    refused(adapter, names, lambda f: into(lambda out: merge(export, f, out)), flips=2 * FLIPS)


def test_a_reward_model_is_checked_before_transformers_reads_it(export: Path) -> None:
    copy = Path(shutil.copytree(export, export.parent / "reward"))
    flip(copy / "model.safetensors", 5000)
    config = RewardConfig.model_validate({"name": "reward_model", "options": {"path": str(copy)}})
    with pytest.raises(DamageError, match=WHOLE):
        RewardModel([config])


@pytest.mark.gloo
def test_a_flipped_byte_in_a_checkpoint(
    checkpoint: Path, export: Path, workers: Workers, tmp_path: Path
) -> None:
    def converted(folder: Path) -> None:
        mcore2hf(folder, tmp_path / "made")
        shutil.rmtree(tmp_path / "made")

    read = [".metadata", "__0_0.distcp", "moetrain.json", "metadata.json", "manifest.json"]
    refused(checkpoint, [*read, "tokenizer.json"], converted, flips=FLIPS // 2)
    refused(checkpoint, [*read, "tokenizer.json"], lambda f: list(compare(export, f)))
    data, out = tmp_path / "data.jsonl", tmp_path / "out.jsonl"
    data.write_text('{"tokens": [1, 2, 3]}\n')
    scored = lambda folder: workers.run(1, score, str(folder), data, out)  # noqa: E731
    refused(checkpoint, [".metadata", "__0_0.distcp", "moetrain.json"], scored, flips=FLIPS // 2)


@pytest.mark.gloo
def test_a_part_that_one_rank_reads_is_refused_on_all(
    export: Path, checkpoint: Path, workers: Workers, tmp_path: Path
) -> None:
    """Without a manifest too: what is cut short cannot be read."""
    copy = Path(shutil.copytree(checkpoint, tmp_path / "cut"))
    (copy / "manifest.json").unlink()
    part = copy / "__0_0.distcp"
    part.write_bytes(part.read_bytes()[:-2000])
    with pytest.raises(MoetrainError, match=r"/cut/__0_0.*Copy the checkpoint again") as caught:
        mcore2hf(copy, tmp_path / "made")
    assert "\n" not in str(caught.value)
    with pytest.raises(MoetrainError, match="cut cannot be read") as caught:
        workers.run(2, restored, copy, export)
    assert "\n" not in str(caught.value)


def restored(folder: Path, like: Path) -> None:
    """As a run that goes on reads it: by Megatron."""
    engine = Engine(recipe_for(str(like), folder), train=False)
    engine.restore(folder)


class Marker:
    """What a hostile pickle holds: unpickled plainly it makes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def hostile_index(folder: Path, marker: Path) -> None:
    found = pickle.loads((folder / ".metadata").read_bytes())
    found.planner_data = Marker(marker)
    (folder / ".metadata").write_bytes(pickle.dumps(found))


def hostile_object(folder: Path, marker: Path) -> None:
    """What is no tensor lies as a pickle among the tensors."""
    found = pickle.loads((folder / ".metadata").read_bytes())
    part = next(p for i, p in found.storage_data.items() if i.fqn.startswith("common_state"))
    content = io.BytesIO()
    torch.save([{"x": Marker(marker)}], content)
    path = folder / part.relative_path
    part.offset, part.length = path.stat().st_size, len(content.getvalue())
    path.write_bytes(path.read_bytes() + content.getvalue())
    (folder / ".metadata").write_bytes(pickle.dumps(found))


def hostile_common(folder: Path, marker: Path) -> None:
    torch.save({"x": Marker(marker)}, folder / "common.pt")


@pytest.mark.gloo
@pytest.mark.parametrize("make", [hostile_index, hostile_object, hostile_common])
def test_a_checkpoint_runs_nothing(
    checkpoint: Path,
    export: Path,
    workers: Workers,
    tmp_path: Path,
    make: Callable[[Path, Path], None],
) -> None:
    copy, marker = Path(shutil.copytree(checkpoint, tmp_path / "copy")), tmp_path / "marker"
    (copy / "manifest.json").unlink()
    make(copy, marker)
    data = tmp_path / "data.jsonl"
    data.write_text('{"tokens": [1, 2, 3]}\n')
    if make is hostile_index:
        with pytest.raises(MoetrainError, match=r"posix\.mkdir") as caught:
            mcore2hf(copy, tmp_path / "made")
        assert "\n" not in str(caught.value)
        with pytest.raises(MoetrainError, match=r"posix\.mkdir"):
            workers.run(1, score, str(copy), data, tmp_path / "out.jsonl")
    else:  # what is no weight is not read at all
        mcore2hf(copy, tmp_path / "made")
        assert not list(compare(tmp_path / "made", export))
        workers.run(1, score, str(copy), data, tmp_path / "out.jsonl")
    with pytest.raises(MoetrainError, match=r"posix\.mkdir"):
        workers.run(1, restored, copy, export)
    assert not marker.exists()


def test_an_index_leads_nowhere_else(checkpoint: Path, tmp_path: Path) -> None:
    for change in (
        {"relative_path": "../secret"},
        {"relative_path": "/etc/passwd"},
        {"offset": -1},
        {"length": "9"},
    ):
        found = pickle.loads((checkpoint / ".metadata").read_bytes())
        part = next(iter(found.storage_data.values()))
        for name, value in change.items():
            setattr(part, name, value)
        (tmp_path / ".metadata").write_bytes(pickle.dumps(found))
        with pytest.raises(MoetrainError, match="is no index of a checkpoint"):
            pickles.index_of(tmp_path)
    bomb = b"\x80\x04]r\xff\xff\xff\x7f."  # a list, remembered under a number of 2**31
    for content in (b"", b"junk", bomb, pickle.dumps([1]), pickle.dumps(torch.Size([1]))):
        (tmp_path / ".metadata").write_bytes(content)
        with pytest.raises(MoetrainError):
            pickles.index_of(tmp_path)


def test_a_manifest_knows_its_own_damage(export: Path, tmp_path: Path) -> None:
    path = Path(shutil.copy(export / "manifest.json", tmp_path))
    for place in range(path.stat().st_size):
        flip(path, place, 1 + place % 255)
        os.utime(path, ns=(place, place))
        with pytest.raises(DamageError):
            Manifest.of(tmp_path)
        flip(path, place, 1 + place % 255)


def test_a_large_file_is_checked_by_the_blocks_that_are_read(tmp_path: Path) -> None:
    rows = 3 * BLOCK // 1024
    tensors = {"a": torch.rand(rows, 256), "b": torch.rand(7)}
    save_file(tensors, tmp_path / "model.safetensors")
    manifest.write(tmp_path, manifest.complete(tmp_path, {}))
    path = tmp_path / "model.safetensors"
    size = path.stat().st_size
    for place in (BLOCK + 5, 2 * BLOCK - 1, size - 1):
        flip(path, place)
        row = (place - (size - tensors["a"].nbytes - 28)) // 1024
        for start in range(0, rows, 1024):
            cut = (slice(start, start + 1024), slice(0, 256))
            reader = SafetensorsReader(tmp_path)
            first = size - tensors["a"].nbytes - 28 + start * 1024
            if first // BLOCK <= place // BLOCK <= (first + 1024 * 1024 - 1) // BLOCK:
                with pytest.raises(DamageError, match=WHOLE):
                    reader.read("a", cut)
            else:
                assert not start <= row < start + 1024
                assert torch.equal(reader.read("a", cut), tensors["a"][cut])
        flip(path, place)
    assert torch.equal(SafetensorsReader(tmp_path).read("b", (slice(0, 7),)), tensors["b"])


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_file_that_is_gone_or_not_of_the_folder(export: Path, tmp_path: Path, name: str) -> None:
    copy = Path(shutil.copytree(export, tmp_path / "copy"))
    (copy / name).unlink()
    with pytest.raises(MoetrainError, match=f"{name} is missing"):
        SafetensorsReader(copy)
    shutil.rmtree(copy)
    shutil.copytree(export, copy)
    (copy / "model.safetensors").rename(copy / "other.safetensors")
    (copy / INDEX).write_text('{"weight_map": {}}')
    with pytest.raises(MoetrainError):
        SafetensorsReader(copy)


def test_no_manifest_is_said(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = Path(shutil.copytree(model, model.parent / "said"))
    for _ in range(2):
        reader = SafetensorsReader(copy)
        for name in ("model.norm.weight", "lm_head.weight"):
            reader.read(name, tuple(slice(0, size) for size in reader.shape(name)))
    said = capsys.readouterr().out
    assert said == f"{copy} has no manifest.json: its weights are read as they are\n"


def test_an_export_may_be_read_by_whom_its_folder_may(model: Path, tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        expand(model, tmp_path / "made", every=1)
        exported(model, spec_of("lora", "q_proj"), tmp_path / "adapter")
    finally:
        os.umask(before)
    files = [*(tmp_path / "made").iterdir(), *(tmp_path / "adapter").iterdir()]
    assert {path.stat().st_mode & 0o777 for path in files} == {0o640}


def header(entries: Any, data: bytes = b"", **more: Any) -> bytes:
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + data


def tensor(shape: Any, start: Any, stop: Any, dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


LIES: dict[str, tuple[bytes, str]] = {
    "shape": (header({"a": tensor([9], 0, 8)}, bytes(8)), r"a is F32 \[9\] and has 8 bytes"),
    "negative": (header({"a": tensor([-2, -1], 0, 8)}, bytes(8)), "no whole numbers"),
    "overlap": (header({"a": tensor([2], 0, 8), "b": tensor([2], 4, 12)}, bytes(12)), "overlaps"),
    "gap": (header({"a": tensor([1], 0, 4), "b": tensor([1], 8, 12)}, bytes(12)), "leaves a gap"),
    "tail": (header({"a": tensor([1], 0, 4)}, bytes(9)), "5 bytes follow the last tensor"),
    "short": (header({"a": tensor([2], 0, 8)}, bytes(7)), "truncated, 7 of 8 bytes"),
    "no dtype": (header({"a": {"shape": [1], "data_offsets": [0, 4]}}, bytes(4)), "no dtype"),
    "a list": (header({"a": [1]}, bytes(4)), "no dtype"),
    "dtype a list": (header({"a": tensor([1], 0, 4, ["F32"])}, bytes(4)), "has dtype"),
    "floats": (header({"a": tensor([1.0], 0, 4)}, bytes(4)), "no whole numbers"),
    "true": (header({"a": tensor([True], 0, 4)}, bytes(4)), "no whole numbers"),
    "huge": (header({"a": tensor([10**30], 0, 4)}, bytes(4)), "no whole numbers"),
    "dimensions": (header({"a": tensor([1] * 999, 0, 4)}, bytes(4)), "no whole numbers"),
    "twice": (header(b'{"a": 1, "a": 2}'), "a key twice"),
    "deep": (header(b"[" * 200_000), "nested too deeply"),
    "note": (header({"__metadata__": {"x": 1}}), "no mapping of texts"),
    "digits": (header(b'{"a": ' + b"9" * 5000 + b"}"), "not a whole safetensors"),
    "encoding": (header('{"a": 1}'.encode("utf-16")), "not a whole safetensors"),
}


@pytest.mark.parametrize("case", LIES)
def test_a_header_that_lies(tmp_path: Path, case: str) -> None:
    content, message = LIES[case]
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(WeightsError, match=message) as caught:
        SafetensorsReader(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["x" * 300, "a\0b", "\ud800", "é" * 200])
def test_an_index_with_names_that_no_file_has(tmp_path: Path, name: str) -> None:
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(WeightsError):
        weight_files(tmp_path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("r", float("inf")),
        ("r", 0),
        ("r", "8"),
        ("lora_alpha", float("inf")),
        ("lora_alpha", float("nan")),
        ("lora_alpha", 10**400),
        ("rank_pattern", {"(": 4}),
        ("rank_pattern", {"(a+)+$": 4}),
        ("rank_pattern", {"(?i)q_proj": 4}),  # PEFT puts something before it
        ("alpha_pattern", {"[[a]": 4}),  # a warning beside the error
        ("rank_pattern", [1]),
        ("alpha_pattern", {"q_proj": float("-inf")}),
        ("target_parameters", 5),
        ("target_parameters", ["a", 1]),
    ],
)
def test_an_adapter_config_that_lies(
    tmp_path: Path, key: str, value: Any, recwarn: pytest.WarningsRecorder
) -> None:
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({"peft_type": "LORA", "r": 8, "lora_alpha": 16, key: value}))
    with pytest.raises(WeightsError, match="not a LoRA config") as caught:
        read_config(path)
    assert "\n" not in str(caught.value) and not recwarn.list


@pytest.mark.parametrize(
    "change",
    [
        {"num_hidden_layers": 20_000_000},
        {"num_hidden_layers": 900, "num_experts": 9000},
        {"hidden_size": 10**30},
        {"mlp_only_layers": [[1]]},
        {"rms_norm_eps": float("inf")},
        {"rope_theta": 10**400},
        {"eos_token_id": [{}]},
    ],
)
def test_a_config_that_lies(change: dict[str, Any]) -> None:
    hf = {"architectures": ["Qwen3MoeForCausalLM"], **CONFIGS["qwen3_moe"]} | change
    with pytest.raises(ConfigError, match=next(iter(change)) if len(change) == 1 else "experts"):
        read_model(hf)


@pytest.mark.parametrize("text", ["[]", "[" * 200_000, "1", '"x"'])
def test_a_config_that_is_no_mapping(model: Path, tmp_path: Path, text: str) -> None:
    copy = Path(shutil.copytree(model, tmp_path / "model"))
    (copy / "config.json").write_text(text)
    with pytest.raises(MoetrainError, match=r"config\.json"):
        expand(copy, tmp_path / "made", every=1)


@pytest.mark.parametrize("name", ["generation_config.json", "chat_template.jinja", "vocab.json"])
def test_a_link_out_of_the_folder_is_not_exported(model: Path, tmp_path: Path, name: str) -> None:
    copy = Path(shutil.copytree(model, tmp_path / "model"))
    (tmp_path / "secret").write_text('{"eos_token_id": 5}')
    (copy / name).unlink(missing_ok=True)
    (copy / name).symlink_to(tmp_path / "secret")
    with pytest.raises(WeightsError, match=f"{name} is a link to .*secret, outside"):
        expand(copy, tmp_path / "made", every=1)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("generation_config.json", "[]"),
        ("generation_config.json", "{"),
        ("generation_config.json", "[" * 100_000),
        ("generation_config.json", '{"eos_token_id": "x"}'),
        ("special_tokens_map.json", "3"),
    ],
)
def test_what_an_export_would_meet_in_the_end_is_met_at_the_start(
    tmp_path: Path, name: str, text: str
) -> None:
    shutil.copytree(tokenizer_folder(), tmp_path, dirs_exist_ok=True)
    check_exported(tmp_path)
    (tmp_path / name).write_text(text)
    with pytest.raises(WeightsError, match=f"{re.escape(name)}|eos_token_id") as caught:
        check_exported(tmp_path)
    assert "\n" not in str(caught.value)


def test_weights_may_be_links_to_wherever_they_lie(model: Path, tmp_path: Path) -> None:
    """What is read is read with the user's own rights; an export holds files."""
    copy = Path(shutil.copytree(model, tmp_path / "model"))
    shutil.move(copy / "model.safetensors", tmp_path / "elsewhere")
    (copy / "model.safetensors").symlink_to(tmp_path / "elsewhere")
    expand(copy, tmp_path / "made", every=1)
    assert not any(path.is_symlink() for path in (tmp_path / "made").iterdir())


def test_links_of_the_hubs_cache_and_within_the_folder_are_files(
    model: Path, tmp_path: Path
) -> None:
    snapshot, blobs = tmp_path / "models--a--b/snapshots/1234", tmp_path / "models--a--b/blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted(model.iterdir())):
        shutil.copy(path, blobs / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    expand(snapshot, tmp_path / "made", every=1)
    for name in TOKENIZER:
        copy = tmp_path / "made" / name
        assert copy.read_bytes() == (model / name).read_bytes() and not copy.is_symlink()
