"""`convert quantize`: what is taken, what it becomes, and what a layer at a time sees."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from moetrain.errors import ConfigError, DataError, WeightsError
from moetrain.models import read_model
from moetrain.testing.tiny import save_model
from moetrain.weights import calibration
from moetrain.weights.block_fp8 import BlockFp8
from moetrain.weights.convert import hf2mcore
from moetrain.weights.dequantised import open_weights
from moetrain.weights.quantise import quantize
from moetrain.weights.reader import SafetensorsReader

FP8 = torch.float8_e4m3fn
SIZES: dict[str, Any] = dict(hidden_size=128, head_dim=32, intermediate_size=128,
                             num_hidden_layers=2, vocab_size=200)  # fmt: skip
SPARSE = dict(moe_intermediate_size=128)
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_moe": SIZES | SPARSE,
    "mixtral": SIZES,
    "qwen2_moe": SIZES | SPARSE | dict(shared_expert_intermediate_size=128),
}
needs_modelopt = pytest.mark.skipif(
    importlib.util.find_spec("modelopt") is None,
    reason="ModelOpt is not installed: unproven that --to fp8 and nvfp4 write what it exports",
)


def base(folder: Path, family: str = "qwen3_moe", **changes: Any) -> Path:
    """In bf16, so that what stays plain stays as it is."""
    save_model(family, folder, **FAMILIES[family] | changes)
    path = folder / "model.safetensors"
    save_file({name: t.bfloat16() for name, t in load_file(path).items()}, path, {"format": "pt"})
    hf = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(hf | {"dtype": "bfloat16"}))
    return folder


def sequences(num: int = 3, length: int = 24) -> list[list[int]]:
    torch.manual_seed(1)
    return torch.randint(0, 200, (num, length)).tolist()


def rows_of(file: Path, rows: list[Any]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def log_probs(folder: Path) -> Tensor:
    from transformers import AutoModelForCausalLM

    loader: Any = AutoModelForCausalLM
    model = loader.from_pretrained(str(folder), dtype=torch.bfloat16).eval()
    ids = torch.tensor(sequences())
    with torch.inference_mode():
        found = model(ids).logits.float().log_softmax(-1)[:, :-1]
    return found.gather(-1, ids[:, 1:, None]).squeeze(-1)


def read_all(folder: Path) -> dict[str, Tensor]:
    reader = open_weights(folder)
    return {n: reader.read(n, tuple(slice(0, s) for s in reader.shape(n))) for n in reader.names()}


def taken_of(layers: int, experts: int) -> set[str]:
    """Written out: the matrices of a qwen3_moe that are quantised."""
    attention = [f"self_attn.{p}_proj" for p in "qkvo"]
    mlp = [f"mlp.experts.{e}.{p}_proj" for e in range(experts) for p in ("gate", "up", "down")]
    return {f"model.layers.{i}.{n}.weight" for i in range(layers) for n in [*attention, *mlp]}


def test_blocks_of_fp8(tmp_path: Path) -> None:
    """Which matrices, as what, and how far transformers' answers move."""
    source = base(tmp_path / "source")
    quantize(source, tmp_path / "fp8", "fp8-block")
    stored, plain = (load_file(f / "model.safetensors") for f in (tmp_path / "fp8", source))
    taken = {name for name, tensor in stored.items() if tensor.dtype == FP8}
    assert taken == taken_of(2, 6)
    assert stored.keys() == plain.keys() | {name + "_scale_inv" for name in taken}
    for name in plain.keys() - taken:
        assert torch.equal(stored[name], plain[name]) and stored[name].dtype == torch.bfloat16
    for name, found in read_all(tmp_path / "fp8").items():
        if name in taken:  # e4m3 has three bits behind the leading one, and 2^-9 as its smallest
            assert stored[name].float().abs().max() == 448
            wanted, scale = plain[name].float(), stored[name + "_scale_inv"].max()
            assert ((found.float() - wanted).abs() <= wanted.abs() / 15 + scale / 512).all(), name
    config = json.loads((tmp_path / "fp8/config.json").read_text())["quantization_config"]
    assert config["modules_to_not_convert"] == [
        "lm_head", "model.layers.0.mlp.gate", "model.layers.1.mlp.gate",
    ]  # fmt: skip
    moved = (log_probs(tmp_path / "fp8") - log_probs(source)).abs()
    assert 0 < moved.mean() < 0.15 and moved.max() < 1  # 0.08 and 0.4; e4m3 read as e5m2: 8


