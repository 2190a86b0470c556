"""What the table does not carry: flags that say nothing new here, flags and keys that cannot be
carried and why, and what changes its meaning on the way.
"""

from collections.abc import Callable
from dataclasses import dataclass

from moetrain.interop.swift.codecs import Keys, Words, same
from moetrain.interop.swift.datasets import split_sample
from moetrain.interop.swift.decides import DECIDING
from moetrain.interop.swift.entries import is_hub_name
from moetrain.interop.swift.policy import is_online
from moetrain.interop.swift.table import CORPUS, PAIRS, has_adapter, has_held_out, method

_SPEED = "decides how fast, not what; moetrain chooses by the machine"
_MEMORY = "the data are in a memory-mapped set"
_RESUME = "a run_dir that exists is resumed with all of its state"
_TEXT = "models here are text alone"
_PLACE = "servers are processes of their own: docs/rollout.md says where they run"

# flag -> (the words under which it says nothing new, none for any; why)
IMPLIED: dict[str, tuple[tuple[str, ...], str]] = {
    "action": ((), "method says so"),
    "rlhf_type": ((), "method says so"),
    "accumulate_allreduce_grads_in_fp32": (("true",), "optim.grad_dtype is fp32"),
    "add_non_thinking_prefix": (("true",), "the chat template writes the empty thought"),
    "add_version": (("false",), "run_dir is the folder itself"),
    "align_param_gather": ((), _SPEED),
    "apply_rope_fusion": ((), _SPEED),
    "advantage_estimator": (("grpo",), "only rollouts have advantages"),
    "async_generate": (("false",), "rollout.steps_off says so"),
    "async_save": (("false",), "checkpoints are written while the run waits"),
    "attention_backend": ((), "model.backend chooses the kernels"),
    "attention_softmax_in_fp32": (("true",), "always so"),
    "batch_p2p_comm": ((), _SPEED),
    "bf16": (("true",), "model.dtype says so"),
    "bias_activation_fusion": ((), _SPEED),
    "bias_dropout_fusion": ((), _SPEED),
    "bridge_backend": ((), "moetrain has its own reader of weights"),
    "calculate_KL": (("true",), "kto measures its reference point always"),
    "calculate_per_token_loss": ((), "every term is divided by its own global count"),
    "check_model": ((), "files are checked as they are read"),
    "completion_length_limit_scope": ((), "answers have one turn"),
    "cp_comm_type": ((), _SPEED),
    "cp_partition_mode": ((), _SPEED),
    "cross_entropy_fusion_impl": ((), "logits are never whole in memory"),
    "cross_entropy_loss_fusion": ((), "logits are never whole in memory"),
    "data_sharding": ((), "every rank sees the whole data set's order"),
    "dataloader_num_workers": ((), f"{_MEMORY}; data.num_workers is dataset_num_proc"),
    "dataloader_persistent_workers": ((), _MEMORY),
    "dataloader_pin_memory": ((), _MEMORY),
    "dataloader_prefetch_factor": ((), _MEMORY),
    "ddp_backend": ((), "nccl on GPUs"),
    "ddp_timeout": ((), "says nothing of the result"),
    "enable_dft_loss": (("false",), "method says so"),
    "f_divergence_type": (("reverse_kl",), "the only one"),
    "finetune": (("true",), "a run starts from model.path with a new optimizer"),
    "fp16": (("false",), "model.dtype is bf16 or fp32"),
    "dynamic_sample": (("false",), "method says so"),
    "freeze_aligner": ((), _TEXT),
    "freeze_llm": (("false",), _TEXT),
    "freeze_vit": ((), _TEXT),
    "gradient_accumulation_fusion": ((), _SPEED),
    "group_by_length": (("false",), "packing makes it needless"),
    "label_smoothing": (("0",), "the method has none"),
    "language_model_only": ((), _TEXT),
    "lazy_tokenize": ((), "data are encoded once, before training"),
    "load_args": ((), "nothing is read from ms-swift's args.json"),
    "load_from_cache_file": ((), "encoded data are cached always"),
    "load_safetensors": ((), "model.path may be either"),
    "log_completions": ((), "every answer is in <run_dir>/rollouts"),
    "log_entropy": ((), "the ledger has entropy"),
    "log_rollout_offpolicy_metrics": ((), "the ledger has mismatch/kl"),
    "logging_steps": ((), "the ledger has every step"),
    "lora_bias": (("none",), "biases are not trained"),
    "lora_dtype": (("bfloat16",), "adapters have the model's dtype"),
    "main_params_dtype": (("fp32",), "always so"),
    "manual_gc": ((), _SPEED),
    "manual_gc_steps": ((), _SPEED),
    "masked_softmax_fusion": ((), _SPEED),
    "max_shard_size": ((), "shards have 5 GB"),
    "merge_lora": ((), "full training has nothing to merge"),
    "max_resample_times": ((), "counts with --dynamic_sample true"),
    "model_author": ((), "counts for swift/self-cognition alone"),
    "model_name": ((), "counts for swift/self-cognition alone"),
    "moe_enable_deepep": ((), _SPEED),
    "moe_grouped_gemm": ((), "experts are grouped always"),
    "moe_permute_fusion": ((), _SPEED),
    "moe_router_dtype": (("fp32",), "always so"),
    "moe_router_load_balancing_type": (("none", "seq_aux_loss"), "router.aux_loss says so"),
    "moe_shared_expert_overlap": ((), _SPEED),
    "moe_token_dispatcher_type": ((), _SPEED),
    "muon_fp32_matmul_prec": ((), "bf16 models iterate in bf16, fp32 ones in fp32"),
    "muon_scalar_optimizer": (("adam",), "always so"),
    "muon_split_qkv": (("true",), "always so"),
    "muon_tp_mode": ((), "a matrix is whole, whatever the layout"),
    "nccl_comm_warmup": ((), _SPEED),
    "num_iterations": (("1",), "only rollouts are learned from several times"),
    "num_labels": (("1",), "method says so"),
    "no_initialization": ((), "weights are read"),
    "no_load_optim": ((), _RESUME),
    "no_load_rng": ((), _RESUME),
    "no_save_rng": ((), "no step draws a random number"),
    "offload_bridge": ((), _PLACE),
    "offload_model": ((), _PLACE),
    "offload_optimizer": ((), _PLACE),
    "optimizer": (("adam",), "optim.name is adamw"),
    "optimizer_offload_fraction": ((), "optim.offload says so"),
    "overlong_filter": (("false",), "answers that were cut are learned from by their grade"),
    "overlap_p2p_comm": ((), _SPEED),
    "overlap_param_gather": ((), _SPEED),
    "packing": (("true",), "a corpus is cut into sequences of data.seq_len"),
    "padding_free": ((), "batches are packed always"),
    "perform_initialization": (("false",), "weights are read"),
    "recompute_modules": (("core_attn",), "selective is attention"),
    "remove_unused_columns": ((), "rewards are given every column"),
    "reference_free": (("false",), "there is a reference"),
    "scale_rewards": ((), "only rollouts have rewards"),
    "sleep_level": ((), _PLACE),
    "sequence_parallel": ((), "counts with tensor_model_parallel_size > 1 alone"),
    "split_dataset_ratio": (("0",), "nothing is split off"),
    "streaming": ((), "data are encoded once, before training"),
    "task_type": (("causal_lm", "seq_cls"), "method says so"),
    "top_entropy_quantile": (("1",), "every token is learned from"),
    "tp_comm_overlap": ((), _SPEED),
    "tuner_type": ((), "adapter says so"),
    "use_gym_env": (("false",), "answers have one turn"),
    "use_ray": ((), "moetrain starts its ranks and servers itself"),
    "use_vllm": (("true",), "rollout.engine says so"),
    "vllm_enable_lora": ((), "servers are given merged weights"),
    "vllm_enable_prefix_caching": ((), _SPEED),
    "vllm_server_group_port": ((), "moetrain serve chooses its own"),
    "vllm_server_pass_dataset": ((), "rewards are graded in the trainer"),
    "vllm_server_timeout": ((), "rollout.timeout says so"),
    "colocate_groups": ((), _PLACE),
    "kl_in_reward": (("false",), "only rollouts have rewards"),
    "use_cpu_initialization": ((), _MEMORY),
    "use_distributed_optimizer": (("true",), "always so"),
    "use_hf": ((), "models and data are folders and files here"),
    "use_precision_aware_optimizer": ((), "optim.state_dtype and optim.offload say so"),
    "use_rslora": (("false",), "adapter.type says so"),
    "vit_gradient_checkpointing": ((), _TEXT),
    # variables
    "CUDA_DEVICE_MAX_CONNECTIONS": ((), "set where it is needed"),
    "CUDA_VISIBLE_DEVICES": ((), "the shell's"),
    "MASTER_ADDR": ((), "the launcher's"),
    "MASTER_PORT": ((), "the launcher's"),
    "NODE_RANK": ((), "the launcher's"),
    "OMP_NUM_THREADS": ((), "the shell's"),
    "PYTORCH_CUDA_ALLOC_CONF": ((), "the shell's"),
}

