"""Adapters as weights, against PEFT on the transformers model. Values stand in for training."""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from weights_helpers import Spread, readapt, reader_of

from moetrain import cli
from moetrain.config.recipe import AdapterConfig
from moetrain.errors import ConfigError, WeightsError
from moetrain.models import Rule, read_model, with_scalar_head
from moetrain.models.adapter import AdapterSpec, AdapterTable, adapter_table, row_parts
from moetrain.models.patterns import trainable_names
from moetrain.testing.gloo import Workers
from moetrain.testing.tiny import CONFIGS, save_model
from moetrain.weights.adapter_init import InitialAdapter, Residual, whole
from moetrain.weights.compare import compare
from moetrain.weights.derived import merge
from moetrain.weights.peft_reader import PeftReader
from moetrain.weights.peft_writer import config_of, targets, write_peft
from moetrain.weights.reader import Reader
from moetrain.weights.transport import LocalParam, export, load

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
EVERYTHING = ("all-router",)
MIXED = {"mlp_only_layers": [1], "num_hidden_layers": 3}
PEFT_TYPES = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "olora": {"init_lora_weights": "olora"},
    "pissa": {"init_lora_weights": "pissa"},
}


def spec_of(type: str, *target: str, rank: int = 4) -> AdapterSpec:
    return AdapterSpec.of(
        AdapterConfig.model_validate(
            {"type": type, "rank": rank, "alpha": 6, "target": list(target)}
        )
    )


