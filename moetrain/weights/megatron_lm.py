"""Megatron-LM's folders: a tracker file that names one of several checkpoints, what it reads in a
checkpoint beside the weights, and where its names differ from those of moetrain's. No torch.

What is written here was loaded by Megatron-LM itself, from megatron-core 0.13 to 0.19.
"""

import argparse
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moetrain import files
from moetrain.errors import CheckpointError, WeightsError
from moetrain.models import Model, Rule
from moetrain.models.lookup import HF, NOTE
from moetrain.models.parts.rope import Llama3
from moetrain.models.rules import MCORE_LAYER
from moetrain.models.sharding import padded_rows
from moetrain.weights.torch_index import INDEX

STYLE = "megatron-lm"
TRACKER = "latest_checkpointed_iteration.txt"
RELEASE = "release"  # weights alone: no optimizer, no random state is looked for
COMMON_FILE = "common.pt"  # where megatron-core below 0.19 looks, and later ones look first
_CONFIG = "metadata.json"  # written last

# A mixture's norm has no linear layer to belong to, but with `--transformer-impl local` Megatron
# saves it as if it had (0.19); Transformer Engine's does not, so one cannot read the other's.
LOCAL_NAMES = {"pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight"}


def checkpoint_in(folder: Path) -> Path:
    """The checkpoint that the tracker file of `folder` names; `folder` itself where it has none.

    Raises CheckpointError where it names none that is there, or one in another format.
    """
    tracker = folder / TRACKER
    if not tracker.is_file():
        _refuse_other_formats(folder)
        return folder
    word = tracker.read_bytes()[:40].decode(errors="replace").strip()
    if word != RELEASE and not word.isdecimal():
        raise CheckpointError(
            f"{tracker} says {word!r}, which is neither an iteration nor {RELEASE!r}. Give one of"
            f" the folders beside it: {_there(folder)}."
        )
    named = folder / (RELEASE if word == RELEASE else f"iter_{int(word):07d}")
    if not named.is_dir():
        raise CheckpointError(
            f"{tracker} names {named.name}, which is not there. Give one that is: {_there(folder)}."
        )
    _refuse_other_formats(named)
    return named


def is_one(checkpoint: Path) -> bool:
    """Whether a checkpoint is of Megatron-LM's, or written for it."""
    beside = checkpoint.resolve().parent / TRACKER
    return beside.is_file() or not (checkpoint / NOTE).is_file()


def _there(folder: Path) -> str:
    names = [p.name for p in folder.iterdir() if re.fullmatch(r"iter_\d{7,}|release", p.name)]
    return ", ".join(sorted(names)[-4:]) or "none is"


def _refuse_other_formats(folder: Path) -> None:
    if not folder.is_dir():
        return
    names = {path.name for path in folder.iterdir()}
    if names & {NOTE, HF}:
        return
    way = "Load it in Megatron-LM and save it with --ckpt-format torch_dist."
    if any(name.startswith("mp_rank_") for name in names):
        raise CheckpointError(
            f"{folder} is in Megatron-LM's format 'torch', a file for each rank, and torch_dist is"
            f" read. {way}"
        )
    if INDEX in names and _CONFIG not in names:
        raise CheckpointError(
            f"{folder} has no {_CONFIG}, so it is not whole, or in Megatron-LM's format torch_dcp"
            f" or fsdp_dtensor, and torch_dist is read. {way}"
        )
    if INDEX not in names and any(name.startswith("iter_") for name in names):
        raise CheckpointError(
            f"{folder} has no {TRACKER}. Give one of its folders: {_there(folder)}."
        )


def check(model: Model) -> None:
    """WeightsError for what Megatron-LM has no model for."""
    problem = None
    if model.heads.scalar:
        problem = "no head of one number a token"
    if model.attention.output_bias:
        problem = "no bias behind attention without one in the MLP"
    if problem:
        raise WeightsError(
            f"Megatron-LM's GPT has {problem}, so it cannot load this model. Leave --style away"
            f" to get a checkpoint for moetrain."
        )


def common_state(model: Model) -> dict[str, Any]:
    """What Megatron-LM reads beside weights. `non_homogeneous_layers` has it look for one tensor a
    layer, whatever its own flags say (megatron-core 0.13 and later).
    """
    return {
        "args": argparse.Namespace(**arguments(model)),
        "iteration": 0,
        "checkpoint_version": 3.0,
        "content_metadata": {"non_homogeneous_layers": True, "singleton_local_shards": False},
    }