def test_a_checkpoint_of_megatrons_is_a_source_too(tmp_path: Path) -> None:
    source = base(tmp_path / "source", num_hidden_layers=1)
    hf2mcore(source, tmp_path / "mcore")
    for name in ("source", "mcore"):
        quantize(tmp_path / name, tmp_path / f"of_{name}", "fp8-block")
    found, wanted = (
        {p.name: p.read_bytes() for p in (tmp_path / f"of_{name}").iterdir()}
        for name in ("mcore", "source")
    )
    assert found == wanted


def test_any_slice_of_a_matrix_in_blocks(tmp_path: Path) -> None:
    torch.manual_seed(0)
    weight = torch.randn(1300, 300)
    weight[256:384, 128:256] = 0
    save_file({"a.weight": weight, "b": torch.ones(3)}, tmp_path / "model.safetensors")
    reader = BlockFp8(SafetensorsReader(tmp_path), ["a.weight"])
    assert reader.shape("a.weight_scale_inv") == (11, 3) and reader.shape("b") == (3,)
    for name in ("a.weight", "a.weight_scale_inv"):
        rows, columns = reader.shape(name)
        found = reader.read(name, (slice(0, rows), slice(0, columns)))
        assert found.dtype == reader.dtype(name)
        for cut in [(slice(1, rows - 2), slice(1, 2)), (slice(9, 10), slice(0, columns)),
                    (slice(3, 3), slice(0, columns))]:  # fmt: skip
            assert torch.equal(reader.read(name, cut).float(), found.float()[cut]), (name, cut)
        if name == "a.weight_scale_inv":
            for i in range(11):
                for j in range(3):
                    block = weight[i * 128 : (i + 1) * 128, j * 128 : (j + 1) * 128]
                    assert found[i, j] == (block.abs().max() / 448 if block.any() else 1)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_layer_at_a_time_sees_what_the_whole_model_sees(family: str, tmp_path: Path) -> None:
    """Hidden states and the experts that tokens meet, bit for bit as transformers has them."""
    from transformers import AutoModelForCausalLM

    folder, ids = base(tmp_path, family, num_hidden_layers=3), sequences()
    loader: Any = AutoModelForCausalLM
    whole = loader.from_pretrained(str(folder), dtype=torch.bfloat16).eval()
    hf = json.loads((folder / "config.json").read_text())
    model = read_model(hf)
    with torch.inference_mode():
        outs = [
            whole.model(torch.tensor([row]), output_hidden_states=True, output_router_logits=True)
            for row in ids
        ]
    count = 0
    for layer in calibration.layers(hf, model, SafetensorsReader(folder, model), ids):
        count += 1
        met = torch.zeros(6, dtype=torch.long)
        for inside, out in zip(layer.inputs, outs, strict=True):
            assert torch.equal(inside, out.hidden_states[layer.number][0])
            chosen = out.router_logits[layer.number].topk(2, -1).indices
            met += torch.bincount(chosen.flatten(), minlength=6)
        assert layer.met is not None and torch.equal(layer.met, met)
        assert layer.met.sum() == 2 * 3 * 24
    assert count == 3


