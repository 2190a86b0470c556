"""Megatron-LM's folders, both ways: Megatron-LM itself (tests/megatron_lm_peer.py, which imports
nothing of moetrain) loads what is written, and what it saves is read.
"""

import io
import json
import os
import shutil
import subprocess
import sys
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from moetrain import cli
from moetrain.errors import CheckpointError, MoetrainError, WeightsError
from moetrain.models import read_model
from moetrain.testing.tiny import CONFIGS, save_model
from moetrain.weights import convert, megatron_lm
from moetrain.weights.blobs import named, plain
from moetrain.weights.inspect import summary_of
from moetrain.weights.opening import open_model
from moetrain.weights.torch_index import read_index, write_index

PEER = Path(__file__).with_name("megatron_lm_peer.py")
FOR_MEGATRON_LM = convert.Options(style=megatron_lm.STYLE)
TP2_EP2 = (
    "--tensor-model-parallel-size 2 --expert-model-parallel-size 2 --sequence-parallel".split()
)
STRICT = ["--dist-ckpt-strictness", "raise_all"]

# name -> (family, changes): a mixture, a dense model that is tied, dense layers among mixtures with
# a shared expert and biases.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixture": ("qwen3_moe", {}),
    "tied": ("qwen3", {}),
    "mixed": ("qwen2_moe", {"mlp_only_layers": [1]}),
}


class Peer:
    """Megatron-LM."""

    def __init__(self) -> None:
        own = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", str(PEER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=own | {"CUDA_DEVICE_MAX_CONNECTIONS": "1", "OMP_NUM_THREADS": "1"},
        )

    def __call__(self, do: str, hf: Path, at: Path, flags: list[str], **more: Any) -> Any:
        assert self.process.stdin and self.process.stdout
        job = {"do": do, "hf": str(hf), "at": str(at), "ranks": 2, "flags": flags} | more
        print(json.dumps(job), file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())


@pytest.fixture(scope="module")
def peer() -> Iterator[Peer]:
    """One process, since importing Megatron costs seconds."""
    peer = Peer()
    yield peer
    peer.process.communicate(timeout=30)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Hugging Face folders."""
    folder = tmp_path_factory.mktemp("models")
    for name, (family, changes) in MODELS.items():
        save_model(family, folder / name, **changes)
    return {name: folder / name for name in MODELS}


@pytest.fixture(scope="module")
def written(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Of each its folder for Megatron-LM."""
    folder = tmp_path_factory.mktemp("written")
    for name, source in models.items():
        convert.hf2mcore(source, folder / name, FOR_MEGATRON_LM)
    return {name: folder / name for name in models}


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("mixture", [*TP2_EP2, *STRICT]),
        # What the checkpoint says of the model, and the flags that the conversion prints.
        ("tied", ["--tensor-model-parallel-size", "2", *STRICT]),
        ("mixed", TP2_EP2 + STRICT),
    ],
)
def test_megatron_lm_loads_what_is_written(
    peer: Peer, models: dict[str, Path], written: dict[str, Path], name: str, flags: list[str]
) -> None:
    if name == "tied":
        flags = [*flags, *megatron_lm.flags(open_model(models[name]).model).split()]
    answer = peer("load", models[name], written[name], flags)
    assert answer["error"] is None
    assert answer["different"] == []
    assert answer["parameters"] > 40


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("mixture", TP2_EP2),
        ("tied", ["--tensor-model-parallel-size", "2"]),
        ("mixed", TP2_EP2),
    ],
)
def test_what_megatron_lm_saves_is_read(
    peer: Peer, models: dict[str, Path], tmp_path: Path, name: str, flags: list[str]
) -> None:
    source, saved = models[name], tmp_path / "saved"
    answer = peer("save", source, saved, flags)
    assert answer["error"] is None
    is_stacked = "decoder.layers.self_attention.linear_qkv.weight" in _keys(saved / "iter_0000007")
    assert is_stacked == (name != "mixed")
    assert cli.main(["convert", "verify", str(saved), str(source)]) == 0
    convert.mcore2hf(saved, tmp_path / "hf", config=source / "config.json")
    for file in ("model.safetensors", "generation_config.json"):
        assert (tmp_path / "hf" / file).read_bytes() == (source / file).read_bytes()
    assert summary_of(saved).style == "megatron-lm"


def _keys(checkpoint: Path) -> set[str]:
    index = read_index(checkpoint)
    return {*index.tensors, *index.values}