def arguments(model: Model) -> dict[str, Any]:
    """Megatron-LM's own names of what a model is. Its --use-checkpoint-args takes them up, but for
    those of `flags`. No tokenizer: it would overrule the user's.
    """
    attention, moe = model.attention, model.moe
    dense = model.dense.ffn if model.dense else moe.experts.ffn if moe else 0
    fields: dict[str, Any] = {
        "num_layers": model.num_layers,
        "hidden_size": model.hidden,
        "ffn_hidden_size": dense,
        "num_attention_heads": attention.heads,
        "group_query_attention": True,
        "num_query_groups": attention.groups,
        "kv_channels": attention.head_dim,
        "seq_length": model.max_positions,
        "max_position_embeddings": model.max_positions,
        "position_embedding_type": "rope",
        "add_position_embedding": True,
        "rotary_base": _whole(model.rope.theta),
        "rotary_percent": 1.0,
        "rotary_interleaved": False,
        "use_rope_scaling": isinstance(model.rope.scaling, Llama3),
        "add_bias_linear": False,
        "add_qkv_bias": attention.qkv_bias,
        "qk_layernorm": attention.qk_norm,
        "normalization": "RMSNorm",
        "norm_epsilon": model.norm_eps,
        "apply_layernorm_1p": False,
        "swiglu": True,
        "squared_relu": False,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "untie_embeddings_and_output_weights": not model.heads.tied,
        "make_vocab_size_divisible_by": 128,
        "padded_vocab_size": padded_rows(model.heads.vocab, 1),
        "data_parallel_random_init": False,
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
    }
    if moe is not None:
        fields |= {
            "num_experts": moe.experts.num,
            "moe_layer_freq": 1 if model.dense is None else [int(m) for m in model.moe_layers],
            "moe_ffn_hidden_size": moe.experts.ffn,
            "moe_router_topk": moe.router.top_k,
            "moe_router_score_function": "softmax",
            "moe_router_pre_softmax": not moe.router.renormalise,
            "moe_grouped_gemm": True,
        }
        if moe.shared is not None:
            fields["moe_shared_expert_intermediate_size"] = moe.shared.ffn
            fields["moe_shared_expert_gate"] = moe.shared.gated
    return fields


def _whole(theta: float) -> int | float:
    return int(theta) if theta == int(theta) else theta


def flags(model: Model) -> str:
    """What of a model Megatron-LM does not take from a checkpoint (0.19) and cannot do without: it
    ignores a weight that it has no place for.
    """
    flags = ["--use-checkpoint-args", f"--norm-epsilon {model.norm_eps:g}"]
    if model.attention.qk_norm:
        flags.append("--qk-layernorm")
    if model.moe is not None and model.moe.shared is not None and model.moe.shared.gated:
        flags.append("--moe-shared-expert-gate")
    if isinstance(model.rope.scaling, Llama3):
        flags.append(f"--use-rope-scaling --rope-scaling-factor {model.rope.scaling.factor:g}")
    return " ".join(flags)


def extra_states(model: Model) -> Iterator[str]:
    """Keys under which layers of Transformer Engine (2.x) look for what fp8 needs, and fail where
    there is nothing: linear layers, and norms that belong to none.
    """
    seen: set[str] = set()
    for rule in model.table.values():
        key = _extra_state(rule, model)
        if key is not None and key not in seen:
            seen.add(key)
            yield key


def _extra_state(rule: Rule, model: Model) -> str | None:
    module = rule.saved.rpartition(".")[0]
    leaf = module.rpartition(".")[2]
    if not leaf.startswith("linear_") and not leaf.endswith("layernorm"):
        return None
    layer = "" if rule.layer is None else MCORE_LAYER.format(l=rule.layer)
    place = "0_1" if rule.expert is None else f"{rule.expert}_{model.num_experts}"
    return f"{layer}{module}._extra_state/shard_{place}"


def refuse_taken(dst: Path, *, resume: bool) -> None:
    """CheckpointError unless `dst` is a new folder, or what a killed conversion left of it."""
    left = {f".{RELEASE}.part"} | ({RELEASE} if resume else set[str]())
    if dst.exists() and (not dst.is_dir() or {path.name for path in dst.iterdir()} - left):
        raise CheckpointError(f"{dst} exists. Give another folder or remove it.")


def name_release(dst: Path) -> None:
    """Write the tracker file, from when on Megatron-LM sees the checkpoint. Raises OSError."""
    files.write_text(dst / TRACKER, RELEASE)
