"""What gpt-oss alone has: files whose experts are one tensor, interleaved, and MXFP4."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from moetrain.engine import Engine
from moetrain.errors import WeightsError
from moetrain.models import Model, read_model
from moetrain.models.lookup import config_of
from moetrain.testing import ranks
from moetrain.testing.gloo import Workers
from moetrain.testing.tiny import save_model
from moetrain.weights.convert import Options, hf2mcore, mcore2hf, verify
from moetrain.weights.dequantised import open_weights
from moetrain.weights.fused import PutTogether, put_together
from moetrain.weights.quantise import quantize
from moetrain.weights.rows import num_rows
from moetrain.weights.stored import StoredFolder

type Tensors = dict[str, Tensor]


def packed(folder: Path, **changes: Any) -> Path:
    """A folder as gpt-oss is published: bf16, and experts in MXFP4 of any values."""
    save_model("gpt_oss", folder, hidden_size=64, intermediate_size=96, num_hidden_layers=2)
    out: Tensors = {}
    torch.manual_seed(1)
    for name, tensor in load_file(folder / "model.safetensors").items():
        if not name.endswith(("gate_up_proj", "down_proj")):
            out[name] = tensor.bfloat16()
            continue
        experts, into, rows = tensor.shape
        sizes = (experts, rows, into // 32)
        out[name + "_blocks"] = torch.randint(0, 256, (*sizes, 16), dtype=torch.uint8)
        out[name + "_scales"] = torch.randint(100, 130, sizes, dtype=torch.uint8)
    save_file(out | changes, folder / "model.safetensors", {"format": "pt"})
    hf = json.loads((folder / "config.json").read_text())
    hf |= {"dtype": "bfloat16", "quantization_config": {"quant_method": "mxfp4"}}
    (folder / "config.json").write_text(json.dumps(hf))
    return folder


def read_model_of(folder: Path) -> Model:
    return read_model(config_of(folder)[0])


def as_in_files(folder: Path) -> Tensors:
    model = read_model_of(folder)
    reader = open_weights(folder, model)
    whole = (
        (key, reader.read(key, tuple(slice(0, n) for n in reader.shape(key))))
        for key in model.hf_names
    )
    return dict(put_together(whole, model.table))


def test_mxfp4_is_what_transformers_makes_of_it(tmp_path: Path) -> None:
    """By value, and in a model made for Megatron and back, which is plain bf16."""
    from transformers import AutoModelForCausalLM

    folder = packed(tmp_path / "source")
    loader: Any = AutoModelForCausalLM
    wanted = loader.from_pretrained(str(folder)).state_dict()
    found = as_in_files(folder)
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor), name
    hf2mcore(folder, tmp_path / "mcore")
    mcore2hf(tmp_path / "mcore", tmp_path / "plain")
    assert verify(folder, tmp_path / "plain") == 0
    again = loader.from_pretrained(str(tmp_path / "plain"), dtype=torch.bfloat16)
    assert again.config.to_dict().get("quantization_config") is None
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, wanted[name]), name


KEY = "model.layers.1.mlp.experts.down_proj"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({KEY + "_scales": torch.zeros(6, 64, 2, dtype=torch.uint8)}, r"\[6, 64, 3\] in U8"),
        ({KEY + "_scales": torch.zeros(6, 64, 3)}, "is F32"),
        ({KEY + "_blocks": torch.zeros(5, 64, 3, 16, dtype=torch.uint8)}, r"\[6, 64, 3, 16\]"),
    ],
)
def test_blocks_that_do_not_fit(changes: Tensors, words: str, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=words):
        open_weights(packed(tmp_path, **changes), read_model_of(tmp_path))


def test_scales_that_lack(tmp_path: Path) -> None:
    path = packed(tmp_path) / "model.safetensors"
    rest = {name: t for name, t in load_file(path).items() if name != KEY + "_scales"}
    save_file(rest, path, {"format": "pt"})
    with pytest.raises(WeightsError, match="down_proj_scales is not"):
        open_weights(tmp_path, read_model_of(tmp_path))


def test_any_rows_of_what_is_put_together(tmp_path: Path) -> None:
    """Within an expert and over several, they are those of the file that it was taken from."""
    save_model("gpt_oss", tmp_path, num_hidden_layers=1)
    model = read_model_of(tmp_path)
    plain, made = StoredFolder(tmp_path), PutTogether(StoredFolder(tmp_path, model), model.table)
    assert set(made.names()) == set(plain.names())
    for name in plain.names():
        assert made.shape(name) == plain.shape(name)
        rows = num_rows(plain.shape(name))
        for low, high in ((0, rows), (rows // 3, rows // 3), (1, rows // 2), (rows // 2, rows)):
            wanted = plain.rows(name, low, high)
            assert np.array_equal(made.rows(name, low, high), wanted), (name, low, high)


def exported(folder: str, parallel: dict[str, Any], into: Path) -> None:
    Engine(ranks.recipe_for(folder, parallel), train=False).export_hf(into)


@pytest.mark.gloo
@pytest.mark.parametrize("parallel", [{"ep": 2}, {"pp": 2}, {"tp": 2, "etp": 2}], ids=str)
def test_a_running_job_exports_the_file(
    workers: Workers,
    tiny: Callable[[str], tuple[str, Any]],
    tmp_path: Path,
    parallel: dict[str, Any],
) -> None:
    folder, _ = tiny("gpt_oss")
    workers.run(2, exported, folder, parallel, tmp_path / "out")
    wanted, found = (
        load_file(Path(where) / "model.safetensors") for where in (folder, tmp_path / "out")
    )
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor), name


def test_what_is_not_done_with_it(tmp_path: Path) -> None:
    folder = tmp_path / "source"
    save_model("gpt_oss", folder, num_hidden_layers=1)
    with pytest.raises(WeightsError, match="holds all experts as one tensor"):
        quantize(folder, tmp_path / "fp8", "fp8-block")
    with pytest.raises(WeightsError, match="Megatron-LM's GPT has no bias"):
        hf2mcore(folder, tmp_path / "mlm", Options(style="megatron-lm"))
    assert not (tmp_path / "fp8").exists() and not (tmp_path / "mlm").exists()