# What Transformer Engine 2.20.2's layers ask for (Qwen3-MoE with a shared expert and a dense first
# layer, one expert, on the meta device).
EXTRA_STATES = """
decoder.layers.0.self_attention.linear_proj._extra_state/shard_0_1
decoder.layers.0.self_attention.linear_qkv._extra_state/shard_0_1
decoder.layers.0.self_attention.q_layernorm._extra_state/shard_0_1
decoder.layers.0.self_attention.k_layernorm._extra_state/shard_0_1
decoder.layers.0.mlp.linear_fc1._extra_state/shard_0_1
decoder.layers.0.mlp.linear_fc2._extra_state/shard_0_1
decoder.layers.1.self_attention.linear_proj._extra_state/shard_0_1
decoder.layers.1.self_attention.linear_qkv._extra_state/shard_0_1
decoder.layers.1.self_attention.q_layernorm._extra_state/shard_0_1
decoder.layers.1.self_attention.k_layernorm._extra_state/shard_0_1
decoder.layers.1.pre_mlp_layernorm._extra_state/shard_0_1
decoder.layers.1.mlp.experts.experts.linear_fc1._extra_state/shard_0_2
decoder.layers.1.mlp.experts.experts.linear_fc1._extra_state/shard_1_2
decoder.layers.1.mlp.experts.experts.linear_fc2._extra_state/shard_0_2
decoder.layers.1.mlp.experts.experts.linear_fc2._extra_state/shard_1_2
decoder.final_layernorm._extra_state/shard_0_1
""".split()


def test_extra_states_are_those_of_transformer_engine() -> None:
    changes = dict(num_hidden_layers=2, num_experts=2, mlp_only_layers=[0])
    model = read_model(CONFIGS["qwen3_moe"] | changes)
    assert sorted(megatron_lm.extra_states(model)) == sorted(EXTRA_STATES)
    shared = read_model(CONFIGS["qwen2_moe"])
    assert {
        f"decoder.layers.3.mlp.shared_experts.linear_fc{i}._extra_state/shard_0_1" for i in (1, 2)
    } < {*megatron_lm.extra_states(shared)}


def test_the_common_state_is_plain(written: dict[str, Path]) -> None:
    """Megatron reads it with weights_only=True, where a Namespace is among what it allows."""
    import torch

    release = written["mixed"] / "release"
    index = read_index(release)
    at = index.values["common_state/shard_0_1"]
    with (release / at.file).open("rb") as file:
        file.seek(at.start)
        inside = io.BytesIO(file.read(at.length))
    with torch.serialization.safe_globals([Namespace]):
        common = torch.load(release / "common.pt", weights_only=True)
        assert torch.load(inside, weights_only=True) == [common]
    given = vars(common.pop("args"))
    assert common == {
        "iteration": 0,
        "checkpoint_version": 3.0,
        "content_metadata": {"non_homogeneous_layers": True, "singleton_local_shards": False},
    }
    wanted = {
        "num_layers": 4,
        "ffn_hidden_size": 80,
        "num_query_groups": 4,
        "kv_channels": 8,
        "add_qkv_bias": True,
        "qk_layernorm": False,
        "untie_embeddings_and_output_weights": True,
        "padded_vocab_size": 256,
        "rotary_base": 10000,
        "moe_layer_freq": [1, 0, 1, 1],
        "moe_ffn_hidden_size": 28,
        "moe_router_pre_softmax": True,
        "moe_shared_expert_intermediate_size": 36,
    }
    assert {name: given[name] for name in wanted} == wanted


def test_a_killed_conversion_goes_on(models: dict[str, Path], tmp_path: Path) -> None:
    dst = tmp_path / "dst"
    resumed = replace(FOR_MEGATRON_LM, resume=True)
    convert.hf2mcore(models["tied"], dst, FOR_MEGATRON_LM)
    whole = (dst / "release" / "manifest.json").read_bytes()
    (dst / megatron_lm.TRACKER).unlink()  # killed before it
    convert.hf2mcore(models["tied"], dst, resumed)
    assert (dst / megatron_lm.TRACKER).read_text() == "release"
    (dst / megatron_lm.TRACKER).unlink()
    (dst / "release").rename(dst / ".release.part")  # and before that
    convert.hf2mcore(models["tied"], dst, resumed)
    assert (dst / "release" / "manifest.json").read_bytes() == whole
    with pytest.raises(CheckpointError, match=r"exists\. Give another folder or remove it"):
        convert.hf2mcore(models["tied"], dst, resumed)


