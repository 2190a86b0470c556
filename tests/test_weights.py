"""Reading, writing and comparing Hugging Face weights in one process."""

import json
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from weights_helpers import reader_of, short_files

from moetrain.errors import WeightsError
from moetrain.models import Model, read_model
from moetrain.testing.tiny import CONFIGS, save_model
from moetrain.weights.compare import compare
from moetrain.weights.dtypes import NAMES
from moetrain.weights.folder import INDEX, weight_files
from moetrain.weights.hf_files import Target
from moetrain.weights.reader import RandomReader, SafetensorsReader
from moetrain.weights.side_files import SideFiles
from moetrain.weights.transport import LocalParam, export, load
from moetrain.weights.writer import write_hf

Tiny = Callable[[str], tuple[str, Any]]
HF = CONFIGS["qwen3_moe"]


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def whole(shape: tuple[int, ...]) -> tuple[slice, ...]:
    return tuple(slice(0, size) for size in shape)


def shards_of(hf: dict[str, Any], dtype: torch.dtype = torch.float32) -> list[LocalParam]:
    """All of a model in this process, NaN."""
    return [
        LocalParam(name, torch.full(rule.local_shape(0, 1), torch.nan, dtype=dtype), 0, 1, None)
        for name, rule in read_model(hf).table.items()
    ]


def load_into(local: list[LocalParam], hf: dict[str, Any], folder: Path | None) -> Model:
    model, reader = reader_of(hf, folder)
    load(local, model.table, reader, model)
    return model


def write(
    folder: Path,
    tensors: dict[str, Tensor],
    dtypes: dict[str, str] | None = None,
    **options: Any,
) -> None:
    """As fp32 where `dtypes` says nothing else."""
    targets = [Target(n, (dtypes or {}).get(n, "F32"), tuple(t.shape)) for n, t in tensors.items()]
    given: dict[str, Any] = {"side_files": SideFiles(), "config": {}}
    write_hf(tensors.items(), targets, folder, **given | options)


