"""Flags that decide what is learned: where one of them is not carried, the command is refused."""

_OWN = "training uses the model's own distribution, and so does sampling"
_LENGTH = "write it as --max_completion_length"
_METHOD = "the method's objective has no such part here"
_OPTIM = "optim.name is adamw"
_NONE = "none"

# Where answers are sampled: flag -> (the words under which it changes nothing, why it is not
# carried). Elsewhere they say nothing.
SAMPLED: dict[str, tuple[tuple[str, ...], str]] = {
    "num_beams": (("1",), _OWN),
    "structured_outputs_regex": ((_NONE,), _OWN),
    "response_prefix": (("", _NONE), "the chat template says how an answer begins"),
    "max_new_tokens": ((_NONE,), _LENGTH),
    "response_length": ((_NONE,), _LENGTH),
}
# The same for flags of any run. Those that are carried by some methods are in DECIDES.
DECIDING: dict[str, tuple[tuple[str, ...], str]] = SAMPLED | {
    # the objective
    "advantage_reweight": ((_NONE,), "RLSD's weights are not here; a recipe has grpo's advantages"),
    "chord_sft_dataset": ((), "demonstrations are of --rlhf_type grpo with --loss_type grpo"),
    "dsa_indexer_loss_coeff": (("0",), _METHOD),
    "label_smoothing_factor": (("0",), "of the methods only dpo and robust have label smoothing"),
    "ld_alpha": (("1", _NONE), "of the methods only dpo has it (--loss_type, several)"),
    "loss_weights": ((_NONE,), "of the methods only dpo has it (--loss_type, several)"),
    "neftune_noise_alpha": (("0", _NONE), "no noise is added to embeddings"),
    "router_aux_loss_coef": (("0",), "write it as --moe_aux_loss_coeff"),
    "sdar_loss_coef": (("0",), _METHOD),
    "reward_adapters": ((), "rewards here are functions and whole models"),
    "reward_model_plugin": ((_NONE,), "nothing is loaded from ms-swift's plugins"),
    # what is trained, and from where
    "lisa_activated_layers": (("0",), "trainable is the same in every step"),
    "resume_from_checkpoint": (
        (_NONE, "false"),
        "a run_dir that exists is resumed; give other weights as --model",
    ),
    "rope_scaling": ((_NONE,), "is read from the model's config.json: write it there"),
    "target_parameters": ((_NONE,), "adapter.target takes patterns over Hugging Face names"),
    # the optimizer, and how long it goes on
    "apply_wd_to_qk_layernorm": (("false",), "norms have no weight decay"),
    "early_stop_interval": ((_NONE,), "a run ends at train.steps or train.epochs"),
    "lorap_lr_ratio": ((_NONE, "1"), "is LoRA+'s: there is no adapter"),
    "lr_scheduler_kwargs": ((_NONE, "{}"), "optim.schedule and its keys say it"),
    "lr_warmup_init": (("0",), "warm-up starts from 0"),
    "optim": (("adamw_torch", "adamw_torch_fused", "adamw_hf", "adamw_apex_fused"), _OPTIM),
    "use_galore": (("false",), _OPTIM),
    # the tokens
    "preserve_thinking": ((_NONE,), "the chat template says which turns keep their thoughts"),
    # carried by some methods, and of these the words that change nothing
    "freeze_parameters_ratio": (
        ("0",),
        "the recipe's trainable takes Hugging Face names; set it by hand",
    ),
    "init_weights": (("true",), "adapter.type has olora and pissa"),
    "mtp_num_layers": (("0", _NONE), "multi-token prediction is not trained here"),
    "rpo_alpha": (("0", _NONE), "of the methods only dpo has it"),
    "sft_alpha": (("0",), _METHOD),
    "whiten_rewards": (
        ("false",),
        "advantages are whitened, and rewards scaled by those of the run (method.reward_norm)",
    ),
    "sync_ref_model": (("false",), "of pairs the reference's log-probs are computed once"),
    "weight_decay_incr_style": (("constant",), "weight decay is constant"),
}
# And those that are carried there.
DRAWN = ("top_k", "top_p", "min_p", "repetition_penalty", "stop_words")
DECIDES = (
    DECIDING.keys()
    | frozenset(DRAWN)
    | frozenset(
        """
    adapters advantage_estimator calculate_KL columns cpo_alpha delta dynamic_sample
    f_divergence_type freeze_llm freeze_parameters freeze_parameters_ratio
    freeze_parameters_regex importance_sampling_level init_weights interleave_prob kl_in_reward
    label_smoothing lora_bias loss_scale loss_type lr_decay_style lr_wsd_decay_style
    mcore_adapter mcore_ref_adapter mcore_ref_model modules_to_save mtp_num_layers
    new_special_tokens num_iterations num_labels off_policy_sequence_mask_delta optimizer
    overlong_filter quant_method ref_adapters ref_model reference_free reward_funcs reward_model
    rollout_importance_sampling_mode router_replay_mode rpo_alpha scale_rewards sft_alpha
    sync_ref_model target_modules target_regex task_type top_entropy_quantile
    trainable_parameters trainable_parameters_regex truncation_strategy use_chat_template
    use_vllm weight_decay_incr_style
    """.split()
    )
)
