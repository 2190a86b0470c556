"""What other trainers call things: ONE table, which the ms-swift import reads and errors quote.

Names are those of ms-swift 4.6 and Megatron, TRL 1.16 and transformers 5, verl 0.6 and
LLaMA-Factory 0.9. A name that several of them have means the same in all.
"""

from collections.abc import Mapping
from typing import Any, cast

# Of ms-swift and Megatron, where a flag's value is a key's value. `interop/swift/table.py` says how
# each is read.
SWIFT = {
    "output_dir": "run_dir",
    "seed": "seed",
    "tensor_model_parallel_size": "parallel.tp",
    "sequence_parallel": "parallel.sp",
    "pipeline_model_parallel_size": "parallel.pp",
    "virtual_pipeline_model_parallel_size": "parallel.vpp",
    "decoder_first_pipeline_num_layers": "parallel.first_stage_layers",
    "decoder_last_pipeline_num_layers": "parallel.last_stage_layers",
    "expert_model_parallel_size": "parallel.ep",
    "expert_tensor_parallel_size": "parallel.etp",
    "context_parallel_size": "parallel.cp",
    "adapters": "adapter.path",
    "lora_rank": "adapter.rank",
    "lora_alpha": "adapter.alpha",
    "target_modules": "adapter.target",
    "lora_dropout": "adapter.dropout",
    "lorap_lr_ratio": "adapter.loraplus_lr_ratio",
    "trainable_parameters_regex": "trainable",
    "moe_aux_loss_coeff": "router.aux_loss",
    "moe_z_loss_coeff": "router.z_loss",
    "beta": "method.beta",
    "label_smoothing": "method.label_smoothing",
    "rpo_alpha": "method.rpo_alpha",
    "delta": "method.delta",
    "off_policy_sequence_mask_delta": "method.off_policy_mask_threshold",
    "top_entropy_quantile": "method.top_entropy_quantile",
    "tau_pos": "method.tau_pos",
    "tau_neg": "method.tau_neg",
    "num_iterations": "method.num_iterations",
    "loss_weights": "method.loss_weights",
    "ld_alpha": "method.ld_alpha",
    "discopop_tau": "method.discopop_tau",
    "desirable_weight": "method.desirable_weight",
    "undesirable_weight": "method.undesirable_weight",
    "simpo_gamma": "method.gamma",
    "center_rewards_coefficient": "method.center_rewards",
    "max_length": "data.seq_len",
    "packing": "data.pack",
    "dataset_num_proc": "data.num_workers",
    "global_batch_size": "train.global_batch",
    "micro_batch_size": "train.micro_batch",
    "overlap_grad_reduce": "train.overlap",
    "lr": "optim.lr",
    "min_lr": "optim.min_lr",
    "weight_decay": "optim.weight_decay",
    "adam_beta1": "optim.beta1",
    "adam_beta2": "optim.beta2",
    "adam_eps": "optim.eps",
    "clip_grad": "optim.clip_grad",
    "muon_momentum": "optim.muon_momentum",
    "muon_use_nesterov": "optim.muon_nesterov",
    "muon_num_ns_steps": "optim.muon_num_ns_steps",
    "muon_scale_mode": "optim.muon_scale_mode",
    "muon_extra_scale_factor": "optim.muon_extra_scale_factor",
    "main_grads_dtype": "optim.grad_dtype",
    "save_steps": "checkpoint.every",
    "eval_steps": "train.eval_every",
    "no_save_optim": "checkpoint.save_optimizer",
    "save_safetensors": "checkpoint.export_hf",
    "megatron_extra_kwargs": "megatron",
    "max_completion_length": "rollout.max_tokens",
    "temperature": "rollout.temperature",
    "dynamic_sample": "method.dynamic_sampling",
    "max_resample_times": "method.max_rounds",
    "vllm_gpu_memory_utilization": "rollout.gpu_memory",
    "vllm_tensor_parallel_size": "rollout.tensor_parallel",
}

