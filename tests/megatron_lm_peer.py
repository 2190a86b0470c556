"""Megatron-LM's side of a conversion, on CPU with gloo: its own command line, model and
checkpointing (megatron-core's wheel has `megatron.training`), its own idea of where a Hugging Face
tensor goes, and nothing of moetrain's.

A line of JSON on stdin is a job, a line on stdout its answer:

    {"do": "save" | "load", "hf": FOLDER, "at": CHECKPOINTS, "ranks": 4, "flags": ["--tensor-...]}
    {"parameters": 55, "different": ["rank 0: decoder..."], "error": null}

"save" gives the model the Hugging Face folder's values and calls `save_checkpoint`; "load" fills it
with NaN, calls `load_checkpoint` and compares.

Transformer Engine needs a GPU, so the layers are Megatron's own with TE's checkpoint keys: a norm
before a linear layer belongs to it, others stand alone and keep an extra state (as TE 2.20.2's
modules do on the meta device).
"""

import functools
import gc
import json
import os
import queue
import re
import socket
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

CPU = torch.device("cpu")


def _cpu(device: Any) -> Any:
    return CPU if str(device).startswith("cuda") else device


def _factory(make: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(make)
    def made(*args: Any, **kwargs: Any) -> Any:
        if "device" in kwargs:
            kwargs["device"] = _cpu(kwargs["device"])
        return make(*args, **kwargs)

    return made


def without_gpu() -> None:
    """What Megatron asks of torch.cuda, and a save that starts no further process."""
    cuda: Any = torch.cuda
    cuda.current_device = lambda: CPU
    cuda.device_count = lambda: 0
    cuda.get_device_capability = lambda *a: (9, 0)
    cuda.get_device_properties = lambda *a: SimpleNamespace(major=9, minor=0)
    cuda.get_rng_state = lambda *a, **k: torch.get_rng_state()
    cuda.manual_seed = torch.manual_seed
    for name in ("synchronize", "set_device", "empty_cache"):
        setattr(cuda, name, lambda *a, **k: None)
    any_torch: Any = torch
    any_torch.Tensor.cuda = any_torch.nn.Module.cuda = lambda self, *a, **k: self
    for name in "empty zeros ones full tensor arange empty_like zeros_like ones_like".split():
        setattr(torch, name, _factory(getattr(torch, name)))
    to = torch.Tensor.to
    any_torch.Tensor.to = lambda self, *a, **k: to(
        self, *map(_cpu, a), **{n: _cpu(v) for n, v in k.items()}
    )
    compile_it, any_torch.compile = torch.compile, lambda model=None, **o: model or (lambda f: f)
    import megatron.core.jit as jit

    jit.disable_jit_fuser()
    import megatron.core.tensor_parallel.random as rng
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    any_torch.compile = compile_it
    any_rng: Any = rng
    any_rng._get_cuda_rng_state = lambda *a, **k: torch.get_rng_state()
    any_rng._set_cuda_rng_state = lambda state, *a, **k: torch.set_rng_state(state)
    results: queue.Queue[Any] = queue.Queue()
    filesystem_async.get_write_results_queue = lambda mp_mode="spawn": results


def command_line(hf: dict[str, Any]) -> list[str]:
    """What a user of Megatron-LM gives for a config.json."""
    experts = hf.get("num_experts") or hf.get("num_local_experts")
    heads, family = hf["num_attention_heads"], hf["model_type"]
    values: dict[str, Any] = {
        "num-layers": hf["num_hidden_layers"],
        "hidden-size": hf["hidden_size"],
        "ffn-hidden-size": hf["intermediate_size"],
        "num-attention-heads": heads,
        "num-query-groups": hf["num_key_value_heads"],
        "kv-channels": hf.get("head_dim") or hf["hidden_size"] // heads,
        "max-position-embeddings": hf["max_position_embeddings"],
        "vocab-size": hf["vocab_size"],
    }
    on = ["group-query-attention", "swiglu", "disable-bias-linear"]
    if not hf["tie_word_embeddings"]:
        on.append("untie-embeddings-and-output-weights")
    if family.startswith("qwen2"):
        on.append("add-qkv-bias")
    if family.startswith("qwen3"):
        on.append("qk-layernorm")
    if experts:
        values["num-experts"] = experts
        values["moe-ffn-hidden-size"] = hf.get("moe_intermediate_size") or hf["intermediate_size"]
        values["moe-router-topk"] = hf["num_experts_per_tok"]
        values["expert-tensor-parallel-size"] = 1
    if dense := hf.get("mlp_only_layers"):
        layers = range(hf["num_hidden_layers"])
        pattern = [int(layer not in dense) for layer in layers]
        values["moe-layer-freq"] = str(pattern).replace(" ", "")
    if shared := hf.get("shared_expert_intermediate_size"):
        values["moe-shared-expert-intermediate-size"] = shared
        on.append("moe-shared-expert-gate")
    return [f for n, v in values.items() for f in (f"--{n}", str(v))] + [f"--{n}" for n in on]


# What no checkpoint says, and what a CPU asks for.
ANY = """
    --transformer-impl local --attention-backend unfused --normalization RMSNorm --seq-length 64
    --position-embedding-type rope --tokenizer-type NullTokenizer --micro-batch-size 1 --lr 1e-4
    --train-iters 1 --save-interval 1 --distributed-backend gloo --use-cpu-initialization
    --no-masked-softmax-fusion --no-persist-layer-norm --no-gradient-accumulation-fusion
    --no-rope-fusion --no-bias-swiglu-fusion
""".split()


class Norm(torch.nn.RMSNorm):
    """An RMSNorm that does not mind sequence parallelism."""

    def __init__(self, config: Any, hidden_size: int, **kwargs: Any):
        super().__init__(hidden_size)


class AloneNorm(Norm):
    """As Transformer Engine's: with an extra state, which is empty without fp8."""

    def get_extra_state(self) -> torch.Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: Any) -> None:
        assert state is None or state.numel() == 0