_MEGATRON_NAMES = "the recipe's trainable takes Hugging Face names; set it by hand"
# flag -> why no recipe says it. Flags that stand nowhere have UNKNOWN.
WHY_FLAGS: dict[str, str] = {
    "adapters": "one PEFT folder is wanted",
    "add_version": "run_dir is the folder itself, and is resumed if it exists",
    "agent_template": "the tokenizer's chat template is used; data.chat_template replaces it",
    "add_non_thinking_prefix": "the chat template decides where it writes an empty thought",
    "advantage_estimator": "of methods with rollouts",
    "calculate_KL": "kto measures its reference point always",
    "columns": "rename the columns in the file",
    "cpo_alpha": "simpo has no likelihood term here (ms-swift's default is 1)",
    "dynamic_sample": "method.dynamic_sampling is of methods with rollouts",
    "data_seed": "one seed is for everything",
    "dataset_shuffle": "both shuffles are one here: data.shuffle",
    "enable_channel_loss": "give each channel a held-out file of its own",
    "external_plugins": "nothing is loaded from ms-swift's plugins",
    "f_divergence_type": "methods here have the reverse KL",
    "finetune": "to go on with a run, start moetrain with its run_dir",
    "fp16": "models here train in bf16 or fp32",
    "fp8_format": "there is no fp8 training here; optim.state_dtype can be fp8",
    "freeze_llm": "models here are text alone: nothing else is there to train",
    "freeze_parameters": _MEGATRON_NAMES,
    "freeze_parameters_regex": _MEGATRON_NAMES,
    "greater_is_better": "whether less or more is better follows from the metric's name",
    "group_by_length": "packs are filled by length already; their order is shuffled",
    "interleave_prob": "data.weights is for corpora",
    "delta": "of methods with rollouts and a clip",
    "kl_in_reward": "of methods with rollouts",
    "label_smoothing": "of the methods robust has it, and dpo with sigmoid, robust or exo_pair",
    "lora_bias": "with an adapter, biases are not trained",
    "lora_alpha": "there is no new adapter",
    "lora_dropout": "there is no new adapter, and what an earlier one had is in its folder",
    "lora_rank": "there is no new adapter",
    "loss_scale": "scored are the assistant's turns (of a preference the last, of a corpus all)",
    "loss_type": "dpo and kto have losses",
    "lr_decay_iters": "optim.decay_steps says how long the decay takes",
    "mcore_adapter": "Megatron's adapter folder: write PEFT's (megatron export --to_hf), and give "
    "adapter.path",
    "mcore_ref_adapter": "give PEFT's folder as --ref_adapters (megatron export --to_hf)",
    "mcore_ref_model": "give a Hugging Face folder as --ref_model (megatron export --to_hf)",
    "merge_lora": "export_hf merges; `tools/convert adapter` writes a PEFT folder",
    "modules_to_save": "with an adapter, nothing else is trained",
    "moe_expert_capacity_factor": "no token is dropped here",
    "moe_router_load_balancing_type": "router.balance is sequence or global",
    "num_layers_per_virtual_pipeline_stage": "parallel.vpp counts stages",
    "num_generations_eval": "held-out prompts have one answer each",
    "num_iterations": "of methods with rollouts",
    "off_policy_sequence_mask_delta": "of methods with rollouts",
    "muon_coefficient_type": "K. Jordan's coefficients are used",
    "optimizer": "optim.name is adamw or, without an adapter, muon",
    "overlong_filter": "method.truncated is of methods with rollouts",
    "packing": "a corpus is cut into sequences of data.seq_len",
    "packing_length": "data.seq_len is both, a pack and the most of one sequence",
    "pipeline_model_parallel_layout": "parallel.first_stage_layers and last_stage_layers say it",
    "new_special_tokens": "the vocabulary is the tokenizer's: add tokens to the folder first",
    "quant_method": "weights are trained as they are, not quantised",
    "recompute_method": "counts with recompute_granularity full",
    "recompute_modules": "counts with recompute_granularity selective",
    "recompute_num_layers": "counts with recompute_granularity full",
    "ref_adapters": "there is no reference",
    "ref_model": "there is no reference",
    "reference_free": "dpo has a reference; simpo and orpo have none",
    "reward_model": "give {name: reward_model, options: {path: FOLDER}} in rewards by hand",
    "rollout_importance_sampling_mode": "method.mismatch has tis and mask",
    "save_strategy": "checkpoint.every counts steps",
    "router_replay_mode": "rollout.routing_replay is R3: the experts that were chosen at rollout",
    "split_dataset_ratio": "give a held-out file: data.eval",
    "target_regex": "adapter.target takes patterns over Hugging Face names",
    "task_type": "method says what is trained",
    "template": "the tokenizer's chat template is used; data.chat_template replaces it",
    "top_entropy_quantile": "of methods with rollouts",
    "use_chat_template": "instruction data goes through the chat template; `megatron pt` has none",
    "use_vllm": "answers are sampled with vLLM",
    "tensorboard_dir": "TensorBoard's files are in <run_dir>/tensorboard",
    "torch_dtype": "models here train in bf16 or fp32",
    "trainable_parameters": _MEGATRON_NAMES,
    "train_dataloader_shuffle": "both shuffles are one here: data.shuffle",
    "truncation_strategy": "data.too_long cuts on the right or the left, or rejects (delete)",
    "use_megatron_fsdp": "weights are split by parallel, optimizer state over data-parallel ranks",
    "use_rslora": "there is no new adapter",
    "virtual_pipeline_model_parallel_size": "needs pipeline_model_parallel_size > 1",
}
UNKNOWN = "no key of a recipe stands for it"
# key -> why no flag says it
WHY_KEYS: dict[str, str] = {
    "adapter.type": "Megatron-SWIFT has lora and rslora",
    "data.cache": "MODELSCOPE_CACHE says where ms-swift's is",
    "data.chat_template": "--template is a name of ms-swift's",
    "data.max_rejected": "ms-swift leaves out what it cannot use, or stops at all with --strict",
    "data.reference": "ms-swift computes the reference's log-probs at every step",
    "data.share_prompt": "ms-swift computes a pair's prompt twice",
    "data.weights": "ms-swift mixes data sets by their sizes",
    "method.kl_budget": "ms-swift does not warn",
    "model.init": "ms-swift reads weights always",
    "model.tokenizer": "ms-swift takes the one in --model",
    "train.deterministic": "ms-swift has no such mode",
}
NO_FLAG = "ms-swift has no flag for it"