# Further names, and those whose value is not the key's as it stands (ADVICE).
_OTHERS = {
    "adapter.path": "adapter_name_or_path resume_adapter",
    "adapter.rank": "lora_r lora_dim r",
    "adapter.target": "lora_target lora_target_modules",
    "adapter.type": "tuner_type train_type finetuning_type peft_type use_peft use_lora use_rslora"
    " use_dora",
    "checkpoint.best": "metric_for_best_model load_best_model_at_end",
    "checkpoint.every": "save_freq save_interval save_strategy",
    "checkpoint.keep": "save_total_limit max_ckpt_to_keep max_actor_ckpt_to_keep",
    "cluster.gpus_per_node": "n_gpus_per_node nproc_per_node num_gpus",
    "cluster.nodes": "nnodes num_nodes",
    "data.chat_template": "template chat_template_path",
    "data.eval": "eval_dataset val_dataset val_files eval_file validation_file",
    "data.eval_share": "val_size split_dataset_ratio",
    "data.num_workers": "preprocessing_num_workers dataloader_num_workers",
    "data.pack": "pack_dataset neat_packing",
    "data.seq_len": "max_seq_length max_seq_len cutoff_len model_max_length max_prompt_length"
    " seq_length sequence_length block_size",
    "data.take": "max_samples max_train_samples",
    "data.too_long": "truncation_strategy truncation truncation_mode truncation_side",
    "data.train": "dataset dataset_name train_file train_files train_dataset data_path",
    "data.weights": "interleave_probs interleave_prob data_weights",
    "method.beta": "pref_beta kl_coef kl_loss_coef init_kl_coef kl_penalty",
    "method.clip_low": "epsilon eps_clip clip_ratio clip_ratio_low cliprange",
    "method.clip_high": "epsilon_high eps_clip_high clip_ratio_high",
    "method.delta": "clip_ratio_c",
    "method.entropy_coef": "entropy_coeff",
    "method.inner_steps": "ppo_mini_batch_size steps_per_generation",
    "method.kl_horizon": "horizon",
    "method.kl_target": "target_kl",
    "method.mismatch": "vllm_importance_sampling_mode rollout_importance_sampling_mode",
    "method.mismatch_cap": "vllm_importance_sampling_clip_max"
    " rollout_importance_sampling_threshold",
    "method.mismatch_floor": "vllm_importance_sampling_clip_min",
    "method.num_iterations": "ppo_epochs num_ppo_epochs",
    "method.ref_model_sync_steps": "sync_ref_model",
    "method.tau_neg": "sapo_temperature_neg",
    "method.tau_pos": "sapo_temperature_pos",
    "method.lam": "gae_lambda",
    "method.name": "stage rlhf_type loss_type pref_loss adv_estimator",
    "method.reference": "ref_model ref_model_name_or_path mcore_ref_model reference_model",
    "method.reward_clip": "score_clip reward_clip_range cliprange_reward",
    "method.reward_norm": "use_score_scaling use_score_norm",
    "method.rpo_alpha": "pref_ftx",
    "data.document_mask": "reset_attention_mask reset_position_ids document_masking",
    "model.dtype": "bf16 fp16 torch_dtype precision mixed_precision",
    "model.path": "model_name_or_path model_id model_name base_model pretrained_model_name_or_path"
    " mcore_model",
    "model.tokenizer": "tokenizer_name tokenizer_name_or_path tokenizer_path",
    "observe.wandb": "report_to wandb_project project_name",
    "optim.beta1": "adam_beta_1",
    "optim.beta2": "adam_beta_2",
    "optim.clip_grad": "max_grad_norm gradient_clipping gradient_clip_val",
    "optim.eps": "adam_epsilon",
    "optim.groups": "critic_lr critic_learning_rate value_lr",
    "optim.lr": "learning_rate actor_learning_rate",
    "optim.min_lr": "min_learning_rate min_lr_ratio",
    "optim.name": "optimizer optim_type",
    "optim.offload": "optimizer_cpu_offload optimizer_offload_fraction cpu_offload",
    "optim.schedule": "lr_scheduler_type lr_scheduler lr_decay_style lr_warmup_steps_style",
    "optim.warmup": "warmup_ratio warmup_steps warmup_fraction lr_warmup_fraction lr_warmup_iters"
    " lr_warmup_steps lr_warmup_steps_ratio",
    "parallel.cp": "ulysses_sequence_parallel_size sequence_parallel_size",
    "parallel.tp": "tensor_parallel_size tp_size",
    "parallel": "deepspeed fsdp fsdp_config accelerate_config",
    "rewards": "reward_funcs reward_function reward_fn custom_reward_function",
    "rollout.engine": "use_vllm vllm_mode",
    "rollout.group_size": "num_generations n_samples_per_prompt rollout_n n_generations",
    "rollout.max_tokens": "max_new_tokens max_response_length response_length generate_max_len",
    "rollout.gpu_memory": "gpu_memory_utilization",
    "rollout.stop": "stop_words stop_strings stop_sequences",
    "rollout.prompts_per_step": "train_batch_size rollout_batch_size generation_batch_size",
    "router.aux_loss": "router_aux_loss_coef aux_loss_coef moe_aux_loss_coef",
    "router.balance": "moe_router_load_balancing_type load_balancing_type",
    "router.freeze": "freeze_router moe_router_freeze",
    "run_dir": "default_local_dir logging_dir save_path",
    "train.deterministic": "deterministic_mode full_determinism",
    "train.epochs": "num_train_epochs total_epochs max_epochs num_epochs n_epochs",
    "train.eval_every": "eval_interval test_freq eval_strategy evaluation_strategy eval_freq",
    "train.global_batch": "gradient_accumulation_steps gradient_accumulation grad_accum_steps",
    "train.micro_batch": "per_device_train_batch_size train_micro_batch_size_per_gpu batch_size"
    " ppo_micro_batch_size_per_gpu micro_batch_size_per_gpu per_device_batch_size",
    "train.recompute": "gradient_checkpointing recompute_granularity activation_checkpointing"
    " enable_gradient_checkpointing",
    "train.steps": "max_steps train_iters num_train_steps total_training_steps total_steps",
    "trainable": "freeze_parameters trainable_parameters freeze_trainable_modules",
}
KEYS: Mapping[str, str] = SWIFT | {
    name: key for key, names in _OTHERS.items() for name in names.split()
}