# Reading


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
@pytest.mark.parametrize("fused", [False, True], ids=["apart", "fused"])
@pytest.mark.parametrize("size", ["1GB", "60KB"], ids=["single", "sharded"])
def test_a_slice_is_a_slice(
    tiny: Tiny, tmp_path: Path, family: str, fused: bool, size: str
) -> None:
    """However the folder is laid out, every name has the values of the single per-expert file."""
    folder, model = tiny(family)
    model.save_pretrained(tmp_path, max_shard_size=size, save_original_format=not fused)
    assert (tmp_path / INDEX).exists() == (size == "60KB")
    other = "tokenizer" if size == "60KB" else "consolidated"  # without an index vLLM reads all
    (tmp_path / f"{other}.safetensors").write_text("not ours")
    expected = load_file(Path(folder) / "model.safetensors")
    _, reader = reader_of(config_of(tmp_path), tmp_path)
    assert set(reader.names()) == set(expected)
    for name, tensor in expected.items():
        assert reader.shape(name) == tuple(tensor.shape)
        assert reader.dtype(name) == tensor.dtype
        cut = tuple(slice(size // 3, size - size // 4) for size in tensor.shape)
        assert torch.equal(reader.read(name, cut), tensor[cut]), name
        nothing = (slice(0, 0), *cut[1:])
        assert reader.read(name, nothing).shape == tensor[nothing].shape


def test_a_slice_costs_no_more_memory_than_itself(tmp_path: Path) -> None:
    rows, columns = 65536, 2048  # 512 MiB, sparse on disk
    size = rows * columns * 4
    header = json.dumps(
        {"x": {"dtype": "F32", "shape": [rows, columns], "data_offsets": [0, size]}}
    )
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header.encode())
        file.truncate(8 + len(header) + size)
    code = """
import sys, torch
from pathlib import Path
from moetrain.engine.device import memory_gib
from moetrain.weights.reader import SafetensorsReader
def mib(): return memory_gib(torch.device('cpu')) * 1024
reader = SafetensorsReader(Path(sys.argv[1]))
reader.read("x", (slice(0, 1), slice(0, 1)))
before = mib()
a = reader.read("x", (slice(40000, 48192), slice(0, 2048)))  # 64 MiB
b = reader.read("x", (slice(0, 65536), slice(512, 768)))  # 64 MiB
assert a.sum() == 0 and b.sum() == 0
print(mib() - before)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert float(done.stdout.splitlines()[-1]) < 160


def _index(folder: Path, file: str) -> None:
    (folder / "model.safetensors").unlink()
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": file}}))


def _text(name: str, content: str) -> Callable[[Path], None]:
    def write_it(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        (folder / name).write_text(content)

    return write_it


def _truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def _promise(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "one.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": {"b": "one.safetensors"}}))


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "folder missing": (shutil.rmtree, "neither"),
    "folder empty": (lambda f: (f / "model.safetensors").unlink(), "neither"),
    "truncated": (_truncate, "truncated"),
    "shard missing": (lambda f: _index(f, "two.safetensors"), "1 of 1 shards are missing: two"),
    "up and away": (lambda f: _index(f, "../two.safetensors"), "outside the folder"),
    "absolute": (lambda f: _index(f, "/etc/passwd"), "outside the folder"),
    "the folder above": (lambda f: _index(f, ".."), "outside the folder"),
    "promise not kept": (_promise, "promises b"),
    "index no JSON": (_text(INDEX, "{"), "not a safetensors index"),
    "index a list": (_text(INDEX, "[]"), "not a safetensors index"),
    "map a list": (_text(INDEX, '{"weight_map": []}'), "not a safetensors index"),
    "file a number": (_text(INDEX, '{"weight_map": {"a": 3}}'), "not a safetensors index"),
    "empty file": (_text("model.safetensors", ""), "not a whole safetensors file"),
    "web page": (_text("model.safetensors", "<!DOCTYPE html><html>"), "not a whole safetensors"),
    "LFS pointer": (
        _text("model.safetensors", "version https://git-lfs.github.com/spec/v1\n"),
        "git lfs pull",
    ),
    "header a list": (
        lambda f: (f / "model.safetensors").write_bytes(struct.pack("<Q", 3) + b"[1]"),
        "not a whole safetensors file",
    ),
    "quantised": (
        lambda f: save_file({"a": torch.zeros(2, dtype=torch.uint32)}, f / "model.safetensors"),
        "a has dtype U32",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_folder_is_one_line(tmp_path: Path, case: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"a": torch.zeros(3)}, folder / "model.safetensors")
    damage, message = BROKEN[case]
    damage(folder)
    with pytest.raises(WeightsError, match=message) as caught:
        SafetensorsReader(folder)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


TWO_SETS = r"holds two sets of weights, model.safetensors and "


def _two_shards(folder: Path, *lost: str) -> None:
    """The folder's weights once more, in shards with an index, less some files."""
    names = [f"model-{n}-of-00002.safetensors" for n in ("00001", "00002")]
    for key, name in zip("ab", names, strict=True):
        save_file({key: torch.ones(3)}, folder / name)
    places = dict(zip("ab", names, strict=True))
    (folder / INDEX).write_text(json.dumps({"weight_map": places}))
    for name in lost:
        (folder / name).unlink()


def _saved_twice(folder: Path, *sizes: str) -> None:
    """What transformers 5 leaves in a folder that it saves into again."""
    (folder / "model.safetensors").unlink()
    for size in sizes:
        save_model("llama", folder).save_pretrained(folder, max_shard_size=size)


FIRST, SECOND = (f"model-{n}-of-00002.safetensors" for n in ("00001", "00002"))
BOTH: dict[str, tuple[Callable[[Path], object], str]] = {
    "index beside it": (_two_shards, rf"{INDEX}; .* Remove .*, or {INDEX} and its shards"),
    "one shard gone": (
        lambda f: _two_shards(f, FIRST),
        rf"{INDEX}, of whose 2 shards 1 are gone; .*, or {INDEX} and its shards",
    ),
    "stale index": (
        lambda f: _two_shards(f, FIRST, SECOND),
        rf"{INDEX}, of whose 2 shards 2 are gone; .* Remove model.safetensors, or {INDEX}: ",
    ),
    "shards without an index": (
        lambda f: _two_shards(f, INDEX),
        rf"{FIRST}, {SECOND}, which no index names; ",
    ),
    "transformers, then in shards": (lambda f: _saved_twice(f, "1GB", "60KB"), f"{INDEX}; "),
}


@pytest.mark.parametrize("case", BOTH)
def test_two_sets_of_weights_in_one_folder_are_refused(tmp_path: Path, case: str) -> None:
    """By what loads, and by what only asks which files there are."""
    save_file({"a": torch.zeros(3)}, tmp_path / "model.safetensors")
    make, message = BOTH[case]
    make(tmp_path)
    for reads in (SafetensorsReader, weight_files):
        with pytest.raises(WeightsError, match=TWO_SETS + message) as caught:
            reads(tmp_path)
        assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def _beside(name: str, tensor: str = "a") -> Callable[[Path], object]:
    return lambda folder: save_file({tensor: torch.ones(3)}, folder / name)


def _named(value: str) -> Callable[[Path], object]:
    return lambda f: (f / "config.json").write_text(json.dumps({"transformers_weights": value}))


THEIRS = "layers.0.attention.wq.weight"  # as Mistral's own format names it
# What transformers 5.19 and vLLM 0.32 read of it; None: both the same, or the same weights.
READ: dict[str, tuple[Callable[[Path], object], str | None]] = {
    "another": (_beside("extra.safetensors"), r"extra\.safetensors beside model\.safetensors"),
    "another part": (_beside("model.fp16.safetensors", "b"), "Move model.fp16.safetensors to"),
    "Mistral's format": (_beside("consolidated.safetensors", THEIRS), None),
    "consolidated": (_beside("consolidated.00.safetensors"), r"a stands in consolidated\.00\."),
    "not fetched": (
        lambda f: (f / "consolidated.safetensors").write_text("version https://git-lfs\n"),
        None,
    ),
    "named": (_named("extra.safetensors"), r"config\.json says transformers_weights='extra\."),
    "named as it is": (_named("model.safetensors"), None),
}


@pytest.mark.parametrize("case", READ)
def test_a_file_that_some_programs_read_is_refused(tmp_path: Path, case: str) -> None:
    """Beside a single file; beside shards vLLM, too, takes what their index names."""
    make, message = READ[case]
    for place in ("single", "shards"):
        folder = tmp_path / place
        folder.mkdir()
        save_file({"a": torch.zeros(3)}, folder / "model.safetensors")
        if place == "shards":
            _two_shards(folder, "model.safetensors")
        make(folder)
        same = message is None or (place == "shards" and case.startswith("another"))
        if place == "shards" and case == "named as it is":
            same, message = False, "reads in place of model.safetensors.index.json"
        for reads in (SafetensorsReader, weight_files):
            if same:
                reads(folder)
                continue
            with pytest.raises(WeightsError, match=message) as caught:
                reads(folder)
            assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


def test_an_index_of_the_single_file_is_no_second_set(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(3)}, tmp_path / "model.safetensors")
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": "model.safetensors"}}))
    assert list(SafetensorsReader(tmp_path).names()) == ["a"]