@dataclass(frozen=True)
class Change:
    """Something that is carried, and still is not quite the same on the other side."""

    what: str
    when: Callable[[Keys], bool]
    why: str
    coming: bool = False  # on the way into a recipe alone


def _one_by_one(keys: Keys) -> bool:
    return keys.get("data.pack") is False and keys.get("method.name") not in (*CORPUS, "ppo")


CHANGES: tuple[Change, ...] = (
    Change(
        "global_batch_size",
        _one_by_one,
        "counts records without packing, and so does train.global_batch with data.pack=false, "
        "where each has a pack of data.seq_len to itself; data.pack=true with a smaller batch is "
        "much faster",
    ),
    Change(
        "max_length",
        lambda keys: keys.get("method.name") in (*PAIRS, "kto"),
        "is of each answer with its prompt, data.seq_len of both together (the prompt once)",
    ),
    Change(
        "dataset",
        method(*CORPUS),
        "ms-swift reads text, a recipe an indexed corpus: `moetrain data index` makes one of it",
    ),
    Change(
        "beta",
        method("ipo"),
        "Megatron-SWIFT's ipo adds log-probs up, moetrain's (as TRL's) takes the mean over tokens",
    ),
    Change(
        "ld_alpha",
        lambda keys: keys.get("method.ld_alpha") is not None,
        "ms-swift counts the reference's tokens all alike, moetrain (as TRL 1.16) as the policy's",
    ),
    Change(
        "bco_pair",
        lambda keys: "bco_pair" in (keys.get("method.loss_type") or ()),
        "ms-swift's mean reward has a micro-batch's own in it, moetrain's is of the steps before",
    ),
    Change(
        "kto",
        lambda keys: method("kto")(keys) and keys.get("method.loss_type") is None,
        "ms-swift estimates the KL from a micro-batch of every rank, moetrain from the whole batch",
    ),
    Change(
        "target_modules",
        has_adapter,
        "ms-swift's q, k and v share one A, and gate and up; here each has its own (those of an "
        "expert share)",
    ),
    Change(
        "optimizer",
        lambda keys: keys.get("optim.name") == "muon",
        "Megatron's muon takes gate and up as one matrix, and another series of coefficients",
    ),
    Change(
        "moe_aux_loss_coeff",
        lambda keys: bool(keys.get("router.aux_loss")) and keys.get("router.balance") != "global",
        "router.aux_loss is a mean over sequences, nearest to ms-swift's seq_aux_loss",
    ),
    Change(
        "beta",
        lambda keys: is_online(keys) and bool(keys.get("method.beta")),
        "ms-swift cuts a token's KL at 10",
        coming=True,
    ),
    Change(
        "value model",
        method("ppo"),
        "is a model of its own there, which starts as the reward model; here a head on the policy,"
        " so that vf_coef weighs in the policy too; its learning rate: optim.groups",
    ),
    Change(
        "rollout",
        is_online,
        "a step here is a batch of rollouts and all its optimizer steps",
    ),
    Change(
        "evaluation",
        lambda keys: is_online(keys) and has_held_out(keys),
        "held-out prompts have one greedy answer here (rollout.eval_temperature), there answers as "
        "in training",
        coming=True,
    ),
    Change(
        "model",
        lambda keys: is_hub_name(keys.get("model.path", "")),
        "looks like a name of a hub; model.path is a folder: download it first",
        coming=True,
    ),
    Change(
        "dataset",
        lambda keys: any(
            is_hub_name(path) for key in ("train", "eval") for path in keys.get(f"data.{key}") or ()
        ),
        "looks like a name of a hub; data.train and data.eval are files: download them first",
        coming=True,
    ),
    Change(
        "dataset",
        lambda keys: (
            keys.get("method.name") in CORPUS
            and any(split_sample(str(path))[1] for path in keys.get("data.train") or ())
        ),
        "#N takes a sample of a data set, which an indexed corpus cannot; index the sample",
        coming=True,
    ),
)


def implied(flag: str, words: Words) -> str | None:
    """Why a flag with these words says nothing new, None when it does."""
    if flag in DECIDING and any(same(words, value) for value in DECIDING[flag][0]):
        return "changes nothing with this value"
    if flag not in IMPLIED:
        return None
    values, why = IMPLIED[flag]
    return why if not values or any(same(words, value) for value in values) else None


def why_not(flag: str) -> str:
    """Why no recipe says what a flag does."""
    return DECIDING[flag][1] if flag in DECIDING else WHY_FLAGS.get(flag, UNKNOWN)
