"""Broken model folders: headers, indexes, configs, adapters, manifests, a checkpoint's pickle."""

import contextlib
import copy
import io
import json
import pickle
import random
import shutil
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mutate

if TYPE_CHECKING:
    from targets import Bench

SHARD = "model-00001-of-00001.safetensors"
HEADER = {
    "a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
    "b": {"dtype": "BF16", "shape": [3], "data_offsets": [16, 22]},
    "__metadata__": {"format": "pt"},
}
INDEX = {"metadata": {"total_size": 22}, "weight_map": {"a": SHARD, "b": SHARD}}
ADAPTER = {
    "peft_type": "LORA", "r": 8, "lora_alpha": 16, "rank_pattern": {"q_proj": 4},
    "alpha_pattern": {".*k_proj": 2.0}, "target_parameters": ["mlp.experts.down_proj"],
    "task_type": "CAUSAL_LM", "init_lora_weights": True, "bias": "none", "modules_to_save": None,
    "base_model_name_or_path": "base", "use_rslora": False, "use_dora": False,
}  # fmt: skip
CONFIG = {
    "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "hidden_size": 48,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "intermediate_size": 96, "moe_intermediate_size": 28, "num_experts": 4, "vocab_size": 200,
    "num_experts_per_tok": 2, "mlp_only_layers": [1], "decoder_sparse_step": 1,
    "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "max_position_embeddings": 512,
    "eos_token_id": [3, 5], "layer_types": ["full_attention", "full_attention"],
    "rope_parameters": {
        "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 256,
    },
}  # fmt: skip
MANIFEST = {
    "files": {SHARD: [9_000_000, "0" * 64], "config.json": [3, "1" * 64]},
    "blocks": {SHARD: ["2" * 64] * 3},
    "block": 1 << 22,
    "sha256": "3" * 64,
}


def _changed(rng: random.Random, value: Any) -> Any:
    value = copy.deepcopy(value)
    for _ in range(rng.randrange(3)):
        mutate.change_value(rng, value)
    return value


def _text(value: Any) -> bytes:
    try:
        return json.dumps(value).encode(errors="surrogatepass")
    except RecursionError:
        return b'{"a": ' * 100_000


def make_weights(rng: random.Random) -> tuple[bytes, bytes]:
    """(a file of weights, the index beside it)."""
    header = _text(_changed(rng, HEADER))
    if rng.random() < 0.2:
        header = mutate.change_bytes(rng, header)
    length = len(header) if rng.random() < 0.9 else rng.choice([0, 1, 2**31, 2**63, 2**64 - 1])
    data = bytes(22 if rng.random() < 0.8 else rng.randrange(60))
    return struct.pack("<Q", length) + header + data, _text(_changed(rng, INDEX))


def run_weights(bench: "Bench", made: tuple[bytes, bytes]) -> str:
    from moetrain.weights.reader import SafetensorsReader

    folder = _fresh(bench)
    (folder / SHARD).write_bytes(made[0])
    (folder / "model.safetensors.index.json").write_bytes(made[1])
    reader = SafetensorsReader(folder)
    with contextlib.redirect_stdout(io.StringIO()):  # it says that there is no manifest
        for name in reader.names():
            reader.read(name, tuple(slice(0, size) for size in reader.shape(name)))
    return "used"


def make_notes(rng: random.Random) -> tuple[str, bytes]:
    """(which file it is, its content)."""
    name, value = rng.choice(list(NOTES.items()))
    text = _text(_changed(rng, value))
    return name, mutate.change_bytes(rng, text) if rng.random() < 0.1 else text


NOTES = {"adapter_config.json": ADAPTER, "config.json": CONFIG, "manifest.json": MANIFEST}


def run_notes(bench: "Bench", made: tuple[str, bytes]) -> str:
    from moetrain.manifest import Manifest
    from moetrain.models import read_model
    from moetrain.models.lookup import config_of
    from moetrain.weights.peft_config import rank_of, read_config, scale_of

    folder = _fresh(bench)
    (folder / made[0]).write_bytes(made[1])
    if made[0] == "config.json":
        hf, _ = config_of(folder)
        assert read_model(hf).table
    elif made[0] == "manifest.json":
        found = Manifest.of(folder)
        assert found is not None
        found.all_there()
    else:
        config = read_config(folder / made[0])
        module = "model.layers.1.self_attn.q_proj"
        scale_of(config, module, rank_of(config, module))
        config.expert_parameter("model.layers.0.mlp.experts", False, False)
    return "used"


def make_pickle(rng: random.Random) -> bytes:
    """A checkpoint's index."""
    import torch
    from torch.distributed.checkpoint import metadata as of
    from torch.distributed.checkpoint.filesystem import _StorageInfo

    names = [f"decoder.layers.{i}.weight" for i in range(4)]
    chunk = of.ChunkStorageMetadata(torch.Size([0, 0]), torch.Size([8, 8]))
    properties = of.TensorProperties(torch.float32)
    tensors: dict[str, Any] = {
        name: of.TensorStorageMetadata(properties, torch.Size([8, 8]), [chunk]) for name in names
    }
    places = {
        of.MetadataIndex(name, torch.Size([0, 0])): _StorageInfo("__0_0.distcp", 300 * i, 300)
        for i, name in enumerate(names)
    }
    content = pickle.dumps(of.Metadata(tensors, storage_data=places, storage_meta=of.StorageMeta()))
    for _ in range(rng.randrange(3)):
        content = mutate.change_bytes(rng, content)
    return content


def run_pickle(bench: "Bench", made: bytes) -> str:
    from moetrain.engine.pickles import index_of
    from moetrain.weights.torch_index import INDEX

    folder = _fresh(bench)
    (folder / INDEX).write_bytes(made)
    index_of(folder)
    return "used"


def _fresh(bench: "Bench") -> Path:
    folder = bench.folder / "model"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder


# name -> (weight, make, run)
FOLDERS: dict[str, tuple[int, Any, Any]] = {
    "weights": (8, make_weights, run_weights),
    "notes": (8, make_notes, run_notes),
    "pickles": (4, make_pickle, run_pickle),
}