def test_an_adapter_beside_a_model_is_refused(tmp_path: Path) -> None:
    """transformers 5 reads the model with the adapter in it."""
    save_file({"a": torch.zeros(3)}, tmp_path / "model.safetensors")
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(WeightsError, match=r"holds an adapter .* beside a model"):
        SafetensorsReader(tmp_path)


def test_a_tensor_in_two_shards_is_refused_and_one_the_index_forgot_is_read(
    tmp_path: Path,
) -> None:
    """transformers and vLLM read all that is in the files that an index names."""
    _two_shards(tmp_path)
    save_file({"a": torch.ones(3), "c": torch.ones(3)}, tmp_path / FIRST)
    assert sorted(SafetensorsReader(tmp_path).names()) == ["a", "b", "c"]
    save_file({"a": torch.zeros(3), "b": torch.ones(3)}, tmp_path / SECOND)
    with pytest.raises(WeightsError, match=f"{FIRST} and {SECOND} both hold a"):
        SafetensorsReader(tmp_path)


def test_experts_that_are_there_twice_are_refused(tiny: Tiny, tmp_path: Path) -> None:
    tiny("qwen3_moe")[1].save_pretrained(tmp_path, save_original_format=False)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.2.mlp.experts.3.up_proj.weight"
    save_file(tensors | {name: torch.zeros(28, 48)}, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match=rf"experts.gate_up_proj and {name}, two tensors"):
        reader_of(HF, tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tied_models_own_head_is_its_embedding_or_refused(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    """transformers 5.19 takes such a head, with a warning, and so does vLLM 0.32."""
    save_model("qwen3", tmp_path)
    hf = config_of(tmp_path)
    assert hf["tie_word_embeddings"] is True
    tensors = load_file(tmp_path / "model.safetensors")
    if dtype is torch.bfloat16:  # exact in both
        tensors = {name: tensor.bfloat16().float() for name, tensor in tensors.items()}
    head = tensors["model.embed_tokens.weight"].to(dtype, copy=True)
    save_file(tensors | {"lm_head.weight": head}, tmp_path / "model.safetensors")
    load_into(shards_of(hf), hf, tmp_path)
    head[-1, -1] += 0.5
    save_file(tensors | {"lm_head.weight": head}, tmp_path / "model.safetensors")
    local = shards_of(hf)
    with pytest.raises(WeightsError, match=r"tie_word_embeddings, and lm_head\.weight is") as no:
        load_into(local, hf, tmp_path)
    assert "Set tie_word_embeddings to false" in str(no.value) and "\n" not in str(no.value)
    assert all(param.tensor.isnan().all() for param in local), "half loaded"
    untied = hf | {"tie_word_embeddings": False}
    if dtype is torch.float32:
        load_into(shards_of(untied), untied, tmp_path)


@pytest.mark.parametrize("experts", [4, 8])
def test_fused_experts_are_counted(tiny: Tiny, tmp_path: Path, experts: int) -> None:
    """Six of a model of eight would load without a word, were only their names looked at."""
    tiny("qwen3_moe")[1].save_pretrained(tmp_path, save_original_format=False)
    with pytest.raises(WeightsError, match=rf"\[6, .* asks for {experts} experts"):
        load_into([], HF | {"num_experts": experts}, tmp_path)


def _added(name: str) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.update({name: torch.zeros(2)})


def _grown(tensors: dict[str, Tensor]) -> None:
    tensors["model.embed_tokens.weight"] = torch.zeros(208, 48)


ROTARY = "model.layers.1.self_attn.rotary_emb.inv_freq"
FREQUENCIES = 1e4 ** -(torch.arange(4) / 4)  # head_dim 8


LEFT: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str | None]] = {
    "nothing": (lambda tensors: None, None),
    "a rotary buffer": (lambda t: t.update({ROTARY: FREQUENCIES.half()}), None),
    "another rotation": (
        lambda t: t.update({ROTARY: 1e6 ** -(torch.arange(4) / 4)}),
        "inv_freq is of rope_theta 1e.06, config.json asks for 4 frequencies of rope_theta 10000",
    ),
    "a rotary buffer of another size": (_added(ROTARY), r"inv_freq is \[2\]"),
    "an unknown tensor": (_added("model.extra"), "1 tensors belong to no .*model.extra"),
    "a layer too many": (_added("model.layers.4.input_layernorm.weight"), "belong to no"),
    "a tensor missing": (lambda t: t.pop("model.norm.weight"), "1 of .* missing: model.norm"),
    "another vocabulary": (_grown, r"embed_tokens.weight is \[208, 48\].* \[200, 48\].*vocab_size"),
}


