"""What a recipe's `megatron:` section may hold: fields that follow from nothing else in it."""

from typing import Any

from moetrain.config.megatron_fields import FIELDS
from moetrain.errors import nearest

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


def passed_through(fields: dict[str, Any]) -> dict[str, Any]:
    """The section as given; ValueError for a field that is not Megatron's, or is moetrain's."""
    for key in fields:
        if key not in FIELDS:
            raise ValueError(
                f"megatron.{key} is not a TransformerConfig field.{nearest(key, FIELDS)}"
            )
        if key in OWNED:
            raise ValueError(
                f"megatron.{key} is set by moetrain from the model and the layout. Remove it."
            )
    if "moe" in (fields.get("recompute_modules") or []):
        raise ValueError(
            "megatron.recompute_modules cannot hold 'moe' here. Use train.recompute=full."
        )
    return fields