def te_names(layer: Any, has_experts: bool) -> None:
    """Give a layer of get_gpt_layer_local_spec the checkpoint keys of Transformer Engine's."""
    keys = {"input_layernorm.": "self_attention.linear_qkv.layer_norm_"}
    attention = layer.self_attention.submodules
    if "Identity" not in attention.q_layernorm.__name__:
        attention.q_layernorm = attention.k_layernorm = AloneNorm
    layer.input_layernorm = Norm
    layer.pre_mlp_layernorm = AloneNorm if has_experts else Norm
    if not has_experts:
        keys["pre_mlp_layernorm."] = "mlp.linear_fc1.layer_norm_"
    layer.sharded_state_dict_keys_map = keys


def build(args: Any) -> list[Any]:
    """The model chunks of this rank."""
    from megatron.core import parallel_state as mpu
    from megatron.core.models.gpt import GPTModel, gpt_layer_specs
    from megatron.core.transformer import transformer_block as block
    from megatron.training.arguments import core_transformer_config_from_args

    config = core_transformer_config_from_args(args)
    stages = args.virtual_pipeline_model_parallel_size
    chunks: list[Any] = []
    for stage in range(stages or 1) if stages else [None]:
        if args.num_experts:
            spec = gpt_layer_specs.get_gpt_decoder_block_spec(
                config, use_transformer_engine=False, normalization="RMSNorm", vp_stage=stage
            )
        else:
            spec = block.TransformerBlockSubmodules(
                layer_specs=[
                    gpt_layer_specs.get_gpt_layer_local_spec(
                        None, None, args.qk_layernorm, normalization="RMSNorm"
                    )
                    for _ in range(block.get_num_layers_to_build(config, vp_stage=stage))
                ]
            )
        for layer in spec.layer_specs:
            te_names(layer.submodules, "MoE" in str(layer.submodules.mlp))
        spec.layer_norm = AloneNorm
        where = dict(ignore_virtual=False, vp_stage=stage)
        chunks.append(
            GPTModel(
                config,
                spec,
                args.padded_vocab_size,
                args.max_position_embeddings,
                pre_process=mpu.is_pipeline_first_stage(**where),
                post_process=mpu.is_pipeline_last_stage(**where),
                share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
                position_embedding_type="rope",
                rotary_base=args.rotary_base,
                vp_stage=stage,
            )
        )
    return chunks


def _share(tensor: torch.Tensor, dim: int, at: tuple[int, int]) -> torch.Tensor:
    return tensor.chunk(at[1], dim)[at[0]]