@pytest.mark.parametrize("case", LEFT)
def test_every_tensor_has_its_parameter(tiny: Tiny, tmp_path: Path, case: str) -> None:
    tensors = load_file(Path(tiny("qwen3_moe")[0]) / "model.safetensors")
    change, message = LEFT[case]
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    local = shards_of(HF)
    if message is None:
        load_into(local, HF, tmp_path)
        assert not any(param.tensor.isnan().any() for param in local)
        return
    with pytest.raises(WeightsError, match=message) as caught:
        load_into(local, HF, tmp_path)
    assert "\n" not in str(caught.value)
    assert all(param.tensor.isnan().all() for param in local), "half loaded"


def test_every_shard_has_its_rule() -> None:
    good = shards_of(HF)
    one = good[0]
    with pytest.raises(WeightsError, match=r"No rule for decoder\.new"):
        load_into([*good, LocalParam("decoder.new", one.tensor, 0, 1, None)], HF, None)
    with pytest.raises(WeightsError, match=rf"{one.name}: on this rank more than once"):
        load_into([*good, one], HF, None)
    wider = torch.zeros(2, *one.tensor.shape)  # copy_ would broadcast into it
    with pytest.raises(WeightsError, match=rf"{one.name} is \[2, .* its rule asks for \["):
        load_into([LocalParam(one.name, wider, 0, 1, None)], HF, None)
    with pytest.raises(WeightsError, match=f"No rank holds {one.name}"):
        list(export(good[1:], read_model(HF).table, to="all"))


