"""Checkpoints as people have them, to Megatron's format and back: the same tensors, in the same
dtypes. Fused experts, one file, an index that lies, a shard that is missing and pointers of Git LFS
are in test_weights.py, FP8 in test_quantised.py.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from moetrain.testing.tiny import save_model
from moetrain.weights.convert import hf2mcore, mcore2hf
from moetrain.weights.folder import INDEX, weight_files

Tensors = dict[str, Tensor]


def mixed(tensors: Tensors) -> Tensors:
    """Routers and norms as some checkpoints have them, wider than the rest."""
    wide = ("gate.weight", "norm.weight")
    return {n: t if n.endswith(wide) else t.bfloat16() for n, t in tensors.items()}


DTYPES: dict[str, Callable[[Tensors], Tensors]] = {
    "bf16": lambda tensors: {n: t.bfloat16() for n, t in tensors.items()},
    "fp16": lambda tensors: {n: t.half() for n, t in tensors.items()},
    "fp32": lambda tensors: tensors,
    "mixed": mixed,
}


def stored(folder: Path) -> Tensors:
    return {n: t for path in weight_files(folder) for n, t in load_file(path).items()}


def round_trip(folder: Path, out: Path) -> None:
    hf2mcore(folder, out / "mcore")
    mcore2hf(out / "mcore", out / "hf")
    wanted, found = stored(folder), stored(out / "hf")
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "qwen2_moe", "gpt_oss"])
def test_dtypes(family: str, dtype: str, tmp_path: Path) -> None:
    folder = tmp_path / "source"
    save_model(family, folder, num_hidden_layers=2)
    tensors = DTYPES[dtype](load_file(folder / "model.safetensors"))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    round_trip(folder, tmp_path)


def test_hundreds_of_files_split_anywhere(tmp_path: Path) -> None:
    """A tensor a file, those of a layer and of an expert far from each other."""
    folder = tmp_path / "source"
    save_model("qwen3_moe", folder, num_experts=16)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors, key=lambda name: name[::-1])
    assert len(names) > 200
    places = {n: f"model-{i + 1:05d}-of-{len(names):05d}.safetensors" for i, n in enumerate(names)}
    for name, file in places.items():
        save_file({name: tensors[name]}, folder / file)
    (folder / INDEX).write_text(json.dumps({"weight_map": places}))
    round_trip(folder, tmp_path)


@pytest.mark.parametrize("tied", [True, False])
def test_a_vocabulary_grown_by_named_tokens(tied: bool, tmp_path: Path) -> None:
    """An odd number of rows, new names in the tokenizer; both are there afterwards."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from moetrain.data import assets

    builtin = assets.resolve("builtin:qwen3-moe-tiny")
    folder = tmp_path / "source"
    model = save_model("qwen3_moe", folder, vocab_size=2048, tie_word_embeddings=tied)
    tokenizer = AutoTokenizer.from_pretrained(str(builtin))
    num = len(tokenizer)
    assert tokenizer.add_tokens([f"<|tool_{i}|>" for i in range(5)], special_tokens=True) == 5
    model.resize_token_embeddings(num + 5)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    round_trip(folder, tmp_path)
    config = json.loads((tmp_path / "hf/config.json").read_text())
    assert config["vocab_size"] == num + 5 and ("lm_head.weight" in stored(tmp_path / "hf")) != tied
    again = AutoTokenizer.from_pretrained(str(tmp_path / "hf"))
    assert again.convert_tokens_to_ids("<|tool_4|>") == num + 4
    loader: Any = AutoModelForCausalLM
    loaded = loader.from_pretrained(str(tmp_path / "hf"), dtype=torch.float32)
    ids = torch.tensor([[1, num, num + 4]])
    with torch.inference_mode():
        assert torch.equal(loaded(ids).logits, model(ids).logits)
