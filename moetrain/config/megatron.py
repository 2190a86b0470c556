"""TransformerConfig fields that follow from the model, the layout and the rest of a recipe."""

OWNED = frozenset(
    """
    num_layers hidden_size num_attention_heads num_query_groups kv_channels ffn_hidden_size
    qk_layernorm add_qkv_bias layernorm_epsilon normalization gated_linear_unit activation_func
    add_bias_linear hidden_dropout attention_dropout params_dtype pipeline_dtype bf16
    perform_initialization calculate_per_token_loss deterministic_mode num_moe_experts
    moe_router_topk moe_ffn_hidden_size moe_router_pre_softmax moe_router_dtype
    moe_router_load_balancing_type moe_layer_freq moe_grouped_gemm tensor_model_parallel_size
    sequence_parallel pipeline_model_parallel_size virtual_pipeline_model_parallel_size
    context_parallel_size expert_model_parallel_size expert_tensor_parallel_size
    pipeline_model_parallel_layout
    """.split()
)