# Made from scratch


def test_random_weights_depend_on_seed_and_name_alone() -> None:
    model = read_model(HF | {"hidden_size": 512})
    reader, other = RandomReader(model, 1, 0.02), RandomReader(model, 2, 0.02)
    q, k = (f"model.layers.0.self_attn.{name}_proj.weight" for name in "qk")
    full = reader.read(q, whole(reader.shape(q)))
    cut = (slice(5, 9), slice(100, 200))
    assert torch.equal(reader.read(q, cut), full[cut])
    assert torch.equal(RandomReader(model, 1, 0.02).read(q, cut), full[cut])
    assert not torch.equal(other.read(q, cut), full[cut])
    assert not torch.equal(reader.read(k, cut), full[cut])
    assert full.dtype == torch.float32
    assert abs(full.mean()) < 0.001 and abs(full.std() - 0.02) < 0.001
    for name in reader.names():
        if name.endswith("norm.weight"):
            assert (reader.read(name, whole(reader.shape(name))) == 1).all()


def test_random_weights_load_rounded_once() -> None:
    """bf16 shards hold the fp32 values rounded."""
    exact, rounded = shards_of(HF), shards_of(HF, torch.bfloat16)
    load_into(exact, HF, None)
    load_into(rounded, HF, None)
    for a, b in zip(exact, rounded, strict=True):
        assert torch.equal(a.tensor.bfloat16(), b.tensor), a.name


# Writing

BESIDE = {
    "tokenizer.json": "{}",
    "chat_template.jinja": "{{ messages }}",
    "generation_config.json": '{"max_length": 5}',
}


@pytest.mark.parametrize("shard_bytes", [10**9, 60_000], ids=["single", "sharded"])
def test_transformers_loads_what_is_written(tiny: Tiny, tmp_path: Path, shard_bytes: int) -> None:
    from transformers import AutoModelForCausalLM

    source = tmp_path / "source"
    shutil.copytree(tiny("qwen3_moe")[0], source)
    for name, text in BESIDE.items():
        (source / name).write_text(text)
    (source / "optimizer.bin").write_text("not this")
    hf = config_of(source)
    local = shards_of(hf)
    model = load_into(local, hf, source)
    out = tmp_path / "deep" / "out"
    tensors = dict(export(local, model.table, to="owner"))
    write(out, tensors, side_files=SideFiles.of(source), config=hf, shard_bytes=shard_bytes)

    files = sorted(path.name for path in out.glob("*.safetensors"))
    if shard_bytes == 10**9:
        assert files == ["model.safetensors"] and not (out / INDEX).exists()
    else:
        num = len(files)
        assert num > 2
        assert files == [f"model-{i:05d}-of-{num:05d}.safetensors" for i in range(1, num + 1)]
        index = json.loads((out / INDEX).read_text())
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
        assert set(index["weight_map"]) == set(tensors)
        for file in files:
            held = load_file(out / file)
            assert len(held) == 1 or sum(t.nbytes for t in held.values()) <= shard_bytes
    assert {name: (out / name).read_text() for name in BESIDE} == BESIDE
    assert config_of(out) == hf and not (out / "optimizer.bin").exists()
    assert list(compare(source, out)) == []

    tokens = torch.arange(24).reshape(2, 12)
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        out, dtype=torch.float32, output_loading_info=True
    )
    model, info = loaded
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)(tokens).logits
        assert torch.equal(model(tokens).logits, expected)


