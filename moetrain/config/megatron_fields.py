"""Every field of megatron-core's TransformerConfig, by what a recipe says instead of it.

tests/test_compat.py compares them with the installed version's, tests/test_megatron_fields.py shows
that those which pass through change something.
"""

_MODEL = "model.path or model.hf: its config.json says what the model computes"
_DTYPE = "model.dtype, fp32 or bf16"
_INIT = "model.init and model.init_std"
_BACKEND = "model.backend, which brings its own kernels"
_RECOMPUTE = "train.recompute"
_OFFLOAD = "optim.offload, or train.recompute"
_STAGES = "parallel.first_stage_layers and parallel.last_stage_layers"
_OVERLAP = "train.overlap"
_WATCH = "observe, and the router's figures in the ledger"

# Set from the model, the layout and other sections.
OWNED: dict[str, str] = {
    _MODEL: """
    num_layers hidden_size num_attention_heads num_query_groups kv_channels ffn_hidden_size
    qk_layernorm add_qkv_bias layernorm_epsilon normalization gated_linear_unit activation_func
    add_bias_linear hidden_dropout attention_dropout num_moe_experts moe_router_topk
    moe_ffn_hidden_size moe_router_pre_softmax moe_layer_freq moe_shared_expert_gate
    moe_shared_expert_intermediate_size softmax_scale""",
    _DTYPE: "params_dtype pipeline_dtype bf16 moe_router_dtype",
    _INIT: "perform_initialization",
    _BACKEND: "moe_grouped_gemm",
    _STAGES: "pipeline_model_parallel_layout",
    "train.deterministic": "deterministic_mode",
    "train.recompute ": "recompute_granularity",
    "router.balance": "moe_router_load_balancing_type",
    "method, whose loss has its own divisor": "calculate_per_token_loss",
    "parallel.tp": "tensor_model_parallel_size",
    "parallel.sp": "sequence_parallel",
    "parallel.pp": "pipeline_model_parallel_size",
    "parallel.vpp": "virtual_pipeline_model_parallel_size",
    "parallel.cp": "context_parallel_size",
    "parallel.ep": "expert_model_parallel_size",
    "parallel.etp": "expert_tensor_parallel_size",
}

