"""Tiny models of every family, with dimensions that differ from each other so that a mixed-up axis
cannot hide.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

COMMON: dict[str, Any] = dict(
    vocab_size=200,
    hidden_size=48,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=8,
    intermediate_size=80,
    max_position_embeddings=256,
    rms_norm_eps=1e-6,
    tie_word_embeddings=False,
)

_SPARSE = COMMON | dict(
    num_experts=6,
    num_experts_per_tok=2,
    moe_intermediate_size=28,
    decoder_sparse_step=1,
    mlp_only_layers=[],
)
CONFIGS: dict[str, dict[str, Any]] = {
    "qwen3_moe": _SPARSE | dict(model_type="qwen3_moe", norm_topk_prob=True),
    "qwen2_moe": _SPARSE
    | dict(model_type="qwen2_moe", norm_topk_prob=False, shared_expert_intermediate_size=36),
    "gpt_oss": COMMON
    | dict(
        model_type="gpt_oss",
        num_local_experts=6,
        num_experts_per_tok=2,
        intermediate_size=28,
        sliding_window=5,
        rope_parameters=dict(
            rope_type="yarn",
            rope_theta=150000.0,
            factor=8.0,
            beta_fast=32.0,  # vLLM asks for both
            beta_slow=1.0,
            truncate=False,
            original_max_position_embeddings=32,
        ),
    ),
    "qwen3": COMMON | dict(model_type="qwen3", tie_word_embeddings=True),
    "qwen2": COMMON | dict(model_type="qwen2"),
    "llama": COMMON | dict(model_type="llama"),
    "mixtral": COMMON
    | dict(model_type="mixtral", num_local_experts=6, num_experts_per_tok=2, intermediate_size=28),
}


def layers_for(parallel: Mapping[str, Any]) -> int:
    """Layers that a layout needs to show all that it does: two for each of two stages, or one for
    each of their four chunks; two where no stages share them.
    """
    return 4 if parallel.get("pp", 1) > 1 else 2


def save_model(family: str, folder: Path, **changes: Any) -> Any:
    """Write a random transformers model of `family` (fp32) into `folder`; returns it."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = CONFIGS[family] | changes
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).float()
    with (
        torch.no_grad()
    ):  # larger than the default, so that routing and attention matter in the logits
        for name, param in model.named_parameters():
            if param.dim() > 1:
                param.normal_(0, 0.08)
            elif "norm" in name:
                param.uniform_(0.7, 1.3)
            else:  # a bias, which starts at 0
                param.normal_(0, 0.3)
    model.save_pretrained(folder)
    return model


def save_reward_model(family: str, folder: Path, **changes: Any) -> None:
    """Write a random transformers reward model of `family` (fp32) into `folder`."""
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification

    fields: dict[str, Any] = CONFIGS[family] | {"num_labels": 1} | changes
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config).float()
    with torch.no_grad():
        for name, param in model.named_parameters():
            if param.dim() > 1:
                param.normal_(0, 0.3 if name == "score.weight" else 0.08)
            elif "norm" in name:
                param.uniform_(0.7, 1.3)
    model.save_pretrained(folder)