@pytest.mark.parametrize("to", ["fp8", "nvfp4"])
@needs_modelopt
def test_a_layer_at_a_time_is_what_modelopt_makes_of_the_whole(
    to: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import modelopt.torch.quantization as quantization
    from modelopt.torch.export import export_hf_checkpoint
    from transformers import AutoModelForCausalLM

    folder = base(tmp_path / "source", num_experts=16)
    data = rows_of(tmp_path / "data.jsonl", [{"tokens": row} for row in sequences(1, 6)])
    quantize(folder, tmp_path / to, to, data)
    assert "of 32 experts met no token of the calibration (layer 0: " in capsys.readouterr().out
    loader: Any = AutoModelForCausalLM
    whole = loader.from_pretrained(str(folder), dtype=torch.bfloat16).eval()
    ids = torch.tensor(sequences(1, 6))
    config = {"fp8": quantization.FP8_DEFAULT_CFG, "nvfp4": quantization.NVFP4_DEFAULT_CFG}[to]
    with torch.inference_mode():
        whole = quantization.quantize(whole, config, lambda model: model(ids))
        export_hf_checkpoint(whole, export_dir=tmp_path / "whole")
    stored, wanted = (load_file(tmp_path / f / "model.safetensors") for f in (to, "whole"))
    assert stored.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert stored[name].dtype == tensor.dtype and stored[name].shape == tensor.shape
        bound = 2**-7 if name.endswith("input_scale") else 0  # it runs experts in another order
        torch.testing.assert_close(stored[name].float(), tensor.float(), rtol=bound, atol=0)
    taken = {n.removesuffix("_scale") for n in stored if n.endswith(".weight_scale")}
    assert taken == taken_of(2, 16)
    said, whole_said = (
        json.loads((tmp_path / f / "config.json").read_text())["quantization_config"]
        for f in (to, "whole")
    )
    assert sorted(said.pop("ignore")) == sorted(whole_said.pop("ignore")) and said == whole_said
    plain = read_all(tmp_path / to)
    save_file(plain, tmp_path / "whole/model.safetensors", {"format": "pt"})
    (tmp_path / "whole/config.json").write_text((folder / "config.json").read_text())
    moved = (log_probs(tmp_path / "whole") - log_probs(folder)).abs()
    assert 0 < moved.mean() < {"fp8": 0.15, "nvfp4": 0.5}[to]  # 0.08 and 0.24


def test_a_model_in_fp32_is_served_in_bf16(tmp_path: Path) -> None:
    save_model("qwen3_moe", tmp_path / "source", **FAMILIES["qwen3_moe"], tie_word_embeddings=True)
    quantize(tmp_path / "source", tmp_path / "fp8", "fp8-block")
    stored = load_file(tmp_path / "fp8/model.safetensors")
    assert {t.dtype for n, t in stored.items() if "_proj" not in n} == {torch.bfloat16}
    assert json.loads((tmp_path / "fp8/config.json").read_text())["dtype"] == "bfloat16"
    assert "lm_head.weight" not in stored


@pytest.mark.parametrize(
    ("to", "data", "changes", "words"),
    [
        ("int4-awq", None, {}, "int4-awq is not written.*Take --to fp8-block, fp8, nvfp4"),
        ("fp8-block", "data.jsonl", {}, "needs no calibration"),
        ("fp8", None, {}, "give --calibration FILE"),
        ("fp8-block", None, {"head_dim": 8}, r"q_proj.weight has 64 rows, which blocks of 128"),
        ("fp8-block", None, {"moe_intermediate_size": 96}, r"gate_proj.weight has 96 rows"),
        pytest.param(
            "nvfp4",
            "data.jsonl",
            {"moe_intermediate_size": 24},
            "down_proj.weight has 24 columns, which groups of 16",
            marks=needs_modelopt,
        ),
    ],
)
def test_what_cannot_be_written_is_refused_in_one_line(
    to: str, data: str | None, changes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    folder = base(tmp_path / "source", num_hidden_layers=1, **changes)
    given = None if data is None else rows_of(tmp_path / data, [{"tokens": [1]}])
    with pytest.raises((ConfigError, WeightsError), match=words) as caught:
        quantize(folder, tmp_path / "out", to, given)
    assert "\n" not in str(caught.value)
    assert not [path for path in tmp_path.iterdir() if path.name not in ("source", data)]


@pytest.mark.skipif(importlib.util.find_spec("modelopt") is not None, reason="ModelOpt is here")
def test_without_modelopt_that_is_said(tmp_path: Path) -> None:
    folder = base(tmp_path / "source", num_hidden_layers=1)
    data = rows_of(tmp_path / "data.jsonl", [{"tokens": [1, 2]}])
    with pytest.raises(ConfigError, match=r"not installed.*moetrain\[modelopt\].*fp8-block"):
        quantize(folder, tmp_path / "out", "fp8", data)


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_weights_that_are_not_finite_are_named(value: float, tmp_path: Path) -> None:
    folder = base(tmp_path / "source", num_hidden_layers=1)
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.self_attn.o_proj.weight"
    tensors[name][3, 4] = value
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(WeightsError, match=f"{name} has values that are not finite"):
        quantize(folder, tmp_path / "out", "fp8-block")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"tokens": [1, 200]}, "data.jsonl:2: its tokens are no ids of a vocabulary of 200"),
        ({"tokens": "no"}, "data.jsonl:2: its tokens are no ids"),
        ([1], "data.jsonl:2"),
    ],
)
def test_calibration_data_that_cannot_be_read(row: Any, words: str, tmp_path: Path) -> None:
    file = rows_of(tmp_path / "data.jsonl", [{"tokens": [1]}, row])
    with pytest.raises(DataError, match=words) as caught:
        calibration.read_sequences(file, tmp_path, 200)
    assert "\n" not in str(caught.value)


def test_calibration_data_of_every_kind(tmp_path: Path) -> None:
    """Text, a conversation as the template has it, and ids; of a long one its beginning."""
    from moetrain.data import assets, tokenizer

    folder = assets.resolve("builtin:qwen3-moe-tiny")
    loaded = tokenizer.load(folder)
    talk = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]
    rows = [{"text": "one two"}, {"messages": talk}, {"tokens": [7] * 600}]
    found = calibration.read_sequences(rows_of(tmp_path / "data.jsonl", rows), folder, 2048)
    assert found[0] == loaded("one two")["input_ids"] and found[2] == [7] * 512
    text = loaded.decode(found[1])
    assert "2 + 2?" in text and text.index("2 + 2?") < text.index("4", text.index("2 + 2?") + 6)