# Read by nothing that moetrain builds, or only where it would break what it builds.
UNREAD: dict[str, str] = {
    _MODEL: """
    activation_func_clamp_value glu_linear_offset softmax_type window_size
    window_attn_skip_freq qk_l2_norm no_rope_freq rotary_interleaved mrope_section
    attention_output_gate apply_query_key_layer_scaling apply_residual_connection_post_layernorm
    layernorm_zero_centered_gamma multi_latent_attention experimental_attention_variant
    heterogeneous_block_specs hetereogenous_dist_checkpoint is_hybrid_model linear_attention_freq
    linear_conv_kernel_dim linear_key_head_dim linear_num_key_heads linear_num_value_heads
    linear_value_head_dim mamba_head_dim mamba_num_groups mamba_num_heads mamba_state_dim
    dsa_indexer_head_dim dsa_indexer_k_norm_epsilon dsa_indexer_k_norm_fp32 dsa_indexer_loss_coeff
    dsa_indexer_n_heads dsa_indexer_rope_interleaved dsa_indexer_rotate_activation
    dsa_indexer_scoring_relu dsa_indexer_skip_topk_offset dsa_indexer_topk dsa_indexer_topk_freq
    dsa_indexer_use_sparse_loss experimental_attention_variant_loss_scale_func
    moe_router_score_function moe_router_topk_scaling_factor moe_router_num_groups
    moe_router_group_topk moe_router_topk_limited_devices
    moe_apply_probs_on_input moe_latent_size
    use_mup mup_attn_scale_power mup_base_head_dim mup_base_hidden_size mup_embedding_mult
    mup_output_mult mup_width_mult""",
    "method: none of them trains multi-token prediction": """
    mtp_detach_heads mtp_grad_scale_func mtp_hybrid_override_pattern mtp_loss_scaling_factor
    mtp_num_layers mtp_standalone mtp_use_repeated_layer""",
    _DTYPE: """
    fp16 enable_autocast autocast_dtype fp32_residual_connection first_last_layers_bf16
    num_layers_at_start_in_bf16 num_layers_at_end_in_bf16 disable_bf16_reduced_precision_matmul
    fp8 fp8_amax_compute_algo fp8_amax_history_len fp8_dot_product_attention fp8_interval fp8_margin
    fp8_multi_head_attention fp8_output_proj fp8_param fp8_quantizer_factory fp8_recipe fp8_wgrad
    fp4 fp4_param fp4_quantizer_factory fp4_recipe activation_func_fp8_input_store tp_only_amax_red
    disable_parameter_transpose_cache quant_recipe use_kitchen use_kitchen_attention
    kitchen_attention_backend moe_router_padding_for_fp8 moe_router_padding_for_quantization
    mamba_training_ssm_states_dtype""",
    _INIT: """
    init_method init_method_std embedding_init_method embedding_init_method_std
    output_layer_init_method use_cpu_initialization init_model_with_meta_device""",
    _BACKEND: """
    transformer_impl attention_backend attention_softmax_in_fp32 masked_softmax_fusion
    flash_attention_version flash_decode dsa_kernel_backend fused_single_qkv_rope
    fused_residual_rmsnorm persist_layer_norm memory_efficient_layer_norm use_te_activation_func
    use_transformer_engine_op_fuser use_te_rng_tracker use_fused_weighted_squared_relu
    use_grouped_gemm_for_dense_mlp use_grouped_gemm_for_shared_expert moe_single_grouped_bias
    moe_single_grouped_weight moe_mlp_glu_interleave_size moe_shared_expert_glu_interleave_size
    use_mamba_mem_eff_path""",
    "method: log-probs are made without whole logits": """
    cross_entropy_fusion_impl cross_entropy_loss_fusion""",
    "train.deterministic": "batch_invariant_mode test_mode",
    _RECOMPUTE: """
    moe_layer_recompute num_microbatches_with_partial_activation_checkpoints
    mlp_chunks_for_training distribute_saved_activations""",
    _OFFLOAD: """
    cpu_offloading cpu_offloading_activations cpu_offloading_double_buffering
    cpu_offloading_num_layers cpu_offloading_retain_pinned_cpu_buffers cpu_offloading_weights
    _cpu_offloading_context activation_offload_fraction delay_offload_until_cuda_graph
    delta_offload_bytes_across_pp_ranks fine_grained_activation_offloading
    fine_grained_offloading_max_inflight_offloads min_offloaded_tensor_size offload_modules""",
    _STAGES: """
    num_layers_in_first_pipeline_stage num_layers_in_last_pipeline_stage
    account_for_embedding_in_pipeline_split account_for_loss_in_pipeline_split""",
    "router.aux_loss": "moe_aux_loss_coeff moe_grad_scale_func moe_router_quantile_balancing_ema",
    "router.aux_loss with router.balance=global: no family here has an e_score_correction_bias, so"
    " an exported model would choose its experts without the bias": """
    moe_router_enable_expert_bias moe_router_bias_update_rate""",
    "router.z_loss": "moe_z_loss_coeff",
    "router.aux_loss, which keeps experts in balance: no token is dropped here": """
    moe_expert_capacity_factor moe_expert_rank_capacity_factor moe_pad_expert_input_to_capacity
    moe_token_drop_policy moe_token_dropping moe_paged_stash moe_paged_stash_page_size
    moe_paged_stash_buffer_size_factor_cpu moe_paged_stash_buffer_size_factor_cuda""",
    "router: no step draws a random number": """
    moe_input_jitter_eps moe_router_force_biased moe_router_force_load_balancing""",
    "rollout.routing_replay": "moe_enable_routing_replay",
    "optim.clip_grad: attention's logits are not clipped": """
    qk_clip qk_clip_alpha qk_clip_threshold""",
    _WATCH: """
    barrier_with_L1_time timers config_logger_dir moe_per_layer_logging log_max_attention_logit""",
    "rollout, whose engine samples": """
    inference_cuda_graph_scope inference_disable_triton_nvls_kernels
    inference_fuse_tp_communication inference_grouped_gemm_backend
    inference_moe_disable_fused_quant_kernels inference_moe_token_dispatcher_type
    inference_rng_tracker inference_sampling_seed use_inference_optimized_layers
    mlp_chunks_for_prefill nccl_all_reduce_for_prefill moe_pad_experts_for_cuda_graph_inference""",
    "data.pack, for fewer kernels a token: packs of several shapes take no CUDA graph": """
    cuda_graph_impl cuda_graph_modules cuda_graph_retain_backward_graph cuda_graph_scope
    cuda_graph_use_single_mempool cuda_graph_warmup_steps enable_cuda_graph external_cuda_graph""",
    "parallel.cp, which gathers keys and values": """
    cp_comm_type hierarchical_context_parallel_sizes hybrid_context_parallel
    max_seqlen_per_dp_cp_rank""",
    _OVERLAP: """
    moe_shared_expert_overlap
    grad_sync_func no_sync_func param_sync_func tp_comm_atomic_ag tp_comm_atomic_rs
    tp_comm_bootstrap_backend tp_comm_bulk_dgrad tp_comm_bulk_wgrad tp_comm_overlap
    tp_comm_overlap_ag tp_comm_overlap_disable_fc1 tp_comm_overlap_disable_qkv tp_comm_overlap_rs
    tp_comm_overlap_rs_dgrad tp_comm_split_ag tp_comm_split_rs symmetric_ar_type
    defer_embedding_wgrad_compute wgrad_deferral_limit delay_wgrad_compute
    overlap_dispatch_backward_with_experts_wgrad overlap_moe_expert_parallel_comm
    ep_overlap_early_attn_memory_release high_priority_a2a_comm_stream""",
    "parallel.pp and parallel.vpp": """
    overlap_p2p_comm_warmup_flush microbatch_group_size_per_vp_stage batch_p2p_sync
    variable_seq_lengths use_ring_exchange_p2p pipeline_model_parallel_comm_backend""",
    "parallel.tp and parallel.etp": """
    gtp_weight_remat_size expert_gtp_weight_remat_size tensor_parallel_num_weight_shards
    expert_tensor_parallel_num_weight_shards clone_scatter_output_in_embedding""",
    "megatron.moe_flex_dispatcher_backend": """
    moe_enable_deepep moe_deepep_num_sms moe_hybridep_num_sms moe_hybridep_num_sms_preprocessing
    moe_hybridep_num_blocks_permute moe_hybridep_num_blocks_unpermute
    moe_hybridep_pad_uneven_dispatch_inputs moe_permute_fusion_into_hybridep
    moe_ncclep_static_shape moe_ncclep_zero_copy""",
    "optim: moetrain brings the function": "grad_scale_func finalize_model_grads_func",
}