def test_names_of_other_versions_are_read(
    models: dict[str, Path], written: dict[str, Path], tmp_path: Path
) -> None:
    """A mixture's norm as `--transformer-impl local` saves it, and an index of megatron-core 0.14,
    which names a class of Megatron's.
    """
    old = tmp_path / "iter_0000001"
    shutil.copytree(written["mixture"] / "release", old)
    for name in ("manifest.json", "moetrain.json"):
        (old / name).unlink()
    index = read_index(old)
    local = "mlp.linear_fc1.layer_norm_weight"
    tensors = {k.replace("pre_mlp_layernorm.weight", local): v for k, v in index.tensors.items()}
    write_index(old / ".metadata", replace(index, tensors=tensors))
    content = (old / ".metadata").read_bytes()
    module = "megatron.core.dist_checkpointing.strategies.torch"
    plans = b"}" + plain("all_local_plans") + named(module, "MCoreSavePlan") + b")\x81sb"
    (old / ".metadata").write_bytes(content[:-1] + plans + b".")
    assert convert.verify(old, models["mixture"]) == 0
    (old / ".metadata").write_bytes(
        content[:-1] + plans.replace(b"MCoreSavePlan", b"load_common") + b"."
    )
    with pytest.raises(CheckpointError, match=f"it asks for {module}.load_common"):
        convert.verify(old, models["mixture"])


@pytest.mark.parametrize(
    ("tracker", "message"),
    [
        ("12", "names iter_0000012, which is not there. Give one that is: iter_0000007."),
        ("soon", "says 'soon', which is neither an iteration nor 'release'. Give .*iter_0000007."),
        (None, "has no latest_checkpointed_iteration.txt. Give one of its folders: iter_0000007."),
    ],
)
def test_a_tracker_names_what_is_there(tmp_path: Path, tracker: str | None, message: str) -> None:
    (tmp_path / "iter_0000007").mkdir()
    if tracker is not None:
        (tmp_path / megatron_lm.TRACKER).write_text(tracker)
    with pytest.raises(CheckpointError, match=message):
        megatron_lm.checkpoint_in(tmp_path)


def test_other_formats_of_megatron_lm_are_named(tmp_path: Path) -> None:
    (tmp_path / "iter_0000007" / "mp_rank_00").mkdir(parents=True)
    (tmp_path / megatron_lm.TRACKER).write_text("7\n")
    with pytest.raises(CheckpointError, match=r"format 'torch', .*--ckpt-format torch_dist\."):
        open_model(tmp_path)
    (tmp_path / ".metadata").touch()
    (tmp_path / megatron_lm.TRACKER).unlink()
    with pytest.raises(CheckpointError, match=r"has no metadata.json, so it is not whole, or"):
        open_model(tmp_path)


def test_what_cannot_be_is_said(
    models: dict[str, Path], written: dict[str, Path], tmp_path: Path
) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(written["tied"], bare)
    for name in ("manifest.json", "moetrain.json"):
        (bare / "release" / name).unlink()
    config = json.loads((models["tied"] / "config.json").read_text())

    def refused(problem: str, **changes: Any) -> None:
        (tmp_path / "config.json").write_text(json.dumps(config | changes))
        with pytest.raises(MoetrainError, match=problem):
            convert.mcore2hf(bare, tmp_path / "hf", config=tmp_path / "config.json")
        assert not (tmp_path / "hf").exists()

    refused(
        "has 256 rows, fewer than its config's vocab_size of 300: .* at most 256", vocab_size=300
    )
    refused("tensors are missing: lm_head.weight", tie_word_embeddings=False)
    refused(r"linear_fc1.weight is .*, its config asks for", intermediate_size=96)
    refused("11 of 57 tensors are missing", num_hidden_layers=5)
    for other in (None, bare):
        with pytest.raises(
            MoetrainError, match=r"does not say what model it is\. Give .*--hf CONFIG"
        ):
            convert.mcore2hf(bare, tmp_path / "hf", config=other)
    with pytest.raises(MoetrainError, match=r"is no Megatron checkpoint\. Leave --hf away"):
        convert.mcore2hf(models["tied"], tmp_path / "hf", config=models["tied"])
    save_model("llama", tmp_path / "biased", attention_bias=True)
    with pytest.raises(WeightsError, match="no bias behind attention"):
        convert.hf2mcore(tmp_path / "biased", tmp_path / "dst", FOR_MEGATRON_LM)
    assert not (tmp_path / "dst").exists()