class Expected:
    """What this rank's parameters must hold, from the tensors of a Hugging Face folder."""

    def __init__(self, folder: Path):
        from megatron.core import parallel_state as mpu
        from safetensors.torch import load_file

        self.hf = json.loads((folder / "config.json").read_text())
        self.tensors: dict[str, torch.Tensor] = {}
        for path in sorted(folder.glob("*.safetensors")):
            self.tensors |= load_file(path)
        self.tp = mpu.get_tensor_model_parallel_rank(), mpu.get_tensor_model_parallel_world_size()
        self.etp = (
            mpu.get_expert_tensor_parallel_rank(),
            mpu.get_expert_tensor_parallel_world_size(),
        )
        self.ep = mpu.get_expert_model_parallel_rank(), mpu.get_expert_model_parallel_world_size()
        self.is_mixtral = self.hf["model_type"] == "mixtral"
        self.num_experts = self.hf.get("num_experts") or self.hf.get("num_local_experts")

    def of(self, chunks: list[Any]) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
        """(name, local parameter, what it must hold)."""
        for chunk in chunks:
            for name, param in chunk.named_parameters():
                layer, rest = 0, name
                if local := re.match(r"decoder\.layers\.(\d+)\.", name):
                    layer = chunk.decoder.layers[int(local[1])].layer_number - 1
                    rest = name[local.end() :]
                value = self.value(rest, f"model.layers.{layer}.", param.shape)
                yield f"{name} (layer {layer})", param, value.to(param.dtype)

    def value(self, name: str, layer: str, shape: torch.Size) -> torch.Tensor:
        moe = layer + ("block_sparse_moe" if self.is_mixtral else "mlp")
        whole = {  # on every rank
            "decoder.final_layernorm.weight": "model.norm.weight",
            "input_layernorm.weight": layer + "input_layernorm.weight",
            "pre_mlp_layernorm.weight": layer + "post_attention_layernorm.weight",
            "self_attention.q_layernorm.weight": layer + "self_attn.q_norm.weight",
            "self_attention.k_layernorm.weight": layer + "self_attn.k_norm.weight",
            "mlp.router.weight": moe + ".gate.weight",
            "mlp.shared_experts.gate_weight": layer + "mlp.shared_expert_gate.weight",
        }
        if name in whole:
            return self.tensors[whole[name]]
        columns = {
            "self_attention.linear_proj.weight": layer + "self_attn.o_proj.weight",
            "mlp.linear_fc2.weight": layer + "mlp.down_proj.weight",
            "mlp.shared_experts.linear_fc2.weight": layer + "mlp.shared_expert.down_proj.weight",
        }
        if name in columns:
            return _share(self.tensors[columns[name]], 1, self.tp)
        if name in ("embedding.word_embeddings.weight", "output_layer.weight"):
            return self.vocabulary(name, shape)
        if name.startswith("self_attention.linear_qkv."):
            return self.qkv(layer, name.rpartition(".")[2])
        if expert := re.match(r"mlp\.experts\.local_experts\.(\d+)\.linear_fc(\d)", name):
            number = int(expert[1]) + self.ep[0] * (self.num_experts // self.ep[1])
            return self.expert(f"{moe}.experts.{number}", expert[2])
        shared = ".shared_expert" if "shared_experts" in name else ""
        assert name.endswith("linear_fc1.weight"), name
        return self.gate_up(f"{layer}mlp{shared}", ("gate_proj", "up_proj"), self.tp)

    def vocabulary(self, name: str, shape: torch.Size) -> torch.Tensor:
        is_head = name == "output_layer.weight" and not self.hf["tie_word_embeddings"]
        given = self.tensors["lm_head.weight" if is_head else "model.embed_tokens.weight"]
        padded = given.new_zeros(shape[0] * self.tp[1], shape[1])
        rows = min(len(given), len(padded))
        padded[:rows] = given[:rows]
        return _share(padded, 0, self.tp)

    def qkv(self, layer: str, leaf: str) -> torch.Tensor:
        """Each group's queries, its key, its value."""
        q, k, v = (self.tensors[f"{layer}self_attn.{n}_proj.{leaf}"] for n in "qkv")
        groups = self.hf["num_key_value_heads"]
        parts = [t.view(groups, len(t) // groups, -1) for t in (q, k, v)]
        return _share(torch.cat(parts, 1).reshape(-1, *q.shape[1:]), 0, self.tp)

    def expert(self, prefix: str, matrix: str) -> torch.Tensor:
        names = ("w1", "w3", "w2") if self.is_mixtral else ("gate_proj", "up_proj", "down_proj")
        if matrix == "2":
            return _share(self.tensors[f"{prefix}.{names[2]}.weight"], 1, self.etp)
        return self.gate_up(prefix, names[:2], self.etp)

    def gate_up(self, prefix: str, names: tuple[str, ...], at: tuple[int, int]) -> torch.Tensor:
        return torch.cat([_share(self.tensors[f"{prefix}.{n}.weight"], 0, at) for n in names])


def start(job: dict[str, Any]) -> Any:
    """Megatron-LM's arguments, parsed, and its process groups."""
    from megatron.core import parallel_state as mpu
    from megatron.core import tensor_parallel
    from megatron.core.rerun_state_machine import RerunMode, initialize_rerun_state_machine
    from megatron.training.arguments import parse_args, validate_args
    from megatron.training.checkpointing import load_args_from_checkpoint
    from megatron.training.global_vars import set_global_variables

    hf = json.loads(Path(job["hf"], "config.json").read_text())
    flags = [*ANY, f"--{job['do']}", job["at"], *job.get("flags", [])]
    # With --use-checkpoint-args the checkpoint says the rest.
    given = ["--vocab-size", str(hf["vocab_size"])]
    sys.argv = ["peer", *(given if "--use-checkpoint-args" in flags else command_line(hf)), *flags]
    torch.distributed.init_process_group("gloo")
    args: Any = parse_args()
    if args.use_checkpoint_args:
        load_args_from_checkpoint(args)
    validate_args(args)
    set_global_variables(args)
    mpu.initialize_model_parallel(
        args.tensor_model_parallel_size,
        args.pipeline_model_parallel_size,
        args.virtual_pipeline_model_parallel_size,
        expert_model_parallel_size=args.expert_model_parallel_size,
        expert_tensor_parallel_size=args.expert_tensor_parallel_size,
        create_gloo_process_groups=False,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    initialize_rerun_state_machine(mode=RerunMode.DISABLED)
    return args


@torch.no_grad()
def do(job: dict[str, Any]) -> dict[str, Any]:
    """A job on this rank."""
    from megatron.training.checkpointing import load_checkpoint, save_checkpoint

    chunks = build(start(job))
    expected = Expected(Path(job["hf"]))
    if job["do"] == "save":
        for _, param, value in expected.of(chunks):
            assert param.shape == value.shape
            param.copy_(value)
        save_checkpoint(7, chunks, None, None, 0)
        return {"parameters": 0, "different": []}
    for chunk in chunks:
        for param in chunk.parameters():
            param.fill_(torch.nan)
    load_checkpoint(chunks, None, None)
    found = [(name, torch.equal(param, value)) for name, param, value in expected.of(chunks)]
    rank = torch.distributed.get_rank()
    different = [f"rank {rank}: {name}" for name, is_equal in found if not is_equal]
    return {"parameters": len(found), "different": different}


def in_ranks(job: dict[str, Any]) -> dict[str, Any]:
    """A job, each of its ranks in a fork of this process, which has imported everything."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks: list[tuple[int, int]] = []
    for rank in range(job["ranks"]):
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(job["ranks"])}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            try:
                answer = do(job)
            except BaseException as error:
                traceback.print_exc()
                answer = {"error": f"{type(error).__name__}: {error}"[:2000]}
            os.write(write, json.dumps(answer).encode())
            os._exit(0)
        os.close(write)
        ranks.append((child, read))
    answers: list[dict[str, Any]] = []
    for child, read in ranks:
        with os.fdopen(read) as pipe:
            answers.append(json.loads(pipe.read() or '{"error": "died"}'))
        os.waitpid(child, 0)
    return {
        "parameters": sum(answer.get("parameters", 0) for answer in answers),
        "different": [name for answer in answers for name in answer.get("different", [])],
        "error": next((answer["error"] for answer in answers if "error" in answer), None),
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # Megatron-LM prints
    without_gpu()
    import megatron.core.models.gpt
    import megatron.training.arguments
    import megatron.training.checkpointing  # noqa: F401
    import safetensors.torch  # noqa: F401
    import torch._dynamo.aot_compile
    import transformers  # noqa: F401

    gc.freeze()

    for line in sys.stdin:
        print(json.dumps(in_ranks(json.loads(line))), file=answers, flush=True)