def test_each_tensor_has_its_own_dtype(tmp_path: Path) -> None:
    values = torch.tensor([1.0, 1.00390625])  # the second is no bf16 number
    dtypes = {"a": torch.bfloat16, "b": torch.float32, "c": torch.float16}
    write(tmp_path / "out", dict.fromkeys("abc", values), {n: NAMES[d] for n, d in dtypes.items()})
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert {n: t.dtype for n, t in found.items()} == dtypes
    assert torch.equal(found["a"], values.bfloat16()) and torch.equal(found["b"], values)


def test_a_yielded_tensor_may_be_reused(tmp_path: Path) -> None:
    buffer = torch.zeros(4)
    write_hf(
        ((str(i), buffer.fill_(i)) for i in range(3)),
        [Target(str(i), "F32", (4,)) for i in range(3)],
        tmp_path / "out",
        side_files=SideFiles(),
        config={},
    )
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert [found[str(i)][0].item() for i in range(3)] == [0, 1, 2]


def test_what_cannot_be_written_leaves_the_old(tmp_path: Path) -> None:
    out = tmp_path / "out"
    write(out, {"a": torch.ones(4)})
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    big = {"a": torch.zeros(4000), "b": torch.zeros(40_000)}
    with (
        short_files(20_000),  # the first shard goes through, the second does not
        pytest.raises(WeightsError, match=r"^Writing .*File too large.*untouched") as caught,
    ):
        write(out, big, shard_bytes=16_000)
    assert "\n" not in str(caught.value)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    write(out, big, shard_bytes=16_000)  # and now it can
    assert sorted(path.name for path in out.glob("*.safetensors")) == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]


def test_weights_that_stop_short_leave_nothing(tmp_path: Path) -> None:
    def stops() -> Iterator[tuple[str, Tensor]]:
        yield "a", torch.zeros(4)
        raise WeightsError("the rest is not to be had")

    with pytest.raises(WeightsError, match="not to be had"):
        write_hf(
            stops(),
            [Target("a", "F32", (4,))],
            tmp_path / "out",
            side_files=SideFiles(),
            config={},
        )
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(WeightsError, match="Not a directory"):
        write(tmp_path / "file" / "out", {"a": torch.zeros(4)})