_BATCH = (
    "it counts the packs of a step over all ranks: per-device batch x accumulation x data-parallel"
    " ranks"
)
ADVICE = {
    "gradient_accumulation_steps": _BATCH,
    "gradient_accumulation": _BATCH,
    "grad_accum_steps": _BATCH,
    "per_device_train_batch_size": "packs in one forward pass; train.global_batch is the batch of a"
    " step, and accumulation follows from both",
    "max_prompt_length": "which holds a prompt and its answer",
    "bf16": "bf16 or fp32",
    "fp16": "bf16 or fp32",
    "gradient_checkpointing": "none, selective or full",
    "report_to": "arguments of wandb.init; TensorBoard is on by itself",
    "deepspeed": "the layout says how a model is spread; optimizer state is sharded always",
    "fsdp": "the layout says how a model is spread; optimizer state is sharded always",
    "no_save_optim": "the other way round",
    "warmup_ratio": "less than 1 is a share of the steps",
    "epsilon": "and method.clip_high above 1",
    "eps_clip": "and method.clip_high above 1",
    "clip_ratio": "and method.clip_high above 1",
    "use_lora": "a section adapter: {} is a LoRA with its defaults",
    "use_peft": "a section adapter: {} is a LoRA with its defaults",
    "train_batch_size": "train.global_batch where nothing is sampled",
    "max_samples": "a list, a number for each path of data.train",
    "template": "a file; the tokenizer's own is taken by itself",
    "max_steps": "or train.epochs, one of them",
    "critic_lr": "the value head is on the policy: {match: value_head, lr: 1e-5}",
    "critic_learning_rate": "the value head is on the policy: {match: value_head, lr: 1e-5}",
    "value_lr": "{match: value_head, lr: 1e-5}",
    "loss_type": "of dpo and kto, method.loss_type",
}
# What is so without a setting.
NOTHING = {
    "logging_steps": "every step is written to ledger.jsonl",
    "log_interval": "every step is written to ledger.jsonl",
    "logging_first_step": "every step is written to ledger.jsonl",
    "attn_implementation": "attention never makes the whole matrix of scores",
    "flash_attn": "attention never makes the whole matrix of scores",
    "attn_impl": "attention never makes the whole matrix of scores",
    "use_liger_kernel": "log-probs are computed without all logits",
    "use_liger": "log-probs are computed without all logits",
    "remove_unused_columns": "columns that are not read are named",
    "resume_from_checkpoint": "a run_dir that exists is resumed",
    "overwrite_output_dir": "a run_dir that exists is resumed; give another one",
    "trust_remote_code": "code from a model's folder is never run",
    "do_train": "`moetrain train` trains",
    "ddp_timeout": "cluster.hang_seconds says when a run counts as hung",
    "per_device_eval_batch_size": "evaluation takes packs of data.seq_len as training does",
    "bnb_4bit_quant_type": "weights are trained as they are",
    "load_in_4bit": "weights are trained as they are",
    "load_in_8bit": "weights are trained as they are",
    "quantization_bit": "weights are trained as they are",
}


def known_here(key: str, value: object = None) -> str:
    """ " Here it is 'optim.lr'." for a key of another trainer, or for a section of theirs (verl's
    actor_rollout_ref), of its first key that is known; "" for others.
    """
    name = key.rpartition(".")[2].replace("-", "_").lower()
    if name in NOTHING:
        return f" There is none here: {NOTHING[name]}. Leave it out."
    ours = KEYS.get(name, name)
    if ours.rpartition(".")[2] != name or (name in KEYS and key.count(".") > 1 and key != ours):
        more = f" ({ADVICE[name]})" if name in ADVICE else ""
        return f" Here it is '{ours}'{more}."
    below = cast(Mapping[Any, Any], value if isinstance(value, Mapping) else {})
    for inner, one in below.items():
        if hint := known_here(f"{key}.{inner}", one):
            return hint if hint.startswith(" Of ") else f" Of {key}.{inner}:{hint}"
    return ""
