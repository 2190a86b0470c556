"""Depth expansion, against transformers, through the command line."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM
from weights_helpers import reader_of

from moetrain import cli
from moetrain.models import read_model
from moetrain.models.patterns import trainable_names
from moetrain.testing.tiny import save_model
from moetrain.weights.adapter_init import whole
from moetrain.weights.expand import plan

# name: (family, config changes, every, source of each new block)
CASES: dict[str, tuple[str, dict[str, Any], int, list[int]]] = {
    "every block": ("qwen3_moe", {}, 1, [0, 0, 1, 1, 2, 2, 3, 3]),
    "every second": ("qwen3_moe", {}, 2, [0, 1, 1, 2, 3, 3]),
    "one left over": ("qwen3_moe", {}, 3, [0, 1, 2, 2, 3]),
    "dense ones between": ("qwen3_moe", {"decoder_sparse_step": 2}, 1, [0, 0, 1, 1, 2, 2, 3, 3]),
    "dense ones named": ("qwen3_moe", {"mlp_only_layers": [0, 3]}, 2, [0, 1, 1, 2, 3, 3]),
    "mixtral": ("mixtral", {}, 2, [0, 1, 1, 2, 3, 3]),
    "tied": ("qwen3", {}, 4, [0, 1, 2, 3, 3]),
    "llama": ("llama", {}, 2, [0, 1, 1, 2, 3, 3]),
    "a shared expert": ("qwen2_moe", {}, 2, [0, 1, 1, 2, 3, 3]),
    "sinks, windows, biases": ("gpt_oss", {}, 2, [0, 1, 1, 2, 3, 3]),
    "a biased output": ("llama", {"attention_bias": True}, 2, [0, 1, 1, 2, 3, 3]),
}
# Tensors whose copies must not be zero, and those whose must.
OUTPUTS = ("o_proj.weight", "o_proj.bias", "down_proj.weight", "down_proj.bias", "w2.weight")


def config_in(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def tensors_in(folder: Path) -> dict[str, Tensor]:
    reader = reader_of(config_in(folder), folder)[1]
    return {name: whole(reader, name) for name in reader.names()}


@torch.no_grad()
def logits_of(folder: Path) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model(torch.arange(40).reshape(2, 20) * 7 % 200).logits


@pytest.mark.parametrize("case", CASES)
def test_a_deeper_model_answers_as_before(
    tmp_path: Path, case: str, capsys: pytest.CaptureFixture[str]
) -> None:
    family, changes, every, sources = CASES[case]
    src, dst = tmp_path / "src", tmp_path / "dst"
    save_model(family, src, **changes)
    (src / "tokenizer.json").write_text("{}")
    assert cli.main(["convert", "expand", str(src), str(dst), "--every", str(every)]) == 0

    assert (logits_of(dst) - logits_of(src)).abs().max() < 1e-5
    old, new = tensors_in(src), tensors_in(dst)
    added = [i for i in range(1, len(sources)) if sources[i] == sources[i - 1]]
    assert config_in(dst)["num_hidden_layers"] == len(sources)
    for name, tensor in new.items():
        parts = name.split(".")
        if parts[1] != "layers":
            assert torch.equal(tensor, old[name]), name
            continue
        layer, parts[2] = int(parts[2]), str(sources[int(parts[2])])
        if layer in added and name.endswith(OUTPUTS):
            assert not tensor.any(), name
        else:
            assert torch.equal(tensor, old[".".join(parts)]) and tensor.any(), name

    note = json.loads((dst / "expanded.json").read_text())
    assert note["added"] == [f"model.layers.{layer}" for layer in added]
    assert f"trainable: [{', '.join(note['trainable'])}]" in capsys.readouterr().out
    hf = config_in(dst)
    table = read_model(hf).table
    chosen = trainable_names(table, note["trainable"])
    assert chosen == {name for name, rule in table.items() if rule.layer in added}
    assert (dst / "tokenizer.json").read_text() == "{}"


def test_fused_folders_and_dtypes(tmp_path: Path) -> None:
    """transformers 5's own experts; each tensor keeps its dtype."""
    src, dst = tmp_path / "src", tmp_path / "dst"
    model = save_model("qwen3_moe", src)
    for param in model.model.layers[1].self_attn.parameters():
        param.data = param.data.bfloat16()
    model.save_pretrained(src, save_original_format=False)
    assert cli.main(["convert", "expand", str(src), str(dst), "--every", "2"]) == 0
    new = load_file(dst / "model.safetensors")
    assert new["model.layers.2.self_attn.o_proj.weight"].dtype == torch.bfloat16
    assert new["model.layers.2.mlp.experts.5.down_proj.weight"].dtype == torch.float32
    assert (logits_of(dst) - logits_of(src)).abs().max() < 1e-5


def test_layer_types_follow(tmp_path: Path) -> None:
    src, dst = tmp_path / "src", tmp_path / "dst"
    save_model("qwen3", src)
    hf = config_in(src)
    assert hf["layer_types"] == ["full_attention"] * 4
    assert cli.main(["convert", "expand", str(src), str(dst), "--every", "1"]) == 0
    assert config_in(dst)["layer_types"] == ["full_attention"] * 8
    assert set(config_in(dst)) == set(hf)


def test_only_the_last_of_every_k_is_copied() -> None:
    """LLaMA-Pro's own case: 32 blocks in 8 groups make 40."""
    expansion = plan(32, 4)
    assert len(expansion.sources) == 40
    assert expansion.added == (4, 9, 14, 19, 24, 29, 34, 39)
    assert [expansion.sources[layer] for layer in expansion.added] == [3, 7, 11, 15, 19, 23, 27, 31]


@pytest.mark.parametrize(
    ("change", "every", "message"),
    [
        (lambda src: None, "5", "--every 5 cannot be with a model of 4 layers; give 1 to 4"),
        (lambda src: (src / "config.json").unlink(), "2", "no config.json"),
        (lambda src: (src / "config.json").write_text("{"), "2", "config.json: not JSON"),
        (lambda src: (src / "model.safetensors").unlink(), "2", "neither model.safetensors"),
        (lambda src: drop(src, "model.layers.2.mlp.experts.1.down_proj.weight"), "2", "missing"),
        (lambda src: (src.parent / "dst").mkdir(), "2", "dst exists"),
    ],
)
def test_bad_input_is_one_line(
    tmp_path: Path, change: Any, every: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    src, dst = tmp_path / "src", tmp_path / "dst"
    save_model("qwen3_moe", src)
    change(src)
    before = sorted(path.name for path in tmp_path.rglob("*"))
    capsys.readouterr()
    assert cli.main(["convert", "expand", str(src), str(dst), "--every", every]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1
    assert sorted(path.name for path in tmp_path.rglob("*")) == before


def drop(src: Path, name: str) -> None:
    tensors = load_file(src / "model.safetensors")
    del tensors[name]
    save_file(tensors, src / "model.safetensors")
