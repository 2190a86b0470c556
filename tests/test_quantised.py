"""Quantised checkpoints: read as plain ones, slice by slice."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from moetrain.errors import ConfigError, WeightsError
from moetrain.models import read_model
from moetrain.models.lookup import config_of
from moetrain.models.quantisation import read_quantisation
from moetrain.testing.tiny import CONFIGS, save_model
from moetrain.weights.dequantised import open_weights

BLOCKS = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
FP8 = torch.float8_e4m3fn
# What 4 bits stand for, as the format's paper lists it (e2m1: sign, exponent, exponent, mantissa).
NVFP4 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def compressed(**weights: Any) -> dict[str, Any]:
    group = {"weights": {"type": "float", "num_bits": 8, "symmetric": True} | weights}
    return {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}}


def modelopt(algorithm: str) -> dict[str, Any]:
    return {"quant_method": "modelopt", "quant_algo": algorithm}


def by_hand(weight: Tensor, scales: Tensor, rows: int, columns: int) -> Tensor:
    """One block after another."""
    wanted = torch.full(weight.shape, torch.nan)
    for i, own in enumerate(scales.tolist()):
        for j, scale in enumerate(own):
            cut = (slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns))
            wanted[cut] = weight[cut].float() * torch.tensor(scale)
    assert not wanted.isnan().any()
    return wanted.bfloat16()


def folder_of(path: Path, tensors: dict[str, Tensor], config: dict[str, Any] | None) -> Path:
    path.mkdir(exist_ok=True)
    save_file(tensors, path / "model.safetensors")
    hf = {} if config is None else {"quantization_config": config}
    (path / "config.json").write_text(json.dumps(hf))
    return path


@pytest.mark.parametrize(
    ("shape", "scales", "config", "suffix", "block"),
    [
        ([576, 7168], [5, 56], BLOCKS, "_scale_inv", (128, 128)),
        ([200, 300], [4, 10], BLOCKS | {"weight_block_size": [64, 32]}, "_scale_inv", (64, 32)),
        ([100, 300], [1, 3], BLOCKS, "_scale_inv", (128, 128)),
        ([300, 130], [1], BLOCKS | {"weight_block_size": None}, "_scale", (300, 130)),
        ([300, 130], [], modelopt("FP8"), "_scale", (300, 130)),
        ([300, 130], [300], modelopt("FP8_PER_CHANNEL_PER_TOKEN"), "_scale", (1, 130)),
        ([300, 130], [3, 1, 2, 1], modelopt("fp8_pb_wo"), "_scale", (128, 128)),
        ([300, 130], [1], compressed(strategy="tensor"), "_scale", (300, 130)),
        ([300, 130], [300, 1], compressed(strategy="channel"), "_scale", (1, 130)),
        (
            [300, 130],
            [3, 2],
            compressed(strategy="block", block_structure=[128, 128]),
            "_scale",
            (128, 128),
        ),
    ],
    ids=lambda value: str(value.get("quant_method")) if isinstance(value, dict) else None,
)
def test_any_slice_of_an_fp8_weight_is_that_of_the_plain_one(
    tmp_path: Path,
    shape: list[int],
    scales: list[int],
    config: dict[str, Any],
    suffix: str,
    block: tuple[int, int],
) -> None:
    torch.manual_seed(0)
    weight, scale = torch.randn(shape).to(FP8), torch.rand(scales) + 0.1
    other = torch.randn(7)
    tensors = {"a.weight": weight, "a.weight" + suffix: scale, "a.bias": other}
    tensors["a.input_scale"] = torch.tensor(0.5)
    reader = open_weights(folder_of(tmp_path, tensors, config))
    assert set(reader.names()) == {"a.weight", "a.bias"}
    assert reader.shape("a.weight") == tuple(shape) and reader.dtype("a.weight") == torch.bfloat16
    counts = [-(-n // b) for n, b in zip(shape, block, strict=True)]
    wanted = by_hand(weight, scale.reshape(counts), *block)
    rows, columns = shape
    for cut in [
        (slice(0, rows), slice(0, columns)),
        (slice(rows // 2 - 20, rows - 1), slice(columns // 3, columns // 3 + 40)),
        (slice(rows - 1, rows), slice(0, columns)),
        (slice(5, 5), slice(0, 3)),
    ]:
        assert torch.equal(reader.read("a.weight", cut), wanted[cut]), cut
    assert torch.equal(reader.read("a.bias", (slice(2, 5),)), other[2:5])


def test_any_slice_of_an_nvfp4_weight(tmp_path: Path) -> None:
    """As ModelOpt writes it: two numbers in a byte, the first in its low half."""
    torch.manual_seed(0)
    codes = torch.randint(0, 16, (40, 64))
    scale, top = (torch.rand(40, 4) + 0.5).to(FP8), torch.tensor(0.25)
    packed = (codes[:, 0::2] | codes[:, 1::2] << 4).to(torch.uint8)
    names = {"a.weight": packed, "a.weight_scale": scale, "a.weight_scale_2": top}
    reader = open_weights(folder_of(tmp_path, names, modelopt("NVFP4")))
    assert set(reader.names()) == {"a.weight"} and reader.shape("a.weight") == (40, 64)
    wanted = torch.empty(40, 64)
    for i in range(40):
        for j in range(64):
            code = int(codes[i, j])
            value = NVFP4[code & 7] * (-1 if code & 8 else 1)
            wanted[i, j] = value * (float(scale[i, j // 16]) * 0.25)
    for cut in [(slice(0, 40), slice(0, 64)), (slice(3, 9), slice(17, 50)), (slice(2, 2),) * 2]:
        assert torch.equal(reader.read("a.weight", cut), wanted[cut].bfloat16()), cut
    for wrong in (torch.ones(2), torch.ones(0)):
        folder_of(tmp_path, names | {"a.weight_scale_2": wrong}, modelopt("NVFP4"))
        with pytest.raises(WeightsError, match=r"a.weight_scale_2 is .*, and one number is wanted"):
            open_weights(tmp_path)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"quant_method": "gptq", "bits": 4}, 'quant_method": "gptq".* not read here.*made from'),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
        (BLOCKS | {"weight_block_size": [128]}, "weight_block_size"),
        (BLOCKS | {"weight_block_size": [128, 0]}, "weight_block_size"),
        (compressed(strategy="tensor", num_bits=4), "num_bits"),
        (compressed(strategy="group", group_size=128), "group"),
        (compressed(strategy="tensor", type="int"), "int"),
        (modelopt("W4A16_AWQ"), "W4A16_AWQ"),
        ({"quant_method": "compressed-tensors", "config_groups": None}, "compressed"),
        ("fp8", "fp8"),
    ],
)
def test_what_is_not_read_is_refused_in_one_line(config: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        read_quantisation({"quantization_config": config})
    assert "\n" not in str(caught.value) and "allowed: FP8" in str(caught.value)


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"a.weight": torch.zeros(130, 2)}, "a.weight_scale_inv is not there"),
        (
            {"a.weight": torch.zeros(130, 2), "a.weight_scale_inv": torch.ones(1, 1)},
            r"a.weight_scale_inv is \[1, 1\], which is not FP8 in blocks of 128 x 128 of",
        ),
        (
            {"a.weight": torch.zeros(100, 2), "a.weight_scale_inv": torch.ones(0)},
            r"a.weight_scale_inv is \[0\]",
        ),
        (
            {"a.weight": torch.zeros(0, 2), "a.weight_scale_inv": torch.ones(3)},
            r"a.weight_scale_inv is \[3\]",
        ),
        (
            {"a.weight": torch.zeros(2, 3, 4), "a.weight_scale_inv": torch.ones(2, 1, 1)},
            r"\[2, 3, 4\]; only matrices",
        ),
    ],
    ids=["no scales", "too few scales", "empty scales", "no rows", "no matrix"],
)
def test_scales_that_do_not_fit(tmp_path: Path, tensors: dict[str, Tensor], words: str) -> None:
    tensors = tensors | {"a.weight": tensors["a.weight"].to(FP8)}
    with pytest.raises(WeightsError, match=words):
        open_weights(folder_of(tmp_path, tensors, BLOCKS))


def test_fp8_without_a_word_of_what_it_stands_for_is_no_model(tmp_path: Path) -> None:
    """It was read as its bare numbers, silently."""
    save_model("qwen3", tmp_path, num_hidden_layers=1)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.mlp.down_proj.weight"
    save_file(tensors | {name: tensors[name].to(FP8)}, tmp_path / "model.safetensors")
    hf, _ = config_of(tmp_path)
    with pytest.raises(WeightsError, match=f"{name} is torch.float8_e4m3fn and config.json has no"):
        open_weights(tmp_path, read_model(hf))


@pytest.fixture(scope="module")
def quantised(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(a tiny model in FP8 blocks of 32 x 16, which divide few of its weights; in bf16)."""
    fp8, plain = (tmp_path_factory.mktemp(name) for name in ("fp8", "plain"))
    save_model("qwen3_moe", plain, num_hidden_layers=2)
    hf = json.loads((plain / "config.json").read_text()) | {"dtype": "bfloat16"}
    stored: dict[str, Tensor] = {}
    expected: dict[str, Tensor] = {}
    for name, tensor in load_file(plain / "model.safetensors").items():
        stored[name] = expected[name] = tensor.bfloat16()
        if "proj" not in name:
            continue
        scale = torch.rand(-(-tensor.shape[0] // 32), -(-tensor.shape[1] // 16)) + 0.5
        stored |= {name: tensor.to(FP8), name + "_scale_inv": scale}
        expected[name] = by_hand(stored[name], scale, 32, 16)
    save_file(expected, plain / "model.safetensors")
    (plain / "config.json").write_text(json.dumps(hf))
    save_file(stored, fp8 / "model.safetensors")
    config = {"quantization_config": BLOCKS | {"weight_block_size": [32, 16]}}
    (fp8 / "config.json").write_text(json.dumps(hf | config))
    return fp8, plain


def test_a_quantised_model_is_converted_as_the_plain_one(
    quantised: tuple[Path, Path], tmp_path: Path
) -> None:
    """There and back it is the plain model; its config.json says nothing of quantisation."""
    from moetrain.weights.convert import hf2mcore, mcore2hf
    from moetrain.weights.inspect import summary_of

    fp8, plain = quantised
    hf2mcore(fp8, tmp_path / "mcore")
    mcore2hf(tmp_path / "mcore", tmp_path / "hf")
    assert "quantization_config" not in json.loads((tmp_path / "hf/config.json").read_text())
    assert summary_of(fp8).parameters == summary_of(plain).parameters  # scales are none
    found, wanted = (load_file(f / "model.safetensors") for f in (tmp_path / "hf", plain))
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def test_a_quantised_model_is_trained_as_the_plain_one(
    quantised: tuple[Path, Path], tmp_path: Path
) -> None:
    """What the engine loads of it, and would export; the doctor finds nothing wrong."""
    from moetrain.cluster.doctor import files
    from moetrain.cluster.doctor.base import Level, Planned, Subject
    from moetrain.engine import Engine
    from moetrain.engine.on_disk import recipe_for

    fp8, plain = quantised
    recipe = recipe_for(str(fp8), tmp_path)
    assert recipe.model.dtype == "bf16"
    engine = Engine(recipe, train=False)
    engine.export_hf(tmp_path / "hf")
    engine.close()
    assert "quantization_config" not in json.loads((tmp_path / "hf/config.json").read_text())
    found, wanted = (load_file(f / "model.safetensors") for f in (tmp_path / "hf", plain))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
    assert files.model(Subject(Planned(recipe, 1))).level is Level.OK


def test_a_quantised_model_is_made_deeper(quantised: tuple[Path, Path], tmp_path: Path) -> None:
    from moetrain.weights.derived import expand

    fp8, plain = quantised
    expand(fp8, tmp_path / "fp8", 2)
    expand(plain, tmp_path / "plain", 2)
    found, wanted = (
        (tmp_path / name / "model.safetensors").read_bytes() for name in ("fp8", "plain")
    )
    assert found == wanted
    shutil.rmtree(tmp_path / "fp8")


def test_a_config_refused_names_it(tmp_path: Path) -> None:
    folder_of(tmp_path, {"a": torch.zeros(1)}, {"quant_method": "gptq"} | CONFIGS["qwen3"])
    with pytest.raises(ConfigError, match="gptq"):
        config_of(tmp_path)