def config_in(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def table_on(base: Path, spec: AdapterSpec) -> tuple[AdapterTable, Reader]:
    model, reader = reader_of(config_in(base), base)
    return adapter_table(model, spec), reader


def shards(table: AdapterTable, reader: Reader) -> list[LocalParam]:
    """An adapter in this process, loaded as the engine would."""
    local = [
        LocalParam(name, torch.full(rule.local_shape(0, 1), torch.nan), 0, 1, None)
        for name, rule in table.items()
    ]
    load(local, table, reader, table.model)
    return local


def train(local: list[LocalParam], table: AdapterTable) -> None:
    """Move what is live; what is not must not, and its rows are what `row_parts` says."""
    torch.manual_seed(1)
    for param in local:
        rows = row_parts(table[param.name], 0, 1)
        live = torch.tensor([table.parts(param.name)[part] for part in rows])
        step = torch.randn_like(param.tensor) * 0.1
        param.tensor.add_(step * live.reshape(-1, *[1] * (step.dim() - 1)))


def dtypes_of(tensors: Mapping[str, Tensor]) -> dict[str, torch.dtype]:
    return {name: tensor.dtype for name, tensor in tensors.items()}


def exported(
    base: Path, spec: AdapterSpec, folder: Path, steps: int = 1
) -> tuple[AdapterTable, dict[str, Tensor]]:
    """The adapter of a run on `base`, in PEFT's format in `folder`."""
    table, reader = table_on(base, spec)
    initial = InitialAdapter(reader, table, seed=3)
    local = shards(table, initial)
    for _ in range(steps):
        train(local, table)
    tensors = {name: t.clone() for name, t in export(local, table, to="all")}
    write_peft(tensors.items(), dtypes_of(tensors), folder, table, str(base), initial)
    return table, tensors


@torch.no_grad()
def logits_of(model: Any) -> Tensor:
    tokens = torch.arange(40).reshape(2, 20) * 7 % 200
    return model.eval()(tokens).logits


def model_in(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def in_peft(base: Path, folder: Path) -> Any:
    """The adapter in PEFT, after comparing its keys with the file's both ways, and their shapes."""
    model = PeftModel.from_pretrained(model_in(base), folder)
    wanted = get_peft_model_state_dict(model, save_embedding_layers=False)
    file = load_file(folder / "adapter_model.safetensors")
    assert set(file) - set(wanted) == set()
    assert set(wanted) - set(file) == set()
    for name, tensor in wanted.items():
        assert torch.equal(tensor, file[name]), name
    return model


# name: (family, config changes, type, target)
CASES: dict[str, tuple[str, dict[str, Any], str, tuple[str, ...]]] = {
    "attention": ("qwen3_moe", {}, "lora", ATTENTION),
    "q and v": ("qwen3_moe", {}, "lora", ("q_proj", "v_proj")),
    "all-linear": ("qwen3_moe", {}, "lora", ("all-linear",)),
    "all-router": ("qwen3_moe", MIXED, "rslora", EVERYTHING),
    "dense MLP in a mixture": ("qwen3_moe", MIXED, "lora", ("mlp.up_proj", "mlp.down_proj")),
    "one layer": ("qwen3_moe", MIXED, "lora", ("model.layers.2.*",)),
    "gate and up alone": ("qwen3_moe", {}, "rslora", ("gate_proj", "up_proj")),
    "down alone": ("qwen3_moe", {}, "lora", ("experts.down_proj",)),
    "olora": ("qwen3_moe", MIXED, "olora", EVERYTHING),
    "pissa": ("qwen3_moe", MIXED, "pissa", EVERYTHING),
    "dora": ("qwen3_moe", {}, "dora", ("q_proj", "v_proj", "o_proj")),
    "mixtral": ("mixtral", {}, "lora", ("all-router",)),
    "mixtral by its own names": ("mixtral", {}, "pissa", ("w1", "w3", "block_sparse_moe.gate")),
    "llama": ("llama", {}, "pissa", ("all-linear",)),
    "qwen3": ("qwen3", {}, "dora", ("all-linear",)),
    "qwen2": ("qwen2", {}, "dora", ("all-linear",)),
    "qwen2_moe": ("qwen2_moe", {}, "lora", ("all-router",)),
    "gpt_oss": ("gpt_oss", {}, "lora", ("all-router",)),
    "attention with biases": ("llama", {"attention_bias": True}, "dora", ("o_proj", "q_proj")),
}


@pytest.mark.parametrize("case", CASES)
def test_peft_and_the_merged_model_agree(tmp_path: Path, case: str) -> None:
    family, changes, type, target = CASES[case]
    base, folder, plain = tmp_path / "base", tmp_path / "adapter", tmp_path / "merged"
    save_model(family, base, **changes)
    exported(base, spec_of(type, *target), folder)
    merge(base, folder, plain)
    assert not list(compare(base, plain, adapters=(folder, None)))
    assert not list(compare(plain, base, adapters=(None, folder)))
    before, adapted = logits_of(model_in(base)), logits_of(in_peft(base, folder))
    after = logits_of(model_in(plain))
    assert (adapted - before).abs().max() > 1e-2
    assert (adapted - after).abs().max() < 1e-4


@pytest.mark.parametrize("type", PEFT_TYPES)
def test_an_untrained_adapter_changes_nothing(tmp_path: Path, type: str) -> None:
    base, folder = tmp_path / "base", tmp_path / "adapter"
    save_model("qwen3_moe", base)
    exported(base, spec_of(type, *(ATTENTION if type == "dora" else EVERYTHING)), folder, steps=0)
    gap = logits_of(in_peft(base, folder)) - logits_of(model_in(base))
    assert gap.abs().max() < 1e-5


@pytest.mark.parametrize("type", ["olora", "pissa", "dora", "lora"])
def test_first_values_are_pefts(tmp_path: Path, type: str) -> None:
    """On attention, where PEFT can; A of plain LoRA is random there and here, so its bound."""
    base = tmp_path / "base"
    save_model("qwen3_moe", base)
    table, reader = table_on(base, spec_of(type, *ATTENTION))
    initial = InitialAdapter(reader, table, 0)
    theirs: Any = get_peft_model(
        model_in(base),
        LoraConfig(r=4, lora_alpha=6, target_modules=list(ATTENTION), **PEFT_TYPES[type]),
    )
    wanted = get_peft_model_state_dict(theirs)
    assert len(wanted) == len(initial.names())
    for name in initial.names():
        ours, other = whole(initial, name), wanted[f"base_model.model.{name}"]
        if type in ("dora", "lora") and "lora_A" in name:
            assert ours.shape == other.shape and ours.unique().numel() > 0.9 * ours.numel()
            assert 0.97 < ours.abs().max() * ours.shape[1] ** 0.5 <= 1
        else:
            torch.testing.assert_close(ours, other, rtol=1e-4, atol=1e-5)
    left = {n: p for n, p in theirs.named_parameters() if "base_layer" in n}
    residual = reader if table.spec.starts_at_base else Residual(reader, initial)
    for name, tensor in left.items():
        key = name.removeprefix("base_model.model.").replace(".base_layer", "")
        torch.testing.assert_close(whole(residual, key), tensor.detach(), rtol=1e-4, atol=1e-5)


def test_an_experts_gate_and_up_are_factored_as_one(tmp_path: Path) -> None:
    """By the singular values: s B0 A0 is the best approximation of [gate; up] of its rank."""
    base = tmp_path / "base"
    save_model("qwen3_moe", base)
    table, reader = table_on(base, spec_of("pissa", "experts"))
    matrix = table.matrices["model.layers.2.mlp.experts.3.gate_up_proj"]
    initial = InitialAdapter(reader, table, 0)
    w = torch.cat([whole(reader, key) for key in matrix.weights])
    left = torch.cat([whole(Residual(reader, initial), key) for key in matrix.weights])
    wanted = torch.linalg.svdvals(w)[4:].square().sum()
    torch.testing.assert_close(left.square().sum(), wanted, rtol=1e-4, atol=0)
    a, b = initial.factors(matrix)
    torch.testing.assert_close(left + table.spec.scale * b @ a, w, rtol=0, atol=1e-6)


# Continuing


def made_by_peft(base: Path, folder: Path, **fields: Any) -> Any:
    """An adapter that PEFT made and saved, not at its first values."""
    model: Any = get_peft_model(model_in(base), LoraConfig(r=4, lora_alpha=6, **fields))
    torch.manual_seed(2)
    with torch.no_grad():
        for name, param in model.named_parameters():
            if "lora_" in name:
                param += torch.randn_like(param) * 0.05
    model.save_pretrained(folder)
    return model


MADE: dict[str, dict[str, Any]] = {
    "attention": {"target_modules": list(ATTENTION)},
    "q and v": {"target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.1},
    "experts": {
        "target_modules": ["o_proj"],
        "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        "use_rslora": True,
    },
    "router": {"target_modules": [], "target_parameters": ["mlp.gate.weight"]},
    "gate and up": {"target_modules": [], "target_parameters": ["mlp.experts.gate_up_proj"]},
    "down": {"target_modules": [], "target_parameters": ["mlp.experts.down_proj"]},
    # transformers 4's names: PEFT doubles the rank of gate_up_proj
    "old names": {"target_modules": ["q_proj", "gate_proj", "up_proj", "down_proj"]},
    "dora": {"target_modules": ["q_proj", "v_proj"], "use_dora": True},
    "pissa": {"target_modules": ["q_proj", "o_proj"], "init_lora_weights": "pissa"},
    "olora": {"target_modules": ["q_proj", "o_proj"], "init_lora_weights": "olora"},
    "olora, rslora": {
        "target_modules": ["q_proj", "o_proj"],
        "init_lora_weights": "olora",
        "use_rslora": True,
    },
}


@pytest.mark.parametrize("case", MADE)
def test_pefts_own_folder_is_read(tmp_path: Path, case: str) -> None:
    """Its merged logits are PEFT's; and from the engine's shards it comes back as it was."""
    base, folder, again = (tmp_path / name for name in ("base", "theirs", "again"))
    save_model("qwen3_moe", base)
    model = made_by_peft(base, folder, **MADE[case])
    merge(base, folder, tmp_path / "merged")
    wanted = logits_of(model)
    assert (wanted - logits_of(model_in(base))).abs().max() > 1e-2
    gap = logits_of(model_in(tmp_path / "merged")) - wanted
    assert gap.abs().max() < 1e-4

    model, reader = reader_of(config_in(base), base)
    found = PeftReader(folder, model, reader)
    assert found.spec.dropout == MADE[case].get("lora_dropout", 0.0)
    local = shards(found.table, found)
    for name in found.names():
        assert found.dtype(name) == torch.float32
    initial = InitialAdapter(reader, found.table, 0)
    tensors = {name: t.clone() for name, t in export(local, found.table, to="all")}
    write_peft(tensors.items(), dtypes_of(tensors), again, found.table, "base", initial)
    assert (logits_of(in_peft(base, again)) - wanted).abs().max() < 1e-4
    if case not in (
        "old names",
        "pissa",
        "olora",
        "olora, rslora",
    ):  # written with another rank than read
        before, after = (load_file(f / "adapter_model.safetensors") for f in (folder, again))
        assert before.keys() == after.keys()
        assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_our_own_folder_is_read_as_it_was_written(tmp_path: Path) -> None:
    base, folder = tmp_path / "base", tmp_path / "adapter"
    save_model("qwen3_moe", base, **MIXED)
    table, tensors = exported(base, spec_of("rslora", *EVERYTHING), folder)
    found = PeftReader(folder, table.model, table_on(base, table.spec)[1])
    assert replace(found.spec, target=()) == replace(table.spec, target=())
    assert set(found.names()) == set(tensors)
    assert all(torch.equal(whole(found, name), tensor) for name, tensor in tensors.items())


@pytest.mark.gloo
@pytest.mark.parametrize("adapter", [True, False], ids=["read", "made"])
def test_every_layout_writes_the_same_folder(
    workers: Workers, tmp_path: Path, adapter: bool
) -> None:
    """Read from a folder, it is that folder to the bit."""
    base, folder = tmp_path / "base", tmp_path / "adapter"
    save_model("qwen3_moe", base, **MIXED)
    spec = spec_of("lora" if adapter else "pissa", "all-router")
    exported(base, spec, folder, steps=int(adapter))
    wanted = {path.name: path.read_bytes() for path in folder.iterdir()}
    given = folder if adapter else None
    for i, spread in enumerate([Spread(pp=2), Spread(tp=2), Spread(ep=2), Spread(etp=2)]):
        out = tmp_path / str(i)
        answers = workers.run(2, readapt, config_in(base), base, given, out, spec, spread)
        assert answers == ["", ""]
        name = "adapter_model.safetensors"
        assert (out / name).read_bytes() == wanted[name], spread
    (tmp_path / "file").write_text("")
    out = tmp_path / "file" / "out"
    answers = workers.run(2, readapt, config_in(base), base, given, out, spec, Spread(ep=2))
    assert answers[0] == answers[1] and "Not a directory" in answers[0]


def test_each_tensor_is_written_in_its_own_dtype(tmp_path: Path) -> None:
    """A router's adapter may have more bits than the others'; nothing is rounded."""
    save_model("qwen3_moe", tmp_path / "base")
    table, reader = table_on(tmp_path / "base", spec_of("lora", "all-router"))
    tensors: dict[str, Tensor] = {}
    for name, tensor in export(shards(table, InitialAdapter(reader, table, 3)), table, to="all"):
        wide = ".mlp.gate." in name
        tensors[name] = torch.randn_like(tensor).to(torch.float32 if wide else torch.bfloat16)
    write_peft(tensors.items(), dtypes_of(tensors), tmp_path / "adapter", table, "base")
    found = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in found.values()} == {torch.float32, torch.bfloat16}
    for name, tensor in found.items():
        given = tensors.get(name.removeprefix("base_model.model."))
        if given is not None:  # experts are put together
            assert tensor.dtype == given.dtype and torch.equal(tensor, given), name


def test_a_reward_models_head_goes_along(tmp_path: Path) -> None:
    """The base is a language model; PEFT has the adapter on transformers' classification model."""
    base, folder, plain = (tmp_path / name for name in ("base", "adapter", "merged"))
    save_model("qwen3_moe", base)
    hf = with_scalar_head(config_in(base))
    model, reader = read_model(hf), reader_of(config_in(base), base)[1]
    table = adapter_table(model, spec_of("lora", "all-linear"))
    local = shards(table, InitialAdapter(reader, table, 3))
    train(local, table)
    head = torch.randn(1, 48)
    tensors = {name: t.clone() for name, t in export(local, table, to="all")}
    tensors["score.weight"] = head
    write_peft(tensors.items(), dtypes_of(tensors), folder, table, str(base))
    merge(base, folder, plain)
    theirs: Any = PeftModel.from_pretrained(
        AutoModelForSequenceClassification.from_pretrained(base, num_labels=1), folder
    )
    file = load_file(folder / "adapter_model.safetensors")
    assert set(file) == set(get_peft_model_state_dict(theirs))
    ours = AutoModelForSequenceClassification.from_pretrained(plain)
    tokens = torch.arange(20)[None] * 7 % 200
    with torch.no_grad():
        gap = theirs.eval()(tokens).logits - ours.eval()(tokens).logits
    assert gap.shape == (1, 1) and gap.abs().max() < 1e-4
    again = PeftReader(folder, model, reader)
    assert again.head is not None and torch.equal(again.head, head)
    with pytest.raises(WeightsError, match="of a reward or classification model"):
        PeftReader(folder, read_model(config_in(base)), reader)


@pytest.mark.parametrize("style", ["moetrain", "megatron-lm"])
def test_an_adapter_is_merged_on_the_way(
    tmp_path: Path, style: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Into a Megatron checkpoint, out of one, and into either side that is compared."""
    base, folder, plain = (tmp_path / name for name in ("base", "adapter", "merged"))
    save_model("qwen3_moe", base, num_hidden_layers=2).bfloat16().save_pretrained(base)
    exported(base, spec_of("lora", "all-linear"), folder)
    merge(base, folder, plain)
    mcore, other = tmp_path / "mcore", tmp_path / "other"

    def convert(*words: Any) -> int:
        return cli.main(["convert", *map(str, words)])

    assert convert("hf2mcore", base, mcore, "--style", style, "--adapter", folder) == 0
    assert convert("hf2mcore", base, other, "--style", style) == 0
    more = ["--hf", base] if style == "megatron-lm" else []
    assert convert("mcore2hf", other, tmp_path / "hf", "--adapter", folder, *more) == 0
    wanted = load_file(plain / "model.safetensors")
    found = load_file(tmp_path / "hf/model.safetensors")
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
    assert convert("verify", mcore, plain) == 0
    capsys.readouterr()
    assert convert("verify", other, mcore, "--adapter", folder) == 0
    said = capsys.readouterr().out
    assert f"{other} with {folder} in it and {mcore} hold the same weights" in said
    assert convert("verify", other, plain, "--adapter", folder, "--logits", "8") == 0
    assert "differ by up to 0;" in capsys.readouterr().out
    assert convert("verify", base, plain) == 1
    out = capsys.readouterr().out
    assert "q_proj.weight" in out and "layernorm" not in out
    assert convert("verify", folder, plain) == 2
    assert f"is an adapter. Give its base, and --adapter {folder}." in capsys.readouterr().err


def test_merging_keeps_each_dtype(tmp_path: Path) -> None:
    """W + s B A is rounded once."""
    base, folder, plain = (tmp_path / name for name in ("base", "adapter", "merged"))
    save_model("qwen3_moe", base).bfloat16().save_pretrained(base)
    table, tensors = exported(base, spec_of("lora", "down_proj"), folder)
    merge(base, folder, plain)
    before, after = (reader_of(config_in(f), f)[1] for f in (base, plain))
    matrix = table.matrices["model.layers.1.mlp.experts.4.down_proj"]
    product = tensors[f"{matrix.name}.lora_B.weight"] @ tensors[f"{matrix.name}.lora_A.weight"]
    wanted = (whole(before, matrix.weights[0]).float() + 1.5 * product).bfloat16()
    assert torch.equal(whole(after, matrix.weights[0]), wanted)
    differ = {difference.name for difference in compare(base, plain)}
    assert differ == {key for m in table.matrices.values() for key in m.weights}


def test_peft_takes_a_mixtures_dense_mlp_for_its_experts(tmp_path: Path) -> None:
    """Why it is written as parameters; when this fails, `is_parameter` need not know of it."""
    base = tmp_path / "base"
    save_model("qwen3_moe", base, **MIXED)
    theirs: Any = get_peft_model(
        model_in(base), LoraConfig(r=4, target_modules=["gate_proj", "up_proj", "down_proj"])
    )
    adapted = {name for name in get_peft_model_state_dict(theirs) if "layers.1." in name}
    assert adapted == set()


def _edit(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _tensors(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")


Q = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
EXPERTS = "base_model.model.model.layers.0.mlp.experts.lora_A.weight"
UNREADABLE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no folder": (lambda f: f.rename(f.with_name("away")), "adapter_config.json: not readable"),
    "no tensors": (lambda f: (f / "adapter_model.safetensors").unlink(), "is not there"),
    "config no JSON": (lambda f: (f / "adapter_config.json").write_text("{"), "not readable"),
    "config a list": (lambda f: (f / "adapter_config.json").write_text("[]"), "not a mapping"),
    "config empty": (lambda f: (f / "adapter_config.json").write_text("{}"), "not a LoRA config"),
    "file cut short": (
        lambda f: (f / "adapter_model.safetensors").write_bytes(b"12345678"),
        "not a whole safetensors file",
    ),
    "another kind": (lambda f: _edit(f, peft_type="IA3"), 'peft_type = "IA3" .* allowed: "LORA"'),
    "biases": (lambda f: _edit(f, bias="all"), "bias"),
    "a base that is changed": (
        lambda f: _edit(f, init_lora_weights="pissa_niter_4"),
        "init_lora_weights = 'pissa_niter_4' changed the base",
    ),
    "two scales": (
        lambda f: _edit(f, alpha_pattern={"q_proj": 1}),
        "q_proj is scaled by 0.25 and .* by 1.5; one",
    ),
    "another rank": (lambda f: _edit(f, r=2), r"q_proj.lora_A.weight is \[4, 48\].* \[2, 48\]"),
    "wider": (
        lambda f: _tensors(f, lambda t: t.update({Q.format("A"): torch.zeros(4, 64)})),
        r"layers.0.self_attn.q_proj.lora_A.weight is \[4, 64\].* \[4, 48\]: dimension 1 is not",
    ),
    "more experts": (
        lambda f: _tensors(f, lambda t: t.update({EXPERTS: torch.zeros(32, 28)})),
        r"experts.lora_A.weight is \[32, 28\], this model asks for \[24, 28\]: dimension 0",
    ),
    "deeper": (
        lambda f: _tensors(
            f, lambda t: t.update({Q.format("A").replace("s.0", "s.9"): torch.zeros(4, 48)})
        ),
        "layers.9.self_attn.q_proj.lora_A.weight has no place in this model",
    ),
    "B gone": (lambda f: _tensors(f, lambda t: t.pop(Q.format("B"))), "q_proj.lora_B.* missing"),
    "a head of its own": (
        lambda f: _tensors(f, lambda t: t.update({"base_model.model.x": torch.zeros(1)})),
        "x is no LoRA tensor",
    ),
    "empty": (lambda f: _tensors(f, lambda t: t.clear()), "holds no tensors"),
    "no number": (
        lambda f: _tensors(f, lambda t: t[Q.format("B")].__setitem__((3, 1), torch.nan)),
        "q_proj.weight has values that are not finite",
    ),
    "which parameter": (
        lambda f: (
            _edit(f, target_parameters=None),
            _tensors(f, lambda t: [t.pop(k) for k in list(t) if "base_layer" in k]),
        ),
        r"target_parameters = \[\] does not say which",
    ),
}


@pytest.mark.parametrize("case", UNREADABLE)
def test_a_folder_that_does_not_fit_is_one_line(tmp_path: Path, case: str) -> None:
    base, folder = tmp_path / "base", tmp_path / "adapter"
    save_model("qwen3_moe", base, num_hidden_layers=1)
    exported(base, spec_of("lora", "all-linear"), folder)
    (folder / "manifest.json").unlink()  # as PEFT has none
    damage, message = UNREADABLE[case]
    damage(folder)
    with pytest.raises(WeightsError, match=message) as caught:
        merge(base, folder, tmp_path / "merged")
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "merged").exists()


# Targets


def small_table(type: str, *target: str, rank: int = 4, **changes: Any) -> AdapterTable:
    hf = CONFIGS["qwen3_moe"] | MIXED | changes
    return adapter_table(read_model(hf), spec_of(type, *target, rank=rank))


@pytest.mark.parametrize(
    ("type", "target", "rank", "message"),
    [
        ("lora", ["q_prj"], 4, r"'q_prj' matches nothing of this model.* Did you mean 'q_proj'"),
        ("lora", ["q_proj", "layers.3"], 4, "'layers.3' matches nothing"),
        ("lora", ["lm_head"], 4, "'lm_head' matches nothing"),
        ("lora", ["all-linear"], 30, r"rank=30 is larger than .*\[48, 28\]; take at most 28"),
        ("lora", ["mlp.gate"], 8, r"rank=8 is larger than .*mlp.gate, which is \[6, 48\]"),
        ("lora", ["gate_proj"], 4, "share an A; target both or neither, not all but .*up_proj"),
        ("lora", ["experts.3"], 4, "all experts of the layer; target all of them or none"),
        ("dora", ["all-linear"], 4, "PEFT cannot hold DoRA on model.layers.0.mlp.experts"),
        ("dora", ["mlp.gate"], 4, "PEFT cannot hold DoRA on model.layers.0.mlp.gate"),
        ("dora", ["layers.1"], 4, "PEFT cannot hold DoRA on model.layers.1.mlp.gate_proj"),
    ],
)
def test_bad_targets_are_one_line(type: str, target: list[str], rank: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        small_table(type, *target, rank=rank)
    assert "adapter." in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("target", "modules", "parameters"),
    [
        (["q_proj", "v_proj"], ["q_proj", "v_proj"], []),
        (["*.self_attn.*"], sorted(ATTENTION), []),
        (["experts"], [], ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"]),
        (["mlp.gate"], [], ["mlp.gate.weight"]),
        (["layers.1.mlp.*"], [], [f"mlp.{n}_proj.weight" for n in ("down", "gate", "up")]),
        (["model.layers.?.self_attn.q_*"], ["q_proj"], []),
        (["layers.0.self_attn.q_proj"], ["model.layers.0.self_attn.q_proj"], []),
        (["layers.2.mlp.experts.down_proj"], [], ["model.layers.2.mlp.experts.down_proj"]),
    ],
)
def test_targets_in_pefts_words(
    target: list[str], modules: list[str], parameters: list[str]
) -> None:
    table = small_table("lora", *target)
    assert targets(table) == (modules, parameters)
    assert config_of(table, "base")["target_modules"] == modules
    # PEFT 0.20 opens no adapter of parameters that has dropout.
    dropping = replace(table, spec=replace(table.spec, dropout=0.1))
    assert config_of(dropping, "base")["lora_dropout"] == (0.0 if parameters else 0.1)


def test_all_linear_leaves_router_and_head_alone() -> None:
    kinds = {matrix.kind for matrix in small_table("lora", "all-linear").matrices.values()}
    assert kinds == {"attention", "mlp", "experts"}
    kinds = {matrix.kind for matrix in small_table("lora", "all-router").matrices.values()}
    assert kinds == {"attention", "mlp", "experts", "router"}


def test_a_folder_says_what_it_is() -> None:
    with pytest.raises(ValueError, match=r"adapter\.path says what adapter\.rank is; leave"):
        AdapterConfig.model_validate({"path": "a", "rank": 8})
    config = AdapterConfig.model_validate({"path": "a"})
    assert AdapterConfig.model_validate(config.model_dump()) == config  # as in resolved.yaml
    assert config.dropout is None and AdapterConfig().dropout == 0  # with a path it is the folder's


def test_only_targeted_parts_are_live() -> None:
    table = small_table("dora", "q_proj", "v_proj")
    for tensors in ("lora_A", "lora_B", "lora_magnitude"):
        assert table.parts(f"decoder.layers.0.self_attention.linear_qkv.{tensors}") == (
            True,
            False,
            True,
        )
    assert len(table) == 3 * 3


def test_trainable_patterns_name_parameters() -> None:
    hf = CONFIGS["qwen3_moe"]
    table = read_model(hf).table
    assert trainable_names(table, ["layers.2"]) == {
        n for n in table if n.startswith("decoder.layers.2.")
    }
    assert trainable_names(table, ["mlp.gate", "norm"]) == {
        "decoder.final_layernorm.weight",
        *(f"decoder.layers.{layer}.mlp.router.weight" for layer in range(4)),
    }
    with pytest.raises(ConfigError, match="'norms' matches nothing"):
        trainable_names(table, ["lm_head", "norms"])
    with pytest.raises(ConfigError, match=r"q_proj\.weight cannot be taken without .*k_proj"):
        trainable_names(table, ["q_proj"])
    with pytest.raises(ConfigError, match=r"cannot be taken without model\.layers\.0\.mlp\.exp"):
        trainable_names(table, ["experts.1"])


# Layouts


@st.composite
def tables(draw: st.DrawFn) -> tuple[AdapterTable, Mapping[str, Rule], int]:
    tp = draw(st.sampled_from([1, 2, 4]))
    groups = draw(st.sampled_from([1, 2, 4]))
    heads = groups * draw(st.sampled_from([4, 8]))
    hf = CONFIGS["qwen3_moe"] | {
        "mlp_only_layers": [1],
        "num_hidden_layers": 2,
        "num_experts": 2,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "intermediate_size": 4 * draw(st.integers(1, 5)),
        "moe_intermediate_size": 4 * draw(st.integers(1, 5)),
        "hidden_size": draw(st.sampled_from([4, 6, 10])),
    }
    model = read_model(hf)
    target = draw(
        st.sampled_from([("all-router",), ("q_proj", "v_proj"), ("layers.1.mlp.up_proj",)])
    )
    spec = spec_of("lora", *target, rank=draw(st.integers(1, 2)))
    return adapter_table(model, spec), model.table, tp


def cut(rule: Rule, tensors: dict[str, Tensor], rank: int, tp: int) -> Tensor:
    slices = rule.sharding.parts(rank, tp)
    parts = tuple(tensors[key][part] for key, part in zip(rule.hf, slices, strict=True))
    return rule.sharding.pack(parts, rank, tp)


@settings(max_examples=40, deadline=None)
@given(tables())
def test_shards_are_exact_and_make_the_shard_of_the_product(
    case: tuple[AdapterTable, Mapping[str, Rule], int],
) -> None:
    """At every rank: unpack undoes pack; and B A of the shards, each row with the A of its part, is
    the shard of the Hugging Face matrices' B A.
    """
    table, base, tp = case
    torch.manual_seed(0)
    tensors = {
        key: torch.randint(-9, 9, shape).double()
        for rule in table.values()
        for key, shape in zip(rule.hf, rule.hf_shapes, strict=True)
    }
    product: dict[str, Tensor] = {}
    for name, rule in table.items():
        if ".lora_B" not in name:
            continue
        a_keys = table[name.replace(".lora_B", ".lora_A")].hf
        for i, (key, weight) in enumerate(zip(rule.hf, table.base[name].hf, strict=True)):
            product[weight] = tensors[key] @ tensors[a_keys[i % len(a_keys)]]
    for name, rule in table.items():
        back: list[list[Tensor]] = []
        for rank in range(tp):
            local = cut(rule, tensors, rank, tp)
            assert tuple(local.shape) == rule.local_shape(rank, tp)
            back.append(list(rule.sharding.unpack(local, rank, tp)))
            if ".lora_B" not in name:
                continue
            weight = table.base[name]
            a = cut(table[name.replace(".lora_B", ".lora_A")], tensors, rank, tp)
            of_part = a.reshape(-1, table.spec.rank, a.shape[1])
            rows = row_parts(rule, rank, tp) if of_part.shape[0] > 1 else [0] * len(local)
            made = torch.stack([b @ of_part[part] for b, part in zip(local, rows, strict=True)])
            assert torch.equal(made, cut(base[weight.name], product, rank, tp)), name
        dim = rule.sharding.dim
        for i, key in enumerate(rule.hf):
            parts = [rank[i] for rank in back]
            whole_again = parts[0] if dim is None else torch.cat(parts, dim)
            assert torch.equal(whole_again, tensors[key]), key
