"""`moetrain score` and the conversions, against transformers."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from data_helpers import tokenizer_folder, write_jsonl
from safetensors.torch import load_file, save_file

from moetrain.data import tokenizer
from moetrain.errors import CheckpointError, DataError, WeightsError
from moetrain.loops import score
from moetrain.testing import command
from moetrain.testing.gloo import Workers
from moetrain.testing.tiny import save_model
from moetrain.weights import convert

Tiny = Callable[[str], tuple[str, Any]]
LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "one": (1, []),
    "tp2": (2, ["parallel.tp=2"]),
    "pp2": (2, ["parallel.pp=2"]),
    "dp2-ep2": (2, ["parallel.ep=2"]),
}


def rows() -> list[list[int]]:
    rng = random.Random(3)
    lengths = [5, 1, 40, 2, 17, 33, 8, 1, 60]
    return [[rng.randrange(200) for _ in range(length)] for length in lengths]


@torch.no_grad()
def expected(model: Any, tokens: list[int]) -> list[float]:
    if len(tokens) == 1:
        return []
    logps = model(torch.tensor([tokens])).logits[0].float().log_softmax(-1)[:-1]
    return logps.gather(1, torch.tensor(tokens[1:])[:, None])[:, 0].tolist()


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.gloo
@pytest.mark.parametrize("layout", LAYOUTS)
def test_equals_transformers(workers: Workers, tiny: Tiny, tmp_path: Path, layout: str) -> None:
    folder, model = tiny("qwen3_moe")
    world, overrides = LAYOUTS[layout]
    data = write_jsonl(tmp_path / "data.jsonl", [{"tokens": tokens} for tokens in rows()])
    out = tmp_path / "out.jsonl"
    workers.run(world, score.score, folder, data, out, overrides)
    got = read(out)
    assert [row["tokens"] for row in got] == rows()
    for row in got:
        want = expected(model, row["tokens"])
        assert len(row["logprobs"]) == len(want) == len(row["tokens"]) - 1
        torch.testing.assert_close(row["logprobs"], want, atol=2e-5, rtol=1e-5)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["data.jsonl", "out.jsonl"]


@pytest.mark.gloo
@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"tokens": [1, 200]}', r"data\.jsonl:2: token 200 is outside the model's vocabulary"),
        ('{"tokens": [1, -1]}', "token -1"),
        ('{"tokens": []}', "empty sequence"),
        ('{"tokens": [1, "a"]}', "whole numbers"),
        ('{"tokens": [true]}', "whole numbers"),
        ('{"prompt": "a"}', "neither `tokens`"),
        ('{"text": "a"}', "text|tokenizer"),
        ('{"tokens"', "malformed"),
    ],
)
def test_bad_rows_name_file_and_line(
    workers: Workers, tiny: Tiny, tmp_path: Path, row: str, message: str
) -> None:
    data = write_jsonl(tmp_path / "data.jsonl", ['{"tokens": [1, 2]}', row])
    with pytest.raises(DataError, match=message):
        workers.run(1, score.score, tiny("qwen3_moe")[0], data, tmp_path / "out.jsonl", [])
    assert not (tmp_path / "out.jsonl").exists()


def mixed_dtypes(source: Path, folder: Path) -> Path:
    """The model of `source` in bf16, with norms and routers kept in fp32."""
    tensors = load_file(source / "model.safetensors")
    kept = {n: t if "norm" in n or ".gate." in n else t.bfloat16() for n, t in tensors.items()}
    folder.mkdir()
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text((source / "config.json").read_text())
    return folder


@pytest.mark.gloo
@pytest.mark.parametrize("mixed", [False, True])
def test_there_and_back_through_megatron(
    workers: Workers, tiny: Tiny, tmp_path: Path, mixed: bool
) -> None:
    source = Path(tiny("qwen3_moe")[0])
    if mixed:
        source = mixed_dtypes(source, tmp_path / "source")
    megatron, back = tmp_path / "megatron", tmp_path / "new" / "hf"
    convert.hf2mcore(source, megatron)
    convert.mcore2hf(megatron, back)
    assert workers.run(1, convert.verify, source, back) == [0]
    assert workers.run(1, convert.verify, megatron, source) == [0]
    with pytest.raises(CheckpointError, match="exists"):
        convert.hf2mcore(source, megatron)
    with pytest.raises(WeightsError, match=r"no moetrain\.json"):
        convert.mcore2hf(source, tmp_path / "other")

    data = write_jsonl(tmp_path / "data.jsonl", [{"tokens": tokens} for tokens in rows()])
    for name, path in (("a", source), ("b", megatron)):
        workers.run(1, score.score, str(path), data, tmp_path / f"{name}.jsonl", [])
    if not mixed:  # a Megatron folder holds one dtype, and is scored in the one its config names
        assert (tmp_path / "a.jsonl").read_text() == (tmp_path / "b.jsonl").read_text()


@pytest.mark.gloo
def test_text_is_tokenised_as_it_stands(workers: Workers, tmp_path: Path) -> None:
    save_model("qwen3_moe", tmp_path / "model", vocab_size=512)
    for file in tokenizer_folder().iterdir():
        shutil.copy(file, tmp_path / "model")
    data = write_jsonl(tmp_path / "data.jsonl", [{"text": "What is 2 plus 2?"}])
    workers.run(1, score.score, str(tmp_path / "model"), data, tmp_path / "out.jsonl", [])
    (row,) = read(tmp_path / "out.jsonl")
    loaded = tokenizer.load(tokenizer_folder())
    assert row["tokens"] == loaded("What is 2 plus 2?")["input_ids"]
    assert len(row["logprobs"]) == len(row["tokens"]) - 1


def test_verify_lists_what_differs(tiny: Tiny, tmp_path: Path) -> None:
    source = Path(tiny("qwen3_moe")[0])
    tensors = load_file(source / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"] + 1e-6
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    done = command.run("convert", "verify", source, tmp_path)
    assert done.returncode == 1
    *said, first, second = done.stdout.splitlines()
    assert all("no manifest.json" in line for line in said)
    assert first.startswith("model.norm.weight: 100.00% of values differ")
    assert second == "1 difference"