def test_a_full_disk(tmp_path: Path) -> None:
    """A real one: a tmpfs of 1 MiB in a mount namespace of its own."""
    code = f"""
import torch
from pathlib import Path
from moetrain.errors import WeightsError
from moetrain.weights.hf_files import Target
from moetrain.weights.side_files import SideFiles
from moetrain.weights.writer import write_hf
def write(n):
    write_hf([("a", torch.ones(n))], [Target("a", "F32", (n,))], Path("{tmp_path}/out"),
             side_files=SideFiles(), config={{}})
write(100)
try:
    write(1_000_000)
except WeightsError as error:
    print(error)
from safetensors.torch import load_file
print(load_file("{tmp_path}/out/model.safetensors")["a"].shape, *Path("{tmp_path}").iterdir())
"""
    unshare = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    try:
        subprocess.run(
            [*unshare, f"mount -t tmpfs none {tmp_path}"], capture_output=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no mount namespaces here: a full disk stays unproven, a file limit does not")
    inside = f'mount -t tmpfs -o size=1m none {tmp_path} && exec {sys.executable} -c "$CODE"'
    done = subprocess.run(
        [*unshare, inside], env={"CODE": code}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    message, rest = done.stdout.splitlines()
    assert "no space left on the disk" in message
    assert rest == f"torch.Size([100]) {tmp_path}/out"


# Comparing


def test_every_kind_of_difference_is_listed(tmp_path: Path) -> None:
    a = {
        "same": torch.tensor([torch.nan, 0.0]),
        "gone": torch.zeros(2),
        "shape": torch.zeros(2, 3),
        "dtype": torch.zeros(2),
        "value": torch.tensor([1.0, 2.0, 3.0, 4.0]),
        "sign": torch.tensor([0.0, 1.0]),
        "float8": torch.ones(2).to(torch.float8_e4m3fn),
        "scalar": torch.tensor(1.0),
        "empty": torch.zeros(0, 3),
    }
    b = dict(a)
    del b["gone"]
    b |= {"new": torch.zeros(1), "shape": torch.zeros(3, 2), "dtype": torch.zeros(2).bfloat16()}
    b |= {"value": torch.tensor([1.0, 2.5, 3.0, 4.0]), "sign": torch.tensor([-0.0, 1.0])}
    b |= {"float8": torch.tensor([1.0, 2.0]).to(torch.float8_e4m3fn), "scalar": torch.tensor(2.0)}
    write(tmp_path / "a", a, dtypes={n: NAMES[t.dtype] for n, t in a.items()})
    write(tmp_path / "b", b, dtypes={n: NAMES[t.dtype] for n, t in b.items()}, shard_bytes=20)
    found = {d.name: d.reason for d in compare(tmp_path / "a", tmp_path / "b")}
    assert found == {
        "gone": f"only in {tmp_path}/a",
        "new": f"only in {tmp_path}/b",
        "shape": "shape [2, 3] against [3, 2]",
        "dtype": "F32 against BF16",
        "value": "25.00% of values differ, by up to 0.5, the first at [1]",
        "sign": "50.00% of values differ, by up to 0, the first at [0]",
        "float8": "50.00% of values differ, by up to 1, the first at [1]",
        "scalar": "100.00% of values differ, by up to 1, the first at []",
    }


def test_fused_and_apart_are_the_same_weights(tiny: Tiny, tmp_path: Path) -> None:
    folder, model = tiny("mixtral")
    model.save_pretrained(tmp_path, save_original_format=False)
    assert list(compare(Path(folder), tmp_path)) == []
    assert list(compare(tmp_path, Path(folder))) == []


def test_what_no_parameter_is_made_of_may_be_missing(tmp_path: Path) -> None:
    """An old tied checkpoint with its head and its rotary buffers, and what comes back of it."""
    a, b = tmp_path / "a", tmp_path / "b"
    save_model("llama", a, tie_word_embeddings=True)
    shutil.copytree(a, b)
    tensors = load_file(a / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(tensors, a / "model.safetensors")
    assert list(compare(a, b)) == [] and list(compare(b, a)) == []
    tensors["lm_head.weight"] += 1
    save_file(tensors, b / "model.safetensors")
    assert [difference.name for difference in compare(a, b)] == ["lm_head.weight"]


@pytest.mark.parametrize("says_tied", [False, True], ids=["untied", "says tied"])
def test_a_head_is_compared_with_the_embedding_that_stands_for_it(
    tmp_path: Path, says_tied: bool
) -> None:
    """`convert verify` called a tied model equal to one with another head."""
    a, b = tmp_path / "a", tmp_path / "b"
    save_model("llama", a, tie_word_embeddings=True)
    shutil.copytree(a, b)
    tensors = load_file(a / "model.safetensors")
    head = tensors["model.embed_tokens.weight"].clone()
    (b / "config.json").write_text(json.dumps(config_of(b) | {"tie_word_embeddings": says_tied}))
    save_file(tensors | {"lm_head.weight": head}, b / "model.safetensors")
    assert list(compare(a, b)) == [] and list(compare(b, a)) == []
    head[0] += 1
    save_file(tensors | {"lm_head.weight": head}, b / "model.safetensors")
    for pair in ((a, b), (b, a)):
        assert [difference.name for difference in compare(*pair)] == ["lm_head.weight"]
